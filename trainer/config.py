"""Typed configuration of a pretraining run: one tree, YAML presets, `a.b=c` overrides.

An unknown key is an error; a value is obeyed or refused with the fix, never adjusted (architecture.md,
principle 5). The defaults are Table I of the paper, column 2D.
"""

import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from shards.errors import UserError
from shards.schema import is_volumes
from shards.settings import apply_override
from trainer.config_data import CropConfig as CropConfig
from trainer.config_data import DataConfig as DataConfig
from trainer.config_data import IntensityConfig as IntensityConfig
from trainer.config_data import OrderConfig as OrderConfig
from trainer.config_data import Range as Range
from trainer.config_data import Strict
from trainer.config_data import ViewConfig as ViewConfig
from trainer.config_data import VolumeConfig as VolumeConfig
from trainer.config_objectives import SHARED as SHARED
from trainer.config_objectives import LabelSetConfig as LabelSetConfig
from trainer.config_objectives import SimclrConfig as SimclrConfig
from trainer.config_objectives import SupervisionConfig as SupervisionConfig
from trainer.config_objectives import SwavConfig as SwavConfig
from trainer.preset_files import preset_settings

BackboneOption = bool | int | float | str
Arithmetic = Literal["auto", "bf16", "fp16", "fp32"]

VOLUME_BACKBONES = ("densenet3d",)  # these take [n, C, Z, Y, X], all others [n, C, H, W]
OWN_BACKBONES = (
    *("resnet-tiny", "resnet18", "resnet50", "resnet152", "resnet50w2", "resnet50w4"),
    *VOLUME_BACKBONES,
)
LIBRARIES = ("torchvision", "timm")

EPOCHS = {"queue_start_step": "queue_start_epoch", "freeze_prototypes_steps": "freeze_prototypes_epochs"}
# Two ways to say one thing: of each pair one is given.
_PAIRS = [("max_steps", "max_samples"), *((f"swav.{a}", f"swav.{b}") for a, b in EPOCHS.items())]
ALTERNATIVES = (*_PAIRS, *((b, a) for a, b in _PAIRS))


_OFF = BeforeValidator(lambda value: "off" if value is False else value)  # YAML reads off as false


class ModelConfig(Strict):
    backbone: str = "resnet50"  # one of OWN_BACKBONES, torchvision:NAME, timm:NAME or package.module:function
    backbone_options: dict[str, BackboneOption] = Field(
        default={}
    )  # arguments of a backbone that is not ours
    in_channels: int = Field(default=1, gt=0)  # 1: grey images as they are
    init_weights: str | None = (
        None  # FILE.safetensors, FILE.pth or torchvision:ResNet50_Weights.IMAGENET1K_V2
    )
    init_entry: str = ""  # the entry of a .pth file that holds the tensors, such as state_dict
    init_prefix: str = ""  # what stands before the encoder's names in the file, such as "module."
    init_partial: bool = False  # load what fits, and say what was left out and why
    hidden_dim: int = Field(default=2048, gt=0)  # projection head: Linear-BN-ReLU-Linear
    feature_dim: int = Field(default=128, gt=0)
    sync_batchnorm: Annotated[Literal["off", "node", "global"], _OFF] = "off"  # statistics over which ranks
    activation_checkpointing: bool = False  # less memory, one more forward, the same numbers
    compile: Annotated[Literal["off", "stages"], _OFF] = "off"  # torch.compile of each stage of the backbone

    @model_validator(mode="after")
    def _known_backbone(self) -> "ModelConfig":
        check_backbone(self.backbone, self.backbone_options)
        if self.init_weights is None and (self.init_entry or self.init_prefix or self.init_partial):
            raise ValueError(
                "init_entry, init_prefix and init_partial go with init_weights, which is not set"
            )
        if self.compile != "off" and self.sync_batchnorm != "off":
            raise ValueError("compile=stages is cut to pieces by sync_batchnorm: set one of them to off")
        if self.compile != "off" and self.activation_checkpointing:
            raise ValueError(
                "compile=stages decides itself what is computed once more: set it to off, or "
                "activation_checkpointing to false"
            )
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


class OptimConfig(Strict):
    """`lr_scaling` (method.md 3-D): `none` takes the learning rates as they are, `linear` multiplies both by
    data.batch_size / reference_global_batch (Goyal et al. 2017)."""

    optimizer: Literal["larc-sgd", "adamw"] = "larc-sgd"
    learning_rate: float = Field(default=0.6, gt=0)
    final_learning_rate: float = Field(default=0.0006, ge=0)
    lr_scaling: Literal["none", "linear"] = "none"  # open point D
    reference_global_batch: int = Field(default=256, gt=0)  # open point D
    warmup_steps: int = Field(default=0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-6, ge=0)
    accumulation: int = Field(default=1, gt=0)  # micro-batches of a step, one Sinkhorn over all of them
    larc_trust: float = 0.001
    larc_eps: float = 1e-8


class OnlineConfig(Strict):
    """Evaluation during training, off without labels: kNN and a linear probe on whole images, fitted on the
    train split, AUC on the val split. Changes no loss. See trainer.online."""

    labels: tuple[str, ...] = ()  # names of `ingest label`; each modality is labelled by one of them at most
    every_steps: int = Field(default=500, gt=0)  # a multiple of log_every_steps
    images: int = Field(default=512, gt=1)  # at most, of a modality: to fit on, and as many to evaluate on


class CheckpointConfig(Strict):
    """The disk needs room for one checkpoint more than are kept: an old one goes once the new is verified."""

    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=3, gt=0)  # the newest
    keep_every_steps: int | None = Field(default=None, gt=0)  # and all those of a multiple of so many steps
    async_save: bool = True  # from a copy, while training goes on; false: training waits, needs no copy
    full_disk_saves: int = Field(default=3, gt=0)  # saves in a row that may fail so before the run ends

    @model_validator(mode="after")
    def _saved_at_all(self) -> "CheckpointConfig":
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"keep_every_steps={self.keep_every_steps} is no multiple of every_steps={self.every_steps}: "
                "no checkpoint would be saved at some of these steps"
            )
        return self


class TrainConfig(Strict):
    """The whole run.

    The horizon of the cosine schedule is `max_steps`, or `max_samples`: as many whole batches as they fill
    (method.md 3-F). An epoch is virtual: epoch_samples images, whatever their modality; epoch e begins with
    the first step that begins at or after e * epoch_samples images. Samples and epochs are turned to steps
    here and stored in steps, which is all that anything else reads (method.md 4.9).
    """

    method: Literal["swav", "simclr"] = "swav"
    seed: int = 0
    max_steps: int = Field(default=100_000, gt=0)  # open point F
    max_samples: int | None = Field(default=None, gt=0)  # open point F; instead of max_steps
    epoch_samples: int | None = Field(default=None, gt=0)  # open point F; a virtual epoch
    precision: Arithmetic = "auto"  # auto: bf16 on a GPU (fp16 where it has no bf16), fp32 on a CPU
    threads: int = Field(default=1, gt=0)  # torch threads of a rank on a CPU
    log_every_steps: int = Field(default=10, gt=0)
    gc_every_steps: int = Field(default=100, gt=0)  # Python's garbage is collected on all ranks at once
    data: DataConfig = DataConfig()
    views: ViewConfig = ViewConfig()
    model: ModelConfig = ModelConfig()
    swav: SwavConfig = SwavConfig()
    simclr: SimclrConfig = SimclrConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    online: OnlineConfig = OnlineConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # beside metrics.jsonl, on rank 0

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of images that have a loss of their own: the modalities, or `all`."""
        return self.swav.names(self.data.modalities)

    @model_validator(mode="after")
    def _in_steps(self) -> "TrainConfig":
        batch, swav = self.data.batch_size, self.swav
        if self.max_samples is not None:
            if self.max_samples < batch:
                raise ValueError(f"max_samples={self.max_samples} is less than one batch of {batch}")
            steps = in_steps("max_steps", self, "max_samples", self.max_samples // batch)
            object.__setattr__(self, "max_steps", steps)
        found = {}
        for name, other in EPOCHS.items():
            epochs = getattr(swav, other)
            if epochs is None:
                continue
            if self.epoch_samples is None:
                raise ValueError(
                    f"swav.{other}={epochs:g} needs epoch_samples, the images of a virtual epoch"
                )
            found[name] = in_steps(name, swav, other, math.ceil(epochs * self.epoch_samples / batch), "swav.")
        if found:
            object.__setattr__(self, "swav", swav.model_copy(update=found))
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        self._check_dimensions()
        for one in self.supervision.labels:
            strange = sorted(set(one.modalities) - set(self.data.modalities))
            if strange:
                raise ValueError(
                    f"supervision.labels: {one.name} is for {strange[0]}, which data.modalities does not name"
                )
        self._check_accumulation()
        self._check_simclr() if self.method == "simclr" else self._check_swav()
        if self.optim.warmup_steps > self.max_steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} is more than max_steps={self.max_steps}: "
                "the learning rate would never be reached"
            )
        if self.online.labels and self.online.every_steps % self.log_every_steps:
            raise ValueError(
                f"online.every_steps={self.online.every_steps} is no multiple of "
                f"log_every_steps={self.log_every_steps}: what is found is written with a logged step"
            )
        return self

    def _check_dimensions(self) -> None:
        """Data, views and network are all of images or all of volumes."""
        names, views, backbone = self.data.modalities, self.views, self.model.backbone
        volumes = [name for name in names if is_volumes(name)]
        if volumes and len(volumes) < len(names):
            images = next(name for name in names if not is_volumes(name))
            raise ValueError(
                f"data.modalities mixes volumes ({volumes[0]}) and images ({images}), and a network takes "
                "one of the two: make a run of each"
            )
        if volumes and views.volume is None:
            raise ValueError(
                f"{volumes[0]} holds volumes, and views.crops are cut from images: set views.volume={{}}, or "
                f"data.modalities to their slices, {volumes[0].removesuffix('_volumes')}"
            )
        if views.volume is not None and not volumes:
            raise ValueError(
                f"views.volume is for volumes, and {names[0]} holds images: set data.modalities to volumes "
                f"like {names[0]}_volumes, or views.volume=null"
            )
        self._check_head_crop(volumes)
        if backbone in VOLUME_BACKBONES and not volumes:
            raise ValueError(
                f"model.backbone={backbone} takes volumes, and {names[0]} holds images: choose a network for "
                f"images, or set data.modalities=[{names[0]}_volumes] and views.volume={{}}"
            )
        ours = backbone in OWN_BACKBONES or backbone.partition(":")[0] in LIBRARIES
        if volumes and ours and backbone not in VOLUME_BACKBONES:
            raise ValueError(
                f"model.backbone={backbone} takes images, and {volumes[0]} holds volumes: set it to "
                f"{' or '.join(VOLUME_BACKBONES)}"
            )

    def _check_head_crop(self, volumes: list[str]) -> None:
        """The default threshold of the head crop is in HU: in other units it would cut patients off."""
        given, others = self.views.volume, [name for name in volumes if name != "ct_volumes"]
        if given is not None and others and given.head_crop and "threshold" not in given.model_fields_set:
            raise ValueError(
                f"views.volume.head_crop finds heads by HU, and {others[0]} has none: set "
                "views.volume.head_crop=false, or views.volume.threshold in its units"
            )

    def _check_accumulation(self) -> None:
        parts, share = self.optim.accumulation, self.data.per_modality
        if parts > 1 and self.method == "simclr":
            raise ValueError(
                f"optim.accumulation={parts} goes with method=swav only: NT-Xent compares each image with "
                "all others of the step in one loss, a micro-batch would have fewer negatives. Set it to 1"
            )
        if parts > 1 and self.data.sampling != "equal":
            raise ValueError(
                f"optim.accumulation={parts} cuts a batch into parts with equal shares of each modality, "
                f"and data.sampling is {self.data.sampling}: set one of them to its default"
            )
        if self.data.sampling == "equal" and share % parts:
            raise ValueError(
                f"optim.accumulation={parts} does not divide the {share} images of each modality: use a "
                f"divisor of {share}, or a data.batch_size that is a multiple of "
                f"{len(self.data.modalities) * parts}"
            )

    def _check_simclr(self) -> None:
        _refuse_set("swav", self.swav, "method=simclr")
        crops = self.views.crops
        if [group.count for group in crops] != [2]:
            raise ValueError(
                f"method=simclr compares two crops of one size and would leave others unused: set "
                f"views.crops=[{{count: 2, size: {crops[0].size_text}, share: {list(crops[0].share)}}}]"
            )

    def _check_swav(self) -> None:
        _refuse_set("simclr", self.simclr, "method=swav")
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
        if queue and self.swav.groups == "per-modality" and self.data.sampling != "equal":
            raise ValueError(
                f"a queue for each modality needs equal numbers of them, and data.sampling is "
                f"{self.data.sampling}: set swav.queue_length=0, data.sampling=equal or swav.groups=shared"
            )


def _refuse_set(name: str, section: Strict, because: str) -> None:
    """A section that does not apply is at its defaults: what a user sets is never ignored."""
    default = type(section)()
    for field, value in section:
        if value != getattr(default, field):
            raise ValueError(
                f"{name}.{field}={value} does nothing with {because}: leave the settings {name}.* out "
                f"(--set {name}={{}} drops those of a preset)"
            )


def in_steps(name: str, section: Strict, other: str, steps: int, prefix: str = "") -> int:
    """The steps that `other` comes to. Raises ValueError where `name` is set too, and to something else."""
    if name in section.model_fields_set and getattr(section, name) != steps:
        raise ValueError(
            f"{prefix}{name}={getattr(section, name)} and {prefix}{other}={getattr(section, other):g} (which "
            f"is {steps} steps) do not agree: give exactly one of them"
        )
    return steps


def load_config(preset: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A preset's name (or a YAML file) and `a.b=value` overrides to a config. Raises UserError.

    An override of max_steps takes the place of the preset's max_samples, and so on (ALTERNATIVES).
    """
    tree = preset_settings(preset)
    names = {item.partition("=")[0] for item in overrides}
    for name, other in ALTERNATIVES:
        if name in names and other not in names:
            section, _, leaf = other.rpartition(".")
            inner = tree.get(section) if section else tree
            if isinstance(inner, dict):
                inner.pop(leaf, None)
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
    """Refuse a world size that cannot hold equal parts of a batch (with sampling=equal: of each modality's
    subset) or whole virtual ranks. Raises UserError."""
    virtual = config.data.virtual_ranks
    if virtual is not None and virtual % world_size:
        fitting = [n for n in range(1, virtual + 1) if virtual % n == 0]
        raise UserError(
            f"{world_size} ranks cannot share data.virtual_ranks={virtual} equally: start "
            f"{', '.join(map(str, fitting))} ranks, or begin a run with another data.virtual_ranks"
        )
    if config.data.sampling != "equal":
        if config.data.batch_size % world_size:
            raise UserError(
                f"{world_size} ranks cannot share data.batch_size={config.data.batch_size} equally: use a "
                f"multiple of {world_size}"
            )
        return
    per_modality = config.data.per_modality
    if per_modality % world_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} gives {per_modality} images of each modality, which "
            f"{world_size} ranks cannot share equally: use a batch_size that is a multiple of "
            f"{len(config.data.modalities) * world_size}"
        )
    parts = config.optim.accumulation
    if per_modality // world_size % parts:
        raise UserError(
            f"optim.accumulation={parts} does not divide the {per_modality // world_size} images of each "
            f"modality of a rank: use a batch_size that is a multiple of "
            f"{len(config.data.modalities) * world_size * parts}"
        )


def check_device(config: TrainConfig, device: str) -> None:
    """Refuse settings that the device ("cpu", "cuda") cannot serve. Raises UserError."""
    if config.model.compile == "off":
        return
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        raise UserError(
            "model.compile=stages needs a C++ compiler, and there is none: install g++, or set it to off"
        )
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("model.compile=stages needs triton on a GPU: install it, or set it to off")


def few_samples_warning(config: TrainConfig, rarest: float | None = None) -> str | None:
    """A line when (B_m + queue) / K < .3: codes are then spread over hundreds of prototypes (method.md
    3-G). rarest: images of the rarest modality in a batch, which follow from the dataset where data.sampling
    is not equal; B/M is the most that they can be.
    """
    per_modality = config.swav.groups == "per-modality"
    unequal = per_modality and config.data.sampling != "equal"
    samples = (config.data.batch_size + config.swav.queue_length) // len(config.groups)
    most = "at most " if unequal and rarest is None else ""
    if unequal and rarest is not None:
        samples = int(rarest)
    ratio = samples / config.swav.prototypes
    if ratio >= 0.3 or config.method != "swav":
        return None
    of = ("rarest modality" if unequal else "modality") if per_modality else "step"
    raised = "data.batch_size" if unequal else "swav.queue_length"
    return (
        f"{most}{samples} samples per {of} (batch and queue) for {config.swav.prototypes} prototypes is a "
        f"ratio of {ratio:.2f}, below .3: codes will be diffuse; raise {raised} or lower swav.prototypes"
    )


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name}"
    text = first["msg"].removeprefix("Value error, ")
    return f"{name}: {text}" if name else text
