"""Haemorrhage on head CT (method.md section 7): a label of the volume, five types, slices that show it.

One 3D DenseNet, three losses, each with a weight; of weight 0, its labels are not used. The types and the
slices are auxiliary: the AUC of the volume label is what chooses and what the paper's table shows.

    volume, types   linear on the pooled features (1024) and on the highest and the mean logit of the slices
    slices          linear on maximum and mean in the plane of the last three blocks and of the last map, each
                    slice of a coarser map standing for those that it was pooled from
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from shards.errors import UserError
from shards.ids import digest
from shards.store import file_sha256
from trainer.augment.boxes import BoxAugmentConfig, augmented
from trainer.config_data import Strict
from trainer.downstream.finetune import FinetuneConfig
from trainer.downstream.haemorrhage_data import FINDINGS, TYPES, Heads, Truth, load_heads, truth
from trainer.downstream.task import Dataset, Random, Sample, Task
from trainer.evaluate import roc
from trainer.evaluate.fractions import rarest_positive
from trainer.export import load_strictly, read_encoder
from trainer.labels import UNKNOWN
from trainer.models.densenet3d import DenseNet3d
from trainer.models.encoders import build_encoder

BACKBONE = "densenet3d"
_NAN = float("nan")


class LossWeights(Strict):
    """Of the three losses, each a mean binary cross-entropy over what is known. 0: labels are not used."""

    volume: float = Field(default=1.0, gt=0)
    types: float = Field(default=1.0, ge=0)
    slices: float = Field(default=1.0, ge=0)


class Config(Strict):
    """`medswav finetune haemorrhage`. box: slices, rows and columns. window_hu: centre and width.
    cache_bytes: boxes that stay in memory; others are read again in each epoch."""

    box: tuple[int, int, int] = (40, 224, 192)
    window_hu: tuple[float, float] = (55.0, 200.0)
    modality: str = "ct"
    weights: LossWeights = LossWeights()
    augment: BoxAugmentConfig = BoxAugmentConfig()
    cache_bytes: int = Field(default=4 << 30, ge=0)
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _sizes(self) -> "Config":
        if min(self.box) < 8 or self.window_hu[1] <= 0:
            raise ValueError("box must be 8 or more along each side, and the window's width above 0")
        return self


PRESETS: dict[str, Config] = {
    "small": Config(
        box=(16, 48, 40),
        finetune=FinetuneConfig(epochs=14, patience=0, batch_size=4, learning_rate=2e-3),
    ),
    "full": Config(finetune=FinetuneConfig(epochs=100, patience=20, batch_size=4, learning_rate=3e-4)),
}


class Prediction(NamedTuple):
    """Probabilities: findings f64 [6], slices f64 [Z] of the box."""

    findings: NDArray[np.float64]
    slices: NDArray[np.float64]


class HaemorrhageNet(nn.Module):
    """[n, 1, Z, Y, X] to logits of the findings [n, 6] and of the slices [n, Z]."""

    def __init__(self, encoder: DenseNet3d) -> None:
        super().__init__()
        self.encoder = encoder
        self.findings = nn.Linear(encoder.feature_dim + 2, len(FINDINGS))
        widths = [int(block.width) for block in encoder.blocks][-3:]  # type: ignore[arg-type]
        self.slices = nn.Linear(2 * sum(widths) + encoder.feature_dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps, final = self.encoder.all_maps(x)
        pooled = torch.cat([final.amax((2, 3, 4)), final.mean((2, 3, 4))], dim=1)
        depth = x.shape[2]
        in_plane = []
        for level, one in enumerate([*maps[-3:], final]):
            flat = torch.cat([one.amax((3, 4)), one.mean((3, 4))], dim=1)  # [n, C, Z / 2**level]
            in_plane.append(flat.repeat_interleave(2**level, dim=2)[:, :, :depth])
        slices: Tensor = self.slices(torch.cat(in_plane, dim=1).transpose(1, 2))[..., 0]
        of_slices = torch.stack([slices.amax(1), slices.mean(1)], dim=1)
        findings: Tensor = self.findings(torch.cat([pooled, of_slices], dim=1))
        return findings, slices


def prepare(config: Config, dataset: str, labels: Sequence[str], encoder: Path | None) -> Task:
    """The task of the labelled volumes of a dataset. labels: tables of the volumes and of the slices, see
    haemorrhage_data. encoder: of a densenet3d; None: random weights. Raises UserError."""
    return task_of(config, heads_of(config, dataset, labels), encoder)


def heads_of(config: Config, dataset: str, labels: Sequence[str]) -> Heads:
    """The volumes, to make several tasks of."""
    return load_heads(dataset, labels, config.box, config.window_hu, config.modality, config.cache_bytes)


def task_of(config: Config, heads: Heads, encoder: Path | None) -> Task:
    """The task of these volumes. Raises UserError where a loss has no labels."""
    train = heads.where("train")
    _check_losses(config, heads, train)
    parts = {
        part: Dataset(heads.patients[where], partial(_sample, heads, where, config.augment))
        for part in ("train", "val", "test")
        for where in (heads.where(part),)
    }
    strata = rarest_positive(heads.patients[train], heads.findings[train])
    return _task(config, parts, encoder, strata, heads.identity)


def example(config: Config, encoder: Path | None) -> Task:
    """The task on noise of the configured shape: to count what a step takes."""
    n, depth = config.finetune.batch_size, config.box[0]
    random = np.random.default_rng(0)
    box = random.random((1, *config.box), np.float32)

    def sample(index: int, _: Random) -> Sample:
        found = np.full(len(FINDINGS), index % 2, np.int8)
        slices = np.arange(depth).astype(np.int8) % 2 * (index % 2)
        return Sample(box, truth(found, slices.astype(np.int8), np.eye(depth, dtype=np.float32)))

    parts = {
        part: Dataset(np.array([f"{part}{i}" for i in range(n)]), sample) for part in ("train", "val", "test")
    }
    return _task(config, parts, encoder, {}, "example")


def _task(
    config: Config,
    parts: Mapping[str, Dataset],
    encoder: Path | None,
    strata: Mapping[str, int],
    identity: str,
) -> Task:
    settings = config.model_dump_json(exclude={"finetune", "cache_bytes"})
    network = _network(encoder)
    weights = "random" if encoder is None else file_sha256(encoder)
    return Task(
        name="haemorrhage",
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        network=network,
        loss=partial(loss, config.weights),
        predict=predict,
        metrics=partial(metrics, config.weights),
        selection="auc",
        strata=strata,
        identity=digest(settings, weights, identity),
    )


def loss(weights: LossWeights, network: nn.Module, inputs: Tensor, targets: Sequence[Truth]) -> Tensor:
    """The weighted sum of the three; one without a known label in the batch is 0."""
    findings, slices = network(inputs)
    wanted = torch.from_numpy(np.stack([t.findings for t in targets])).to(inputs.device)
    shown = torch.from_numpy(np.stack([t.box_slices for t in targets])).to(inputs.device)
    known = wanted != UNKNOWN
    total = weights.volume * _mean(findings[:, :1], wanted[:, :1].float(), known[:, :1])
    total = total + weights.types * _mean(findings[:, 1:], wanted[:, 1:].float(), known[:, 1:])
    return total + weights.slices * _mean(slices, shown.nan_to_num(), ~shown.isnan())


def predict(network: nn.Module, inputs: Tensor) -> list[Prediction]:
    findings, slices = (part.double().sigmoid().cpu().numpy() for part in network(inputs))
    return [Prediction(*pair) for pair in zip(findings, slices, strict=True)]


def metrics(
    weights: LossWeights, predictions: Sequence[Prediction], targets: Sequence[Truth]
) -> dict[str, float]:
    """auc and average_precision of the volume label; auc_TYPE, auc_types and average_precision_types (means
    over the types); auc_slices and average_precision_slices, over the slices of all series. nan: what has
    a weight of 0, and a label of one kind only."""
    scores = np.stack([p.findings for p in predictions])
    table = np.stack([t.findings for t in targets])
    aucs, precisions = (roc.per_label(metric, table, scores) for metric in (roc.auc, roc.average_precision))
    found = {"auc": float(aucs[0]), "average_precision": float(precisions[0])}
    typed = weights.types > 0
    found |= {f"auc_{name}": float(v) if typed else _NAN for name, v in zip(TYPES, aucs[1:], strict=True)}
    found["auc_types"] = _mean_of(aucs[1:]) if typed else _NAN
    found["average_precision_types"] = _mean_of(precisions[1:]) if typed else _NAN
    slices = np.concatenate([t.slices for t in targets])
    of_slices = np.concatenate([t.back @ p.slices for t, p in zip(targets, predictions, strict=True)])
    known = slices != UNKNOWN
    judged = weights.slices > 0 and len(np.unique(slices[known])) == 2
    for name, metric in (("auc", roc.auc), ("average_precision", roc.average_precision)):
        found[f"{name}_slices"] = metric(slices[known], of_slices[known]) if judged else _NAN
    return found


def _mean(logits: Tensor, wanted: Tensor, known: Tensor) -> Tensor:
    weight = known.float()
    losses = bce(logits, wanted.where(known, torch.zeros_like(wanted)), weight=weight, reduction="sum")
    return losses / weight.sum().clamp_min(1)


def _mean_of(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else _NAN


def _sample(
    heads: Heads, where: NDArray[np.int64], augment: BoxAugmentConfig, index: int, random: Random
) -> Sample:
    box = heads.box(int(where[index]))
    if random is not None:
        box = augmented(box, augment, random)
    return Sample(box[None], heads.truth(int(where[index])))


def _network(encoder: Path | None) -> Callable[[], nn.Module]:
    """Fresh networks, from the file's weights or random ones. Raises UserError for another architecture."""
    if encoder is None:
        return lambda: HaemorrhageNet(DenseNet3d())
    tensors, info = read_encoder(encoder)
    if info.backbone != BACKBONE or info.in_channels != 1:
        raise UserError(
            f"{encoder.name} holds a {info.backbone} of {info.in_channels} channels, haemorrhage takes a "
            f"{BACKBONE} of one: give the encoder of a 3D pretraining, or none"
        )
    trial = build_encoder(BACKBONE)
    load_strictly(trial, tensors, f"{encoder.name} does not fit {BACKBONE}")
    return lambda: HaemorrhageNet(copy.deepcopy(trial))  # type: ignore[arg-type]


def _check_losses(config: Config, heads: Heads, train: NDArray[np.int64]) -> None:
    """A head whose weight is above 0 has labels to learn from. Raises UserError."""
    some = {
        "types": bool((heads.findings[train, 1:] != UNKNOWN).any()),
        "slices": any(bool((heads.slices[i] != UNKNOWN).any()) for i in train),
    }
    for name, there in some.items():
        if getattr(config.weights, name) > 0 and not there:
            raise UserError(
                f"no training volume has labels of {name}: give them (docs/tasks/haemorrhage.md), or set "
                f"weights.{name}=0"
            )
