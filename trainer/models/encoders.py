"""Any network as the shared backbone, by name: ours, torchvision's, timm's or the user's own.

    resnet50                            trainer.models.resnet
    densenet3d                          trainer.models.densenet3d, for volumes
    torchvision:convnext_tiny           torchvision's classifier without its last linear layer
    timm:vit_small_patch16_224          timm's model with num_classes=0
    package.module:function             function(in_channels, **options) of the user

The protocol is small: an nn.Module with an int `feature_dim` whose forward takes [n, C, H, W], float in
[0, 1], for every H and W of the crops, and gives [n, feature_dim]. `check_encoder` holds a network to it
before the training starts. A network for volumes (config.VOLUME_BACKBONES) takes [n, C, Z, Y, X].
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from trainer.config import LIBRARIES, OWN_BACKBONES, VOLUME_BACKBONES, BackboneOption
from trainer.models import libraries
from trainer.models.densenet3d import DenseNet3d
from trainer.models.resnet import build_backbone

Options = Mapping[str, BackboneOption]
# px of a square image, its rows and columns, or the slices, rows and columns of a volume
Size = int | tuple[int, ...]


def build_encoder(name: str, in_channels: int = 1, options: Options | None = None) -> nn.Module:
    """A freshly initialised network with `feature_dim`. Raises UserError for what cannot be built."""
    given = dict(options or {})
    library, _, kind = name.rpartition(":")
    if name in VOLUME_BACKBONES:
        return DenseNet3d(in_channels)
    if name in OWN_BACKBONES:
        return build_backbone(name, in_channels)
    if library == "torchvision":
        return _torchvision(kind, in_channels, given)
    if library == "timm":
        return _timm(kind, in_channels, given)
    return _users(library, kind, in_channels, given)


def is_users_own(name: str) -> bool:
    """Whether a backbone's name leads to code outside of this package, torchvision and timm."""
    return name not in OWN_BACKBONES and name.partition(":")[0] not in LIBRARIES


def require_images(name: str, volumes: bool = False) -> None:
    """Refuse a network for volumes (`volumes`: it was trained on them) where images are evaluated. Raises
    UserError."""
    if volumes or name in VOLUME_BACKBONES:
        raise UserError(
            f"{name} takes volumes [n, C, Z, Y, X], and this works on images: use another encoder"
        )


def feature_dim(encoder: nn.Module) -> int:
    """Length of the pooled features. Raises UserError where the protocol is not kept."""
    found = getattr(encoder, "feature_dim", None)
    if not isinstance(found, int):
        raise UserError(f"{type(encoder).__name__} has no feature_dim: set it to the length of its features")
    return found


def check_encoder(
    encoder: nn.Module,
    name: str,
    in_channels: int,
    sizes: Sequence[Size],
    *,
    modes: Sequence[bool] = (True, False),
    fix: str = "choose crops of another size (views.crops), another backbone, or options of it "
    "(model.backbone_options)",
) -> None:
    """Run a copy on images (or volumes) of every size, in training and in evaluation (`modes`). Raises
    UserError if one does not fit."""
    trial = copy.deepcopy(encoder)
    wanted = feature_dim(encoder)
    for training in modes:
        trial.train(training)
        for size in dict.fromkeys(sizes):
            shape = (size, size) if isinstance(size, int) else size
            found = _try(trial, torch.rand(2, in_channels, *shape))
            if isinstance(found, Tensor) and found.shape == (2, wanted):
                continue
            why = found if isinstance(found, str) else f"it gave {_shape(found)}, not [2, {wanted}]"
            sides = dict.fromkeys(shape) if len(shape) == 2 else shape  # of a square image one
            text = f"{'volumes' if len(shape) == 3 else 'images'} of {'x'.join(map(str, sides))}"
            text += " px" if len(shape) == 2 else ""
            raise UserError(f"model.backbone={name} cannot take {text} ({why}): {fix}")


@torch.no_grad()
def _try(encoder: nn.Module, images: Tensor) -> object:
    """The output, or the network's own complaint in one line."""
    try:
        return encoder(images)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return text.rstrip(".")[:200]


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _torchvision(kind: str, in_channels: int, options: dict[str, Any]) -> nn.Module:
    models = libraries.torchvision().models
    if kind not in models.list_models(module=models):
        raise UserError(f"torchvision has no classification model {kind!r}: see its list of models")
    network = _made(f"torchvision:{kind}", lambda: models.get_model(kind, weights=None, **options))
    network.classifier_name, network.feature_dim = _cut_classifier(network, kind)
    _set_channels(network, kind, in_channels)
    return network


def _timm(kind: str, in_channels: int, options: dict[str, Any]) -> nn.Module:
    library = libraries.timm()
    if not library.is_model(kind):
        raise UserError(f"timm has no model {kind!r}: see timm.list_models()")
    settings = {"pretrained": False, "in_chans": in_channels, "num_classes": 0, **options}
    network = _made(f"timm:{kind}", lambda: library.create_model(kind, **settings))
    network.feature_dim = int(getattr(network, "head_hidden_size", None) or network.num_features)
    return network


def _users(module: str, function: str, in_channels: int, options: dict[str, Any]) -> nn.Module:
    make = getattr(libraries.users_module(module), function, None)
    if not callable(make):
        raise UserError(f"model.backbone={module}:{function}: {module} has no function {function}")
    network = make(in_channels, **options)
    if not isinstance(network, nn.Module):
        raise UserError(f"model.backbone={module}:{function} gave a {type(network).__name__}, no nn.Module")
    feature_dim(network)
    return network


def _made(name: str, make: Any) -> Any:
    """The network, or a UserError for options that its library refuses."""
    try:
        return make()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.backbone={name} cannot be built: {text} (model.backbone_options)") from None


def _cut_classifier(network: nn.Module, kind: str) -> tuple[str, int]:
    """Put nothing in the place of the last linear layer, and of the dropout before it; its name and input
    width.

    What stands before them in torchvision's `classifier` (a norm, a hidden layer) belongs to the features.
    """
    linear = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UserError(f"torchvision:{kind} does not end in a linear classifier that could be cut off")
    path, last = linear[-1]
    parent_path, _, leaf = path.rpartition(".")
    parent = network.get_submodule(parent_path)
    setattr(parent, leaf, nn.Identity())
    if isinstance(parent, nn.Sequential):
        before = int(leaf) - 1 if leaf.isdigit() else -1
        if before >= 0 and isinstance(parent[before], nn.Dropout):
            parent[before] = nn.Identity()
    return path, int(last.in_features)


@torch.no_grad()
def _set_channels(network: nn.Module, kind: str, in_channels: int) -> None:
    """A first convolution of one channel, its weights summed over the three of torchvision's.

    That is the same function as the three-channel network on an image repeated three times.
    """
    if in_channels == 3:
        return
    path, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if in_channels != 1 or first.in_channels != 3 or first.groups != 1:
        raise UserError(
            f"torchvision:{kind} takes images of 3 channels: set model.in_channels to 1 (the weights of its "
            "first convolution are summed) or 3"
        )
    grey = copy.deepcopy(first)
    grey.in_channels = 1
    grey.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    parent_path, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent_path), leaf, grey)
