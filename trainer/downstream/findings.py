"""Findings in radiographs as boxes: an FCOS detector on a pretrained encoder (method.md section 7).

    medswav finetune findings --data DATASET --labels strict --labels any_reader --encoder RUN --output OUT

Each ground truth is a box table (trainer.downstream.box_tables). The first one is trained on and chooses the
best epoch; the network is judged by each. Metrics of the first are called auc, froc (macro over the findings)
and auc/nodule, froc/nodule and so on; those of another are preceded by its name: any_reader:auc.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from shards import catalog
from shards.errors import UserError
from shards.ids import digest
from shards.store import file_sha256
from trainer.config import IntensityConfig
from trainer.config_data import Strict
from trainer.downstream.box_images import MULTIPLE, AugmentConfig, Images, augment
from trainer.downstream.box_tables import BoxTable, keys_of, read_boxes
from trainer.downstream.finetune import FinetuneConfig
from trainer.downstream.task import Dataset, Random, Sample, Task
from trainer.evaluate import froc, roc
from trainer.export import load_encoder
from trainer.models.encoders import build_encoder
from trainer.models.fcos import GROUPS, Fcos
from trainer.rows import NEEDED_COLUMNS

NAME = "findings"


class Config(Strict):
    """findings: the labels to be found; boxes with a label in `ignored` are left out, any other is an error.
    size: longer side of the input, px; "full": the stored pixels. backbone, in_channels: of a random encoder.
    width, convolutions: of the pyramid and the heads. hit: what finds a box, for the fROC: "centre", or the
    least IoU. overlap: IoU above which the worse of two detections is dropped. most: detections of an
    image."""

    findings: tuple[str, ...] = Field(default=("nodule", "pneumothorax"), min_length=1)
    ignored: tuple[str, ...] = ()
    modality: str = "xr"
    size: int | Literal["full"] = 1024
    intensity: IntensityConfig = IntensityConfig()
    backbone: str = "resnet50w2"
    in_channels: int = Field(default=1, ge=1)
    width: int = Field(default=256, gt=0)
    convolutions: int = Field(default=4, gt=0)
    hit: Literal["centre"] | float = "centre"
    overlap: float = Field(default=0.3, gt=0, lt=1)  # findings hardly overlap
    most: int = Field(default=50, gt=0)
    augment: AugmentConfig = AugmentConfig()
    cache_bytes: int = Field(default=2 << 30, ge=0)
    finetune: FinetuneConfig = FinetuneConfig(epochs=50, patience=10, batch_size=8, learning_rate=1e-4)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if isinstance(self.size, int) and (self.size < 128 or self.size % MULTIPLE):
            raise ValueError(f"size is a multiple of {MULTIPLE} px, 128 or more, or full")
        if self.width % GROUPS:
            raise ValueError(f"width is a multiple of {GROUPS}")
        if self.hit != "centre" and not 0 < self.hit <= 1:
            raise ValueError("hit is centre, or an IoU above 0, up to 1")
        if len({*self.findings, *self.ignored}) < len(self.findings) + len(self.ignored):
            raise ValueError("a label is named twice in findings and ignored")
        return self


PRESETS = {
    "small": Config(
        size=128,
        backbone="resnet-tiny",
        width=64,
        convolutions=1,
        finetune=FinetuneConfig(epochs=20, patience=0, batch_size=8, learning_rate=2e-3),
    ),
    "full": Config(),
}


@dataclass(frozen=True)
class Target:
    """Boxes f64 [t, 4] in px of the input and findings int64 [t] of each ground truth, in their order."""

    boxes: tuple[NDArray[np.float64], ...]
    findings: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, eq=False)  # two of them are the same only if they are one: see Matches
class Found:
    """Detections of one image: boxes f64 [d, 4] in px of the input, scores f64 [d], findings int64 [d]."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    findings: NDArray[np.int64]


# What was matched before, by image and then by (truth, finding): a bootstrap asks for the same images again.
Matches = WeakKeyDictionary[Found, dict[tuple[int, int], froc.Matched]]


def prepare(config: Config, dataset: Path | str, labels: Sequence[str], encoder: Path | None) -> Task:
    """The task. labels: ground truths, each a name of labels of the dataset or the path of a CSV by key;
    images that all of them have are used. Splits: of the first table where it gives one, else the
    catalogue's. encoder: of a run; None: randomly initialised. Raises UserError."""
    tables, rows = _tables(config, dataset, labels)
    splits = [tables[0].splits.get(row["key"], row["split"]) for row in rows]
    parts = {}
    for part in ("train", "val", "test"):
        chosen = [row for row, split in zip(rows, splits, strict=True) if split == part]
        parts[part] = _dataset(config, dataset, tables, chosen)
    make, weights = _encoder(config, encoder)
    _network(config, make)  # a network without stages is told now
    train = [row for row, split in zip(rows, splits, strict=True) if split == "train"]
    return Task(
        name=NAME,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        network=partial(_network, config, make),
        loss=loss,
        predict=partial(predict, config),
        metrics=partial(metrics, config, [table.name for table in tables], Matches()),
        selection="auc",
        strata=_strata(tables[0], train),
        identity=digest(
            config.model_dump_json(exclude={"finetune"}), weights, *(table.digest for table in tables)
        ),
    )


def example(config: Config, encoder: Path | None) -> Task:
    """The task on noise of the configured size, a box in every image: to count what a step takes."""
    if isinstance(config.size, str):
        raise UserError("size=full follows the images of a dataset: set size to a number, or give --data")
    make, _ = _encoder(config, encoder)
    side, shape = config.size, (config.in_channels, config.size, config.size)
    box, first = np.array([[0.2, 0.2, 0.3, 0.3]]) * side, np.zeros(1, np.int64)

    def sample(index: int, _: Random) -> Sample:
        image = np.random.default_rng(index).random(shape, np.float32)
        return Sample(image, Target((box,), (first,)))

    train, val, test = (Dataset(np.array([f"{p}{i}" for i in range(8)]), sample) for p in "abc")
    return Task(
        name=NAME,
        train=train,
        val=val,
        test=test,
        network=partial(_network, config, make),
        loss=loss,
        predict=partial(predict, config),
        metrics=partial(metrics, config, ["truth"], Matches()),
        selection="auc",
    )


def loss(network: nn.Module, inputs: Tensor, targets: Sequence[Any]) -> Tensor:
    """Focal, GIoU and centerness loss against the boxes of the first ground truth, added with equal
    weight."""
    assert isinstance(network, Fcos)
    device = inputs.device
    boxes = [torch.from_numpy(target.boxes[0]).float().to(device) for target in targets]
    labels = [torch.from_numpy(target.findings[0]).to(device) for target in targets]
    losses = network.losses(network(inputs), boxes, labels)
    return torch.stack(list(losses.values())).sum()


def predict(config: Config, network: nn.Module, inputs: Tensor) -> list[Found]:
    assert isinstance(network, Fcos)
    shape = (int(inputs.shape[2]), int(inputs.shape[3]))
    found = network.detections(network(inputs), shape, most=config.most, overlap=config.overlap)
    return [
        Found(one.boxes.double().cpu().numpy(), one.scores.double().cpu().numpy(), one.labels.cpu().numpy())
        for one in found
    ]


def metrics(
    config: Config,
    names: Sequence[str],
    known: Matches,
    predictions: Sequence[Found],
    targets: Sequence[Target],
) -> dict[str, float]:
    """auc: image-level; froc: mean sensitivity at the paper's nine rates; of each finding and macro (over the
    findings that have a number), by each ground truth. names: of the ground truths."""
    found = {}
    for number, name in enumerate(names):
        prefix = f"{name}:" if number else ""
        by_finding = matched(config, number, predictions, targets, known)
        auc = {finding: roc.auc(*froc.image_scores(images)) for finding, images in by_finding.items()}
        mean = {finding: froc.froc(images).mean() for finding, images in by_finding.items()}
        for metric, values in (("auc", auc), ("froc", mean)):
            there = [value for value in values.values() if np.isfinite(value)]
            found[f"{prefix}{metric}"] = float(np.mean(there)) if there else float("nan")
            found |= {f"{prefix}{metric}/{finding}": value for finding, value in values.items()}
    return found


def matched(
    config: Config,
    truth: int,
    predictions: Sequence[Found],
    targets: Sequence[Target],
    known: Matches | None = None,
) -> dict[str, list[froc.Matched]]:
    """Of each finding, the images matched against the ground truth of that number: what froc.froc and
    froc.froc_interval take. known: is added to; a detection belongs to the same target in all calls."""
    known = Matches() if known is None else known
    out = {}
    for number, finding in enumerate(config.findings):
        images = []
        for one, target in zip(predictions, targets, strict=True):
            of_image = known.setdefault(one, {})
            if (truth, number) not in of_image:
                mine, its = one.findings == number, target.findings[truth] == number
                boxes = froc.ImageBoxes(target.boxes[truth][its], one.boxes[mine], one.scores[mine])
                of_image[truth, number] = froc.matched([boxes], config.hit)[0]
            images.append(of_image[truth, number])
        out[finding] = images
    return out


def case_probability(predictions: Sequence[Found]) -> NDArray[np.float64]:
    """Of each image its highest score of any finding, 0 without a detection; f64 [n]."""
    return np.array([one.scores.max(initial=0.0) for one in predictions], np.float64)


def is_case(target: Target) -> bool:
    """Whether an image has a finding, by the first ground truth."""
    return len(target.boxes[0]) > 0


def _tables(
    config: Config, dataset: Path | str, labels: Sequence[str]
) -> tuple[list[BoxTable], list[dict[str, Any]]]:
    """The ground truths, and the catalogue rows of the images that all of them have, sorted by key."""
    if not labels:
        raise UserError("findings need a ground truth: name a table of boxes with --labels")
    columns = [*NEEDED_COLUMNS, "patient", "split"]
    rows = catalog.load(dataset, config.modality, columns)
    keys = pa.array(keys_of(dataset, labels[0]), pa.string())
    labelled = rows.filter(pc.is_in(rows["key"], value_set=keys))  # rows of Python objects are large
    samples = {row["key"]: row for row in labelled.to_pylist()}
    tables = [read_boxes(dataset, one, samples, config.findings, config.ignored) for one in labels]
    if len({table.name for table in tables}) < len(tables):
        raise UserError("two ground truths have one name: give each table a name of its own")
    common = set.intersection(*(set(table.boxes) for table in tables))
    return tables, [samples[key] for key in sorted(common)]


def _dataset(
    config: Config, dataset: Path | str, tables: Sequence[BoxTable], rows: Sequence[dict[str, Any]]
) -> Dataset:
    images = Images(dataset, config.modality, rows, config.size, config.intensity, config.cache_bytes)
    places = [images.placement(i) for i in range(len(rows))]
    targets = [
        Target(
            tuple(place.place(table.boxes[row["key"]].places) for table in tables),
            tuple(table.boxes[row["key"]].findings for table in tables),
        )
        for row, place in zip(rows, places, strict=True)
    ]
    patients = np.array([row["patient"] for row in rows], np.str_)
    return Dataset(patients, partial(_sample, config, images, targets))


def _sample(config: Config, images: Images, targets: Sequence[Target], index: int, random: Random) -> Sample:
    image, target = images[index], targets[index]
    if random is not None:
        image, boxes, kept = augment(image, target.boxes[0], random, config.augment)
        target = Target((boxes,), (target.findings[0][kept],))
    return Sample(np.repeat(image[None], config.in_channels, axis=0), target)


def _network(config: Config, make: Callable[[], nn.Module]) -> nn.Module:
    return Fcos(make(), len(config.findings), config.width, config.convolutions)


def _encoder(config: Config, encoder: Path | None) -> tuple[Callable[[], nn.Module], str]:
    """How an encoder is made, and what tells its weights from others. Raises UserError."""
    if encoder is None:
        return partial(build_encoder, config.backbone, config.in_channels), "random"
    pretrained, info = load_encoder(encoder)
    _check_channels(config, info.in_channels)
    return partial(copy.deepcopy, pretrained), file_sha256(encoder)


def _check_channels(config: Config, channels: int) -> None:
    if channels != config.in_channels:
        raise UserError(
            f"the encoder takes {channels} channels, and in_channels={config.in_channels}: set "
            f"in_channels to {channels}"
        )


def _strata(table: BoxTable, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of each training patient: whether any of its images has a finding."""
    strata: dict[str, int] = {}
    for row in rows:
        has = int(len(table.boxes[row["key"]].findings) > 0)
        strata[row["patient"]] = max(has, strata.get(row["patient"], 0))
    return strata
