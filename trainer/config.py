"""Typed configuration of a pretraining run: one tree, YAML presets, `a.b=c` overrides.

An unknown key is an error; a value is obeyed or refused with the fix, never adjusted (architecture.md,
principle 5). The defaults are Table I of the paper, column 2D.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shards.errors import UserError
from shards.settings import apply_override

SHARED = "all"  # name of the one group of swav.groups=shared, in metrics and prototypes
Probability = float
Range = tuple[float, float]
BackboneOption = bool | int | float | str

OWN_BACKBONES = ("resnet-tiny", "resnet18", "resnet50", "resnet152", "resnet50w2", "resnet50w4")
LIBRARIES = ("torchvision", "timm")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IntensityConfig(_Strict):
    """How stored pixels become [0, 1]. `recorded`: the DICOM window, percentiles where there is none;
    `fixed`: `center` and `width`; `percentile`: the 0.5th to the 99.5th percentile of the image."""

    mode: Literal["recorded", "fixed", "percentile"] = "percentile"
    center: float | None = None
    width: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fixed_needs_window(self) -> "IntensityConfig":
        if (self.mode == "fixed") != (self.center is not None and self.width is not None):
            raise ValueError("center and width go with mode=fixed, and mode=fixed needs both")
        return self


class DataConfig(_Strict):
    """What is read: `batch_size` is global and holds batch_size/len(modalities) images of each modality."""

    dataset: str = ""
    modalities: tuple[str, ...] = ("xr", "ct", "mr", "us")
    split: Literal["train", "val", "test", "all"] = "train"
    batch_size: int = Field(default=32, gt=0)
    intensity: dict[str, IntensityConfig] = {"ct": IntensityConfig(mode="recorded")}
    cache_bytes: int = Field(default=256 << 20, ge=0)  # decoded images and their bands, per worker process

    @property
    def per_modality(self) -> int:
        """B/M: images of one modality in a global batch."""
        return self.batch_size // len(self.modalities)

    @model_validator(mode="after")
    def _equal_subsets(self) -> "DataConfig":
        count = len(self.modalities)
        if count == 0 or len(set(self.modalities)) != count:
            raise ValueError("data.modalities must name at least one modality, each once")
        if self.batch_size % count:
            low = self.batch_size - self.batch_size % count
            raise ValueError(
                f"data.batch_size={self.batch_size} is no multiple of the {count} modalities: "
                f"use {max(low, count)} or {low + count}"
            )
        return self


class CropConfig(_Strict):
    """One group of crops of equal size. `share` is the fraction of the (border-cropped) image area that a
    crop covers, drawn uniformly; it is used by geometry `recommended` only."""

    count: int = Field(gt=0)
    size: int = Field(gt=0)  # px, square
    share: Range = (0.14, 1.0)

    @model_validator(mode="after")
    def _share_is_a_fraction(self) -> "CropConfig":
        if not 0 < self.share[0] <= self.share[1] <= 1:
            raise ValueError(f"share={list(self.share)} must be a rising range of fractions above 0, up to 1")
        return self


class ViewConfig(_Strict):
    """Multi-crop and the five augmentations, in their order: rescale, energy, gamma, linear, crop
    (method.md sections 2, 3-A, 3-B, 3-H)."""

    geometry: Literal["paper", "recommended"] = "recommended"
    size_range: dict[str, Range] = {}  # px of the longer side per modality; geometry=paper only
    default_size_range: Range = (600.0, 1200.0)
    border: Range = (0.1, 0.1)  # fraction of height, width removed at each side before cropping
    crops: tuple[CropConfig, ...] = (
        CropConfig(count=2, size=224, share=(0.14, 1.0)),
        CropConfig(count=6, size=92, share=(0.05, 0.14)),
    )
    sigmas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    energy_probability: Probability = Field(default=0.8, ge=0, le=1)
    gamma_probability: Probability = Field(default=0.5, ge=0, le=1)
    gamma: Range = (1.8, 2.6)
    linear_probability: Probability = Field(default=0.5, ge=0, le=1)
    linear_gain: Range = (0.9, 1.1)
    linear_offset: Range = (-0.2, 0.2)
    band_statistics: str | None = None  # file of `medswav fit-bands`; None: RUN/bands.json, fitted at start

    @model_validator(mode="after")
    def _possible(self) -> "ViewConfig":
        if not all(0 <= b < 0.5 for b in self.border):
            raise ValueError(f"border={list(self.border)} must be fractions below 0.5 of each side")
        for low, high in (self.default_size_range, *self.size_range.values()):
            if not 1 <= low <= high:
                raise ValueError("size ranges must be rising ranges of pixels, from 1 on")
        for name in ("gamma", "linear_gain", "linear_offset"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name}={[low, high]} must be a rising range")
        if not self.gamma[0] > 0:
            raise ValueError(f"gamma={list(self.gamma)} must be above 0")
        if not self.crops:
            raise ValueError("crops must name at least one group")
        if not 1 <= len(self.sigmas) <= 16 or not all(sigma > 0 for sigma in self.sigmas):
            raise ValueError("sigmas must be 1 to 16 positive numbers of pixels")
        return self

    @property
    def n_crops(self) -> int:
        return sum(c.count for c in self.crops)

    @property
    def whole_image_size(self) -> int:
        """Side in px of a whole image at the scale of an average large crop, for evaluation.

        A network is best where things are as large as in training; a whole image squeezed to the crop's own
        size shows them smaller (Touvron et al., Fixing the train-test resolution discrepancy, 2019). 512 at
        the most: probes hold all images of a modality in memory.
        """
        if self.geometry == "paper":
            return min(round(sum(self.default_size_range) / 2), 512)
        large = max(self.crops, key=lambda crop: crop.size)
        inside = (1 - 2 * self.border[0]) * (1 - 2 * self.border[1])
        return min(round(large.size / (sum(large.share) / 2 * inside) ** 0.5), 512)


class ModelConfig(_Strict):
    backbone: str = "resnet50"  # one of OWN_BACKBONES, torchvision:NAME, timm:NAME or package.module:function
    backbone_options: dict[str, BackboneOption] = {}  # arguments of a backbone that is not ours
    in_channels: int = Field(default=1, gt=0)  # 1: grey images as they are
    hidden_dim: int = Field(default=2048, gt=0)  # projection head: Linear-BN-ReLU-Linear
    feature_dim: int = Field(default=128, gt=0)
    sync_batchnorm: bool = False

    @model_validator(mode="after")
    def _known_backbone(self) -> "ModelConfig":
        check_backbone(self.backbone, self.backbone_options)
        return self


def check_backbone(name: str, options: Mapping[str, BackboneOption]) -> None:
    """Hold a backbone's name and options to what may be built; nothing is imported. Raises ValueError."""
    library, _, kind = name.rpartition(":")
    plain = kind.isidentifier() if library not in LIBRARIES else re.fullmatch(r"[A-Za-z0-9_.]+", kind)
    if name not in OWN_BACKBONES and not (plain and all(p.isidentifier() for p in library.split("."))):
        raise ValueError(
            f"backbone={name!r} is none of {', '.join(OWN_BACKBONES)}, torchvision:NAME, timm:NAME or "
            "package.module:function"
        )
    if options and name in OWN_BACKBONES:
        raise ValueError(f"backbone_options are for other backbones than {name}, which has none")
    weights = [option for option in options if re.match(r"pretrained|weights|checkpoint|cache", option)]
    if library in LIBRARIES and weights:
        raise ValueError(f"backbone_options.{weights[0]} loads weights: set model.init_weights instead")


class SwavConfig(_Strict):
    """`groups`: which images share prototypes, codes (one Sinkhorn), softmax and queue. `per-modality` is the
    method (method.md eq. 3); `shared` is the baseline, one SwAV over the whole batch as if M = 1."""

    groups: Literal["per-modality", "shared"] = "per-modality"
    prototypes: int = Field(default=3000, gt=1)  # of each group
    assign: tuple[int, ...] = (0, 1)  # crops that give codes
    temperature: float = Field(default=0.1, gt=0)
    epsilon: float = Field(default=0.03, gt=0)
    sinkhorn_iterations: int = Field(default=3, gt=0)
    queue_length: int = Field(default=3840, ge=0)  # global, per assigned crop; of all groups; 0: none
    queue_start_step: int = Field(default=0, ge=0)
    freeze_prototypes_steps: int = Field(default=10_000, ge=0)

    def names(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """Of the groups, in the order of their images in a batch."""
        return (SHARED,) if self.groups == "shared" else tuple(modalities)


class OptimConfig(_Strict):
    optimizer: Literal["larc-sgd", "adamw"] = "larc-sgd"
    learning_rate: float = Field(default=0.6, gt=0)
    final_learning_rate: float = Field(default=0.0006, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-6, ge=0)
    larc_trust: float = 0.001
    larc_eps: float = 1e-8


class CheckpointConfig(_Strict):
    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=3, gt=0)


class TrainConfig(_Strict):
    """The whole run. `max_steps` is the horizon of the cosine schedule; epochs derive from it."""

    seed: int = 0
    max_steps: int = Field(default=100_000, gt=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    threads: int = Field(default=1, gt=0)  # torch threads of a rank on a CPU
    log_every_steps: int = Field(default=10, gt=0)
    data: DataConfig = DataConfig()
    views: ViewConfig = ViewConfig()
    model: ModelConfig = ModelConfig()
    swav: SwavConfig = SwavConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of images that share prototypes and codes: the modalities, or `all`."""
        return self.swav.names(self.data.modalities)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        n_crops = self.views.n_crops
        assign = self.swav.assign
        if not assign or len(set(assign)) != len(assign) or not all(0 <= a < n_crops for a in assign):
            raise ValueError(f"swav.assign={list(assign)} must name different crops below {n_crops}")
        if n_crops < 2:
            raise ValueError("views.crops must give at least 2 crops")
        batch, queue = self.data.batch_size, self.swav.queue_length
        if queue % batch:
            low = queue - queue % batch
            raise ValueError(
                f"swav.queue_length={queue} is no multiple of data.batch_size={batch}: "
                f"the nearest valid lengths are {low} and {low + batch} (0 switches the queue off)"
            )
        if self.optim.warmup_steps > self.max_steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} is more than max_steps={self.max_steps}: "
                "the learning rate would never be reached"
            )
        return self


def preset_names() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml") for p in _preset_folder().iterdir() if p.name.endswith(".yaml")
    )


def load_config(preset: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A preset's name (or a YAML file) and `a.b=value` overrides to a config. Raises UserError."""
    tree = _read_tree(preset)
    for item in overrides:
        apply_override(tree, item)
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def text_setting(name: str, value: str | Path) -> str:
    """An override of `load_config` that holds this text as it is, whatever YAML would make of it."""
    return f"{name}={json.dumps(str(value), ensure_ascii=False)}"


def check_world(config: TrainConfig, world_size: int) -> None:
    """Refuse a world size that cannot hold equal modality subsets on every rank. Raises UserError."""
    per_modality = config.data.per_modality
    if per_modality % world_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} gives {per_modality} images of each modality, which "
            f"{world_size} ranks cannot share equally: use a batch_size that is a multiple of "
            f"{len(config.data.modalities) * world_size}"
        )


def check_device(config: TrainConfig, world_size: int, device: str) -> None:
    """Refuse settings that the device ("cpu", "cuda") cannot serve. Raises UserError."""
    if config.model.sync_batchnorm and world_size > 1 and device == "cpu":
        raise UserError(
            "model.sync_batchnorm=true needs GPUs, and these ranks are on the CPU: set it to false, "
            "or use one rank"
        )


def few_samples_warning(config: TrainConfig) -> str | None:
    """A line when (B_m + queue) / K < .3: codes are then spread over hundreds of prototypes (method.md
    3-G).
    """
    samples = (config.data.batch_size + config.swav.queue_length) // len(config.groups)
    ratio = samples / config.swav.prototypes
    of = "step" if config.swav.groups == "shared" else "modality"
    if ratio >= 0.3:
        return None
    return (
        f"{samples} samples per {of} (batch and queue) for {config.swav.prototypes} prototypes is a "
        f"ratio of {ratio:.2f}, below .3: codes will be diffuse; raise swav.queue_length or lower "
        f"swav.prototypes"
    )


def _preset_folder() -> Any:
    return resources.files("trainer") / "presets"


def _read_tree(preset: str) -> dict[str, Any]:
    if preset.endswith((".yaml", ".yml")):
        path = Path(preset)
        if not path.is_file():
            raise UserError(f"config file {preset} does not exist")
        text = path.read_text()
    else:
        if preset not in preset_names():
            raise UserError(f"no preset is called {preset!r}: choose from {', '.join(preset_names())}")
        text = (_preset_folder() / f"{preset}.yaml").read_text()
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        raise UserError(f"{preset} is not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"{preset} must hold a mapping of settings")
    return tree


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name}"
    text = first["msg"].removeprefix("Value error, ")
    return f"{name}: {text}" if name else text
