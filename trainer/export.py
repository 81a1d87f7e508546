"""The pretrained encoder as a file of its own: `encoder.safetensors`, and `encoder.json` for people.

The tensors carry torchvision's state-dict names, so a ResNet of another library can load them too. What is
needed to rebuild the network travels in the header of the file itself.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from shards.errors import UserError
from trainer import files
from trainer.config import IntensityConfig, TrainConfig
from trainer.models.resnet import build_backbone

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder file says of itself. `size`: px of a whole image for it."""

    backbone: str
    in_channels: int
    step: int
    modalities: tuple[str, ...]
    dataset_fingerprint: str
    size: int
    seed: int
    split: str
    intensity: dict[str, IntensityConfig]


def encoder_info(config: TrainConfig, step: int, dataset_fingerprint: str) -> EncoderInfo:
    return EncoderInfo(
        backbone=config.model.backbone,
        in_channels=config.model.in_channels,
        step=step,
        modalities=config.data.modalities,
        dataset_fingerprint=dataset_fingerprint,
        size=config.views.whole_image_size,
        seed=config.seed,
        split=config.data.split,
        intensity=config.data.intensity,
    )


def save_encoder(path: Path, backbone: nn.Module, info: EncoderInfo) -> None:
    """Atomically write `path` (`*.safetensors`) and, beside it, its info as `*.json`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    text = _info_text(info)
    with files.disk_full_is_clear("writing the encoder"):
        files.replace_file(path, safetensors.torch.save(tensors, metadata={"medswav_encoder": text}))
        files.replace_file(path.with_suffix(".json"), text.encode())


def load_encoder(path: Path) -> tuple[nn.Module, EncoderInfo]:
    """Rebuild the backbone in eval mode, on the CPU, with strict names. Raises UserError."""
    if not path.is_file():
        raise UserError(
            f"there is no encoder file {path.name}: a finished run writes RUN/encoder.safetensors"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("medswav_encoder")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError:
        raise UserError(f"{path.name} is not a safetensors file, or it is damaged") from None
    if text is None:
        raise UserError(
            f"{path.name} holds tensors but no description of an encoder: use RUN/encoder.safetensors"
        )
    info = _read_info(text)
    backbone = build_backbone(info.backbone, info.in_channels)
    expected = backbone.state_dict().keys()
    if expected != tensors.keys():
        wrong = sorted(expected ^ tensors.keys())
        raise UserError(
            f"{path.name} does not fit {info.backbone}: {len(wrong)} names differ, first {wrong[0]}"
        )
    backbone.load_state_dict(tensors)
    return backbone.eval(), info


def _info_text(info: EncoderInfo) -> str:
    intensity = {name: value.model_dump(mode="json") for name, value in info.intensity.items()}
    return json.dumps({"format": FORMAT_VERSION, **asdict(info), "intensity": intensity}, indent=1)


def _read_info(text: str) -> EncoderInfo:
    tree = json.loads(text)
    if tree.pop("format") != FORMAT_VERSION:
        raise UserError("the encoder file has another format version: export it again with this version")
    tree["modalities"] = tuple(tree["modalities"])
    tree["intensity"] = {n: IntensityConfig.model_validate(v) for n, v in tree["intensity"].items()}
    return EncoderInfo(**tree)
