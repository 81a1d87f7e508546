"""Classification as a task: any encoder, fully fine-tuned, or as it is under a linear head (`frozen`).

Classes (one of several) or findings (each present or not, some unknown); images or volumes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shards.errors import UserError
from trainer.downstream.features import Features
from trainer.downstream.splits import patient_classes
from trainer.downstream.task import Dataset, Random, Sample, Task
from trainer.evaluate import roc
from trainer.evaluate.fractions import rarest_positive
from trainer.labels import UNKNOWN
from trainer.models.encoders import feature_dim
from trainer.supervised import label_losses, labelled

Mode = Literal["full", "frozen"]
Images = Callable[[int, Random], NDArray[np.float32]]
_BATCH = 32  # of the features of a frozen encoder


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
