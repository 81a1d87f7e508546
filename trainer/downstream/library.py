"""Published weights of torchvision as an encoder file, so that every task takes them like its own."""

from pathlib import Path

from shards.errors import UserError
from trainer.config import IntensityConfig, ModelConfig
from trainer.export import EncoderInfo, save_encoder
from trainer.models import libraries
from trainer.models.encoders import build_encoder
from trainer.models.initial import load_initial

_SIZE = 224  # px, of ImageNet's networks


def save_library_encoder(weights: str, path: Path, modalities: tuple[str, ...] = ()) -> None:
    """weights: torchvision:ResNet50_Weights.IMAGENET1K_V2, say. One grey channel: the first convolution's
    weights are summed (trainer.models.initial). They come from torchvision's cache or its download. Raises
    UserError where neither has them."""
    name = weights.removeprefix("torchvision:")
    kind = _network_of(name)
    network = build_encoder(f"torchvision:{kind}", 1)
    load_initial(network, ModelConfig(backbone=f"torchvision:{kind}", init_weights=weights))
    info = EncoderInfo(
        backbone=f"torchvision:{kind}",
        in_channels=1,
        step=0,
        modalities=modalities,
        dataset_fingerprint="",
        size=_SIZE,
        seed=0,
        split="none",
        intensity={"ct": IntensityConfig(mode="recorded")},
    )
    save_encoder(path, network, info)


def _network_of(name: str) -> str:
    """ResNet50_Weights.IMAGENET1K_V2 to resnet50. Raises UserError."""
    models = libraries.torchvision().models
    group = name.partition(".")[0]
    for kind in models.list_models(module=models):
        if models.get_model_weights(kind).__name__ == group:
            return str(kind)
    raise UserError(
        f"torchvision has no weights {name!r}: write them as torchvision:ResNet50_Weights.IMAGENET1K_V2"
    )
