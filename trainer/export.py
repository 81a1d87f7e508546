"""The pretrained encoder as a file of its own: `encoder.safetensors`, and `encoder.json` for people.

The tensors carry torchvision's state-dict names, so a ResNet of another library can load them too. What is
needed to rebuild the network travels in the header of the file itself.

    encoder, info = load_encoder(Path("encoder.safetensors"))
    features = encoder(images)  # [n, 1, H, W] in [0, 1] to [n, encoder.feature_dim]

A file never leads to code that its reader has not named: where the backbone is a function of the user
(`package.module:function`), load_encoder wants that name once more.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from shards.errors import UserError
from trainer import files
from trainer.config import BackboneOption, IntensityConfig, TrainConfig, VolumeConfig, check_backbone
from trainer.models.encoders import build_encoder, is_users_own

FORMAT_VERSION = 2  # 2: backbone_options
VOLUME_VERSION = 3  # of an encoder of volumes: a box as its size, and volume
READABLE_VERSIONS = (1, FORMAT_VERSION, VOLUME_VERSION)


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder file says of itself. `size`: px of a whole image for it, or the box of a volume
    (slices, rows, columns), and then `volume`: how volumes become boxes."""

    backbone: str
    in_channels: int
    step: int
    modalities: tuple[str, ...]
    dataset_fingerprint: str
    size: int | tuple[int, int, int]
    seed: int
    split: str
    intensity: dict[str, IntensityConfig]
    backbone_options: dict[str, BackboneOption] = field(default_factory=dict)
    volume: VolumeConfig | None = None

    @property
    def size_text(self) -> str:
        """Such as 224 px, or 40 x 224 x 192 voxels."""
        if isinstance(self.size, int):
            return f"{self.size} px"
        return f"{' x '.join(map(str, self.size))} voxels"


def encoder_info(config: TrainConfig, step: int, dataset_fingerprint: str) -> EncoderInfo:
    return EncoderInfo(
        backbone=config.model.backbone,
        in_channels=config.model.in_channels,
        step=step,
        modalities=config.data.modalities,
        dataset_fingerprint=dataset_fingerprint,
        size=config.views.whole_size,
        seed=config.seed,
        split=config.data.split,
        intensity=_intensity(config),
        backbone_options=config.model.backbone_options,
        volume=config.views.volume,
    )


def _intensity(config: TrainConfig) -> dict[str, IntensityConfig]:
    """As set; of volumes those too that are not set."""
    if config.views.volume is None:
        return config.data.intensity
    return config.data.intensity | {m: config.data.intensity_of(m) for m in config.data.modalities}


def save_encoder(path: Path, backbone: nn.Module, info: EncoderInfo) -> None:
    """Atomically write `path` (`*.safetensors`) and, beside it, its info as `*.json`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    text = info_text(info)
    with files.disk_full_is_clear("writing the encoder"):
        files.replace_file(path, safetensors.torch.save(tensors, metadata={"medswav_encoder": text}))
        files.replace_file(path.with_suffix(".json"), text.encode())


def load_encoder(path: Path, backbone: str | None = None) -> tuple[nn.Module, EncoderInfo]:
    """Rebuild the backbone in eval mode, on the CPU, with strict names.

    backbone: the name in the file, where that is a function of the user's own. Raises UserError.
    """
    tensors, info = read_encoder(path)
    check_named(info.backbone, backbone, path.name)
    network = build_encoder(info.backbone, info.in_channels, info.backbone_options)
    load_strictly(network, tensors, f"{path.name} does not fit {info.backbone}")
    return network.eval(), info


def read_encoder(path: Path) -> tuple[dict[str, Tensor], EncoderInfo]:
    """Tensors and description of an encoder file; nothing is built. Raises UserError."""
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
    return tensors, _read_info(text)


def check_named(recorded: str, given: str | None, where: str) -> None:
    """A file must not choose which code of the user runs. Raises UserError."""
    if given is not None and given != recorded:
        raise UserError(f"{where} was made with the backbone {recorded}, not {given}: give that name")
    if given is None and is_users_own(recorded):
        raise UserError(
            f"{where} was made with {recorded}, which is no code of this package: if you trust it, name it, "
            f"--backbone {recorded}"
        )


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], problem: str) -> None:
    """load_state_dict that says what differs in one line. Raises UserError that begins with `problem`."""
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys())
    if wrong:
        raise UserError(f"{problem}: {len(wrong)} names differ, first {wrong[0]}")
    shapes = [name for name, value in expected.items() if value.shape != tensors[name].shape]
    if shapes:
        was, now = list(tensors[shapes[0]].shape), list(expected[shapes[0]].shape)
        raise UserError(f"{problem}: {len(shapes)} shapes differ, first {shapes[0]} {was}, wanted {now}")
    network.load_state_dict(dict(tensors))


def info_text(info: EncoderInfo) -> str:
    intensity = {name: value.model_dump(mode="json") for name, value in info.intensity.items()}
    tree = {**asdict(info), "intensity": intensity}
    if info.volume is None:
        return json.dumps(
            {"format": FORMAT_VERSION, **{n: v for n, v in tree.items() if n != "volume"}}, indent=1
        )
    return json.dumps(
        {"format": VOLUME_VERSION, **tree, "volume": info.volume.model_dump(mode="json")}, indent=1
    )


def _read_info(text: str) -> EncoderInfo:
    tree = json.loads(text)
    if tree.pop("format") not in READABLE_VERSIONS:
        raise UserError("the encoder file has another format version: export it again with this version")
    tree["modalities"] = tuple(tree["modalities"])
    tree["intensity"] = {n: IntensityConfig.model_validate(v) for n, v in tree["intensity"].items()}
    if tree.get("volume") is not None:
        tree["volume"] = VolumeConfig.model_validate(tree["volume"])
        tree["size"] = tuple(tree["size"])
    info = EncoderInfo(**tree)
    try:
        check_backbone(info.backbone, info.backbone_options)
    except ValueError as error:
        raise UserError(f"the description in the encoder file is wrong: {error}") from None
    return info
