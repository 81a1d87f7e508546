"""Classification as a task: any encoder, fully fine-tuned, or as it is under a linear head (`frozen`).

Classes (one of several) or findings (each present or not, some unknown); images or volumes.
`medswav finetune classify` makes the task of a dataset's images with `prepare`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from shards.errors import UserError
from trainer.config import IntensityConfig, check_backbone
from trainer.config_data import Strict
from trainer.downstream.features import Features
from trainer.downstream.finetune import FinetuneConfig
from trainer.downstream.images import AugmentConfig, Found, ImageSource, find_images
from trainer.downstream.splits import patient_classes
from trainer.downstream.tables import read_table
from trainer.downstream.task import Dataset, Random, Sample, Task
from trainer.evaluate import roc
from trainer.evaluate.fractions import rarest_positive
from trainer.export import load_encoder
from trainer.labels import UNKNOWN
from trainer.models.encoders import build_encoder, check_encoder, feature_dim, require_images
from trainer.supervised import label_losses, labelled

Mode = Literal["full", "frozen"]
Images = Callable[[int, Random], NDArray[np.float32]]
_BATCH = 32  # of the features of a frozen encoder
_PIXELS = 32  # px of the baseline without a network


class Config(Strict):
    """`medswav finetune classify`. mode: the whole network is trained, or a linear head on its features.
    backbone, in_channels, size, intensity: of a network with random weights; an encoder file says its own,
    and a backbone that is given must be the file's. size: px of an image; None: the encoder's. features:
    `pixels` are 32 x 32 px and no network, the baseline (mode frozen). threshold: from which score on a
    sample is called positive. cache_bytes: images that stay decoded."""

    mode: Mode = "full"
    features: Literal["encoder", "pixels"] = "encoder"
    backbone: str = ""
    in_channels: Literal[1, 3] = 1
    size: int | None = Field(default=None, ge=8)
    intensity: dict[str, IntensityConfig] = Field(default={"ct": IntensityConfig(mode="recorded")})
    modalities: tuple[str, ...] = ()
    augment: AugmentConfig = AugmentConfig()
    threshold: float = Field(default=roc.THRESHOLD, gt=0, lt=1)
    cache_bytes: int = Field(default=2 << 30, ge=0)
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _known_backbone(self) -> "Config":
        if self.backbone:
            check_backbone(self.backbone, {})
        return self


PRESETS = {
    "small": Config(),
    "full": Config(
        backbone="resnet50w2",
        size=512,
        finetune=FinetuneConfig(epochs=100, batch_size=32, learning_rate=1e-4),
    ),
}


def prepare(config: Config, dataset: str, labels: Sequence[str], encoder: Path | None) -> Task:
    """The task of the labelled images of a dataset. labels: one table (downstream.tables) with a column
    `label`, or `labels` (and `unknown`) of several findings. encoder: an encoder file; None: random weights,
    drawn with finetune.seed. Raises UserError."""
    if len(labels) != 1:
        raise UserError(f"classify takes one label table, not {len(labels)}: give one --labels")
    table = read_table(dataset, labels[0], ["label|labels"])
    field = "label" if "label" in table.column_names else "labels"
    table = table.filter(table[field].is_valid())
    found = find_images(dataset, table, config.modalities)
    classes, values = _values(table, field, found)
    make, size, channels, intensity = _network(config, encoder)
    source = ImageSource(dataset, found, size, channels, intensity, config.cache_bytes)
    splits = {
        part: Labelled(source.split(where, config.augment), values[where], found.patients[where])
        for part in ("train", "val", "test")
        for where in (found.where(part),)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.finetune.seed)  # of random weights that stay as they are
        return classification("classify", splits, classes, make, config.mode, config.threshold)


def example(config: Config, encoder: Path | None) -> Task:
    """The task on noise of the configured shape, two classes: to count what a step takes."""
    make, size, channels, _ = _network(config, encoder)
    random = np.random.default_rng(0)
    n = config.finetune.batch_size
    images = random.random((n, channels, size, size), np.float32)
    parts = {
        part: Labelled(lambda i, _: images[i], np.arange(n) % 2, np.array([f"{part}{i}" for i in range(n)]))
        for part in ("train", "val", "test")
    }
    return classification("classify", parts, ("no", "yes"), make, config.mode, config.threshold)


def case_probability(predictions: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Of each sample: of two classes the second, of more the one that is not the first, of findings any."""
    table = np.stack(predictions)
    if not np.allclose(table.sum(1), 1):
        return np.asarray(1 - np.prod(1 - table, axis=1))
    return np.asarray(1 - table[:, 0] if table.shape[1] > 2 else table[:, 1])


def is_case(target: Any) -> bool:
    """Whether a sample is not of the first class, or has a finding."""
    return bool(np.any(np.asarray(target) > 0))


class Pixels(nn.Module):
    """The baseline without a network: [n, C, H, W] to its mean over 32 x 32 cells, [n, 1024]."""

    feature_dim = _PIXELS**2

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x[:, :1], _PIXELS).flatten(1)


Network = tuple[Callable[[], nn.Module], int, int, Mapping[str, IntensityConfig]]


def _network(config: Config, encoder: Path | None) -> Network:
    """How an encoder is made, px and channels of its images, and their intensities. Raises UserError."""
    if config.features == "pixels":
        if encoder is not None or config.mode != "frozen":
            raise UserError("features=pixels is without a network: give --encoder none and --mode frozen")
        return Pixels, config.size or _PIXELS, 1, config.intensity
    if encoder is None:
        if not config.backbone:
            raise UserError("random weights need a network: --set backbone=resnet-tiny (or resnet50 ...)")
        if config.size is None:
            raise UserError("random weights have no size of images of their own: --set size=64 (px)")
        require_images(config.backbone)
        trial = build_encoder(config.backbone, config.in_channels)
        check_encoder(trial, config.backbone, config.in_channels, [config.size], fix="set another size")
        make = partial(build_encoder, config.backbone, config.in_channels)
        return make, config.size, config.in_channels, config.intensity
    network, info = load_encoder(encoder, config.backbone if ":" in config.backbone else None)
    if config.backbone not in ("", info.backbone):
        raise UserError(
            f"{encoder.name} holds a {info.backbone}, not backbone={config.backbone}: give another encoder, "
            f"or --set backbone={info.backbone}"
        )
    require_images(info.backbone, info.volume is not None)
    assert isinstance(info.size, int)  # px: it takes images
    size = config.size or info.size
    check_encoder(network, info.backbone, info.in_channels, [size], fix="set another size")
    return partial(copy.deepcopy, network), size, info.in_channels, info.intensity


def _values(table: pa.Table, field: str, found: Found) -> tuple[tuple[str, ...], NDArray[Any]]:
    """Classes, those of the training images, sorted; and of each image int64 [n], or int8 [n, C] of 1, 0,
    UNKNOWN. Raises UserError."""
    cells = table[field].to_pylist()
    of_image = [cells[row] for row in found.table.tolist()]
    several = field == "labels"
    each = [set(map(str, cell)) if several else {str(cell)} for cell in of_image]
    trained = set().union(*(each[i] for i in found.where("train").tolist()))
    classes = tuple(sorted(trained))
    if len(classes) < (1 if several else 2):
        raise UserError(f"the training images have {len(classes)} classes: label more of them")
    others = sorted(set().union(*each) - trained)
    if others:
        raise UserError(f"no training image has the label {others[0]!r}, which others have: leave it out")
    if not several:
        return classes, np.array([classes.index(next(iter(one))) for one in each], np.int64)
    unknown = table["unknown"].to_pylist() if "unknown" in table.column_names else None
    values = np.array([[name in one for name in classes] for one in each], np.int8)
    for value, row in zip(values, found.table.tolist(), strict=True):
        for name in (unknown[row] or ()) if unknown is not None else ():
            if name in classes:
                value[classes.index(name)] = UNKNOWN
    return classes, values


@dataclass(frozen=True)
class Labelled:
    """One split: image(i, random) f32 [C, H, W] or [C, Z, Y, X] in [0, 1], with as many channels as the
    encoder takes; labels int64 [n] into the classes, or int8 [n, L] of 1, 0 and UNKNOWN (-1)."""

    image: Images
    labels: NDArray[Any]
    patients: NDArray[np.str_]


class Classifier(nn.Module):
    """An encoder and a linear head: [n, C, ...] to logits [n, classes]."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(feature_dim(encoder), classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


def classification(
    name: str,
    splits: Mapping[str, Labelled],
    classes: Sequence[str],
    encoder: Callable[[], nn.Module],
    mode: Mode = "full",
    threshold: float = roc.THRESHOLD,
    identity: str = "",
) -> Task:
    """The task. splits: train, val, test. encoder(): with its weights, random ones from torch's generator.
    identity: of the encoder's weights and the labels, such as digests of their files.

    frozen: the features are computed once, here, without augmentation, and standardised by a batch norm
    before the head. Metrics: auc (selects), average_precision, accuracy, sensitivity and specificity at the
    threshold, macro; of two classes they are those of the second. Raises UserError for labels that do not
    fit the classes.
    """
    multi = splits["train"].labels.ndim == 2
    for part, given in splits.items():
        _check_labels(name, part, given, len(classes), multi)
    train = splits["train"]
    network: Callable[[], nn.Module] = partial(_classifier, encoder, len(classes))
    data = {part: Dataset(given.patients, partial(_image, given)) for part, given in splits.items()}
    if mode == "frozen":
        fixed = encoder().eval()
        found = {part: _features(fixed, given) for part, given in splits.items()}
        network = partial(_probe, feature_dim(fixed), len(classes))
        data = {p: Dataset(g.patients, partial(_feature, found[p], g)) for p, g in splits.items()}
    strata = rarest_positive if multi else patient_classes
    return Task(
        name=f"{name}, {mode}",
        train=data["train"],
        val=data["val"],
        test=data["test"],
        network=network,
        loss=_loss,
        predict=partial(_probabilities, multi),
        metrics=partial(_metrics, threshold, multi),
        selection="auc",
        strata=strata(train.patients, train.labels),
        identity=identity,
    )


def _check_labels(name: str, part: str, given: Labelled, classes: int, multi: bool) -> None:
    labels = given.labels
    if len(labels) != len(given.patients) or labels.shape[1:] != ((classes,) if multi else ()):
        raise UserError(
            f"{name}: labels {list(labels.shape)} of {part} do not fit {len(given.patients)} samples and "
            f"{classes} classes"
        )
    low, high = (UNKNOWN, 1) if multi else (0, classes - 1)
    if labels.size and not (labels.min() >= low and labels.max() <= high):
        raise UserError(f"{name}: labels of {part} must be {low} to {high}: mend the label table")


def _image(given: Labelled, index: int, random: Random) -> Sample:
    return Sample(given.image(index, random), given.labels[index])


def _feature(features: Features, given: Labelled, index: int, random: Random) -> Sample:
    return Sample(features[index], given.labels[index])


@torch.inference_mode()
def _features(encoder: nn.Module, given: Labelled) -> Features:
    parts = []
    for first in range(0, len(given.labels), _BATCH):
        chosen = range(first, min(first + _BATCH, len(given.labels)))
        images = np.stack([given.image(i, None) for i in chosen])
        parts.append(encoder(torch.from_numpy(images)).float().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, feature_dim(encoder)), np.float32)


def _classifier(encoder: Callable[[], nn.Module], classes: int) -> nn.Module:
    return Classifier(copy.deepcopy(encoder()), classes)


def _probe(features: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(features, affine=False), nn.Linear(features, classes))


def _loss(network: nn.Module, inputs: Tensor, targets: Sequence[Any]) -> Tensor:
    """Cross-entropy, or binary cross-entropy over the known entries; the mean over the samples with a
    label."""
    labels = torch.from_numpy(np.stack(targets)).to(inputs.device)
    losses = label_losses(network(inputs)[None], labels)
    return losses.sum() / labelled(labels).clamp_min(1)


def _probabilities(multi: bool, network: nn.Module, inputs: Tensor) -> list[NDArray[np.float64]]:
    logits = network(inputs).double()
    return list((logits.sigmoid() if multi else logits.softmax(1)).cpu().numpy())


def _metrics(
    threshold: float, multi: bool, predictions: Sequence[NDArray[np.float64]], targets: Sequence[Any]
) -> dict[str, float]:
    scores = np.stack(predictions)
    table = np.stack(targets) if multi else roc.one_vs_rest(np.stack(targets), scores.shape[1])
    if not multi and scores.shape[1] == 2:
        table, scores = table[:, 1:], scores[:, 1:]
    return {kind: roc.macro(metric, table, scores) for kind, metric in roc.metrics_at(threshold).items()}
