"""Weights to begin with: a file, or torchvision's (`model.init_weights`). Strict, unless asked otherwise.

* All names and shapes fit, or the run does not start. `model.init_partial=true` takes what fits and says
  what was left out, and why.
* Nothing is guessed: `model.init_entry` names the part of a .pth file that holds the tensors ("state_dict"),
  `model.init_prefix` what stands before the names of the encoder ("module.", "module.encoder_q.").
* The first convolution of a network for 3 channels, on an encoder of one: its weights are summed over the
  channels, which is the same function on an image repeated three times. Images are in [0, 1], and the mean
  and deviation of ImageNet are not taken out: batch norms adapt in training.
* .pth files are read with weights_only=True: nothing in them is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from shards.errors import UserError
from trainer.config import ModelConfig, TrainConfig
from trainer.models import libraries
from trainer.models.encoders import build_encoder, check_encoder
from trainer.models.recompute import find_blocks
from trainer.models.syncbn import synchronise

_SHOWN = 12
_SUMMED_FROM = 3  # channels

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class InitialWeights:
    """What became of the weights: names, by what was done with them."""

    source: str
    loaded: tuple[str, ...]
    summed: tuple[str, ...] = ()  # of `loaded`: over three channels
    classifier: tuple[str, ...] = ()  # of torchvision's weights: belongs to the head that is cut off
    not_in_encoder: tuple[str, ...] = ()
    not_in_file: tuple[str, ...] = ()
    other_shape: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: what was loaded, and what not and why."""
        said = [f"initial weights: {len(self.loaded)} tensors from {self.source}", *self.problems()]
        if self.not_in_file or self.other_shape:
            said.append("what is not loaded stays at its random start")
        if self.classifier:
            said.append(f"the classifier of the source is cut off: {_names(self.classifier)}")
        if self.summed:
            said.append(f"summed over three channels: {_names(self.summed)}")
        return said

    def problems(self) -> list[str]:
        """What does not fit, and why."""
        left = {
            "in the source, not in the encoder": self.not_in_encoder,
            "in the encoder, not in the source": self.not_in_file,
            "of another shape": self.other_shape,
        }
        return [f"{why}: {_names(names)}" for why, names in left.items() if names]


def check_model(config: TrainConfig) -> list[str]:
    """Build the encoder, run it on the crop sizes, load its initial weights: once, before any rank starts.

    Returns lines to show. Raises UserError for what would end the training later. Ours need no trial.
    """
    model = config.model
    foreign = ":" in model.backbone
    if not foreign and model.init_weights is None:
        return []
    encoder = build_encoder(model.backbone, model.in_channels, model.backbone_options)
    if foreign:
        check_encoder(encoder, model.backbone, model.in_channels, config.views.crop_shapes)
        if model.sync_batchnorm != "off":
            synchronise(encoder, None)
        if model.activation_checkpointing:
            find_blocks(encoder)
    found = load_initial(encoder, model)
    return [] if found is None else found.lines()


def load_initial(encoder: nn.Module, model: ModelConfig) -> InitialWeights | None:
    """Load model.init_weights into a backbone, in place; None where there are none. Raises UserError."""
    if model.init_weights is None:
        return None
    tensors, classes = read_weights(model)
    source, _, name = model.init_weights.rpartition("/")
    shown = name if source else model.init_weights
    fitted, found = fit(tensors, encoder.state_dict(), shown, classes)
    if found.problems() and not model.init_partial:
        raise UserError(
            f"model.init_weights does not fit {model.backbone}: {'; '.join(found.problems())}. "
            "model.init_partial=true loads what fits; model.init_prefix names what stands before the names"
        )
    if not found.loaded:
        raise UserError(f"no tensor of {shown} fits {model.backbone}: is model.init_prefix right?")
    encoder.load_state_dict(fitted, strict=False)
    return found


def fit(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, classes: int | None = None
) -> tuple[Weights, InitialWeights]:
    """The tensors that an encoder of the state `wanted` takes, and what became of each.

    classes: of a linear classifier of the source that may be left out: one `weight` [classes, F], one `bias`.
    """
    fitted: Weights = {}
    summed: list[str] = []
    other_shape: list[str] = []
    for name in sorted(tensors.keys() & wanted.keys()):
        value, place = tensors[name], wanted[name]
        if value.shape == place.shape:
            fitted[name] = value
        elif _is_stem(value, place) and not summed:
            fitted[name] = value.sum(1, keepdim=True)
            summed.append(name)
        else:
            other_shape.append(name)
    extra = tensors.keys() - wanted.keys()
    heads = [n.removesuffix(".weight") for n in extra if n.endswith(".weight") and tensors[n].ndim == 2]
    heads = [h for h in heads if tensors[f"{h}.weight"].shape[0] == classes]
    classifier = extra & {f"{heads[0]}.weight", f"{heads[0]}.bias"} if len(heads) == 1 else set()
    return fitted, InitialWeights(
        source,
        loaded=tuple(sorted(fitted)),
        summed=tuple(summed),
        classifier=tuple(sorted(classifier)),
        not_in_encoder=tuple(sorted(extra - classifier)),
        not_in_file=tuple(sorted(wanted.keys() - tensors.keys())),
        other_shape=tuple(sorted(other_shape)),
    )


def _is_stem(value: Tensor, place: Tensor) -> bool:
    """Weights of a convolution over 3 channels for one over 1."""
    of_three = value.ndim == 4 and value.shape[1] == _SUMMED_FROM and place.ndim == 4 and place.shape[1] == 1
    return of_three and value.shape[0] == place.shape[0] and value.shape[2:] == place.shape[2:]


def read_weights(model: ModelConfig) -> tuple[Weights, int | None]:
    """Tensors by the encoder's names, and the number of classes of torchvision's. Raises UserError."""
    assert model.init_weights is not None
    library, _, name = model.init_weights.partition(":")
    if library == "torchvision":
        return _torchvision(name)
    path = Path(model.init_weights)
    if not path.is_file():
        raise UserError(f"model.init_weights={path}: there is no such file")
    tree = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    tensors = _entry(tree, model.init_entry, path.name)
    prefix = model.init_prefix
    below = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    if not below:
        starts = sorted({key.split(".")[0] + "." for key in tensors})
        raise UserError(
            f"no name in {path.name} begins with model.init_prefix={prefix!r}: they begin with "
            f"{_names(tuple(starts))}"
        )
    return below, None


def _torchvision(name: str) -> tuple[Weights, int | None]:
    """Published weights, through torchvision's own download and its cache. Raises UserError."""
    models = libraries.torchvision().models
    try:
        weights: Any = models.get_weight(name)
    except (ValueError, KeyError, AttributeError):
        raise UserError(
            f"torchvision has no weights {name!r}: write them as torchvision:ResNet50_Weights.IMAGENET1K_V2"
        ) from None
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"{weights.url.rpartition('/')[2]} cannot be downloaded ({error}): put the file into {folder}"
        ) from None
    return dict(state), len(weights.meta.get("categories", ()))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError:
        raise UserError(f"{path.name} is not a safetensors file, or it is damaged") from None


def _read_pth(path: Path) -> dict[str, Any]:
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever its reader raises on bytes that are no checkpoint of plain tensors
        raise UserError(
            f"{path.name} is damaged or holds more than tensors and plain values: save the state_dict alone"
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path.name} holds a {type(tree).__name__}, not tensors by name")
    return tree


def _entry(tree: dict[str, Any], entry: str, file: str) -> Weights:
    """The tensors by name, in the file itself or in one entry of it."""
    entries = sorted(key for key, value in tree.items() if isinstance(value, dict))
    if entry:
        if entry not in entries:
            raise UserError(f"{file} has no entry {entry!r} (model.init_entry); it has: {_names(entries)}")
        tree = tree[entry]
    elif entries:
        raise UserError(
            f"{file} has entries ({_names(entries)}): set model.init_entry to that of the weights"
        )
    return {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}


def _names(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "none"
