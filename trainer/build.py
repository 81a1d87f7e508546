"""The network of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shards.errors import UserError
from trainer.config import TrainConfig
from trainer.labels import LabelSet, from_json
from trainer.models.embedder import Embedder
from trainer.models.encoders import feature_dim
from trainer.models.heads import label_head
from trainer.swav.model import MultiModalSwav


def build_model(config: TrainConfig, labels: Sequence[LabelSet] = ()) -> Embedder:
    """Freshly initialised, on the CPU, with torch's generator: seed it first. Raises UserError.

    The heads of the labels come last: without them the other weights are the same.
    """
    if config.method == "simclr":
        model = Embedder(config.model, config.groups)
    else:
        model = MultiModalSwav(config.model, config.swav, config.data.modalities)
    reads = {one.name: one.reads for one in config.supervision.labels}
    for one in labels:
        if hasattr(nn.ModuleDict, one.name):
            raise UserError(f"labels called {one.name!r} cannot be trained on: store them under another name")
        dims, own = (feature_dim(model.backbone), config.model.feature_dim), reads.get(one.name, "pooled")
        model.label_heads[one.name] = label_head(*dims, len(one.classes), own)
        model.head_reads[one.name] = own
    return model


def restored(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[TrainConfig, Embedder]:
    """Configuration and network of a checkpoint, from its `state` and its part `model`. Raises UserError."""
    config = TrainConfig.model_validate(state["config"])
    model = build_model(config, from_json(state.get("labels", [])))
    model.load_state_dict(dict(tensors))
    return config, model
