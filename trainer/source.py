"""Where a pretrained encoder comes from: a run folder, finished or not, or an encoder file."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor, nn

from shards.errors import UserError
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.export import EncoderInfo, check_named, encoder_info, load_strictly, read_encoder
from trainer.models.encoders import build_encoder


@dataclass(frozen=True)
class Source:
    """`network`: the encoder in eval mode, on the CPU. config, run_dir and the rest of a checkpoint's model
    (`others`: tensors by name without `model.`) are there for a run only."""

    network: nn.Module
    info: EncoderInfo
    config: TrainConfig | None = None
    run_dir: Path | None = None
    others: dict[str, Tensor] | None = None

    @property
    def finished(self) -> bool:
        """Whether the training has reached its horizon (an encoder file is written then only)."""
        return self.config is None or self.info.step >= self.config.max_steps


def open_source(path: Path, backbone: str | None = None) -> Source:
    """The newest checkpoint of a run folder that verifies, or an encoder file; strict.

    backbone: the name in it, where that is a function of the user's own. Raises UserError.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder or its encoder.safetensors")
    if path.is_dir():
        return _of_run(path, backbone)
    tensors, info = read_encoder(path)
    return Source(_network(tensors, info, backbone, path.name), info)


def _of_run(run_dir: Path, backbone: str | None) -> Source:
    found = checkpoint.newest(run_dir)
    if found is None:
        encoder = run_dir / "encoder.safetensors"
        if not encoder.is_file():
            raise UserError(f"{run_dir} is no run folder: it has no checkpoint and no encoder.safetensors")
        return open_source(encoder, backbone)
    try:
        config = TrainConfig.model_validate(found.state["config"])
    except ValidationError as error:
        name = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(
            f"the run in {run_dir} has settings that this version does not know (first {name}): use the "
            "version that wrote it"
        ) from None
    info = encoder_info(config, found.step, found.state["dataset_fingerprint"])
    network = _network(found.part("model.backbone"), info, backbone, f"the run {run_dir.name}")
    model = found.part("model")
    others = {name: value for name, value in model.items() if not name.startswith("backbone.")}
    return Source(network, info, config, run_dir, others)


def _network(tensors: dict[str, Tensor], info: EncoderInfo, backbone: str | None, where: str) -> nn.Module:
    check_named(info.backbone, backbone, where)
    network = build_encoder(info.backbone, info.in_channels, info.backbone_options)
    load_strictly(network, tensors, f"{where} does not fit {info.backbone}")
    return network.eval()
