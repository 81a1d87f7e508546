"""The network of a run."""

from trainer.config import TrainConfig
from trainer.models.embedder import Embedder
from trainer.swav.model import MultiModalSwav


def build_model(config: TrainConfig) -> Embedder:
    """Freshly initialised, on the CPU, with torch's generator: seed it first."""
    if config.method == "simclr":
        return Embedder(config.model, config.groups)
    return MultiModalSwav(config.model, config.swav, config.data.modalities)
