"""Evaluation during training, on frozen features of whole images: kNN and a linear probe, per modality.

A pure function of the weights, the dataset and its labels: there is nothing to save, a resumed run finds the
same numbers, and the training is the same to the last bit. Fitted on images of the train split, judged by
those of the val split; no row of the test split is read.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shards import catalog
from shards.errors import UserError
from shards.tar import ShardReader
from trainer.batches import Modality, rows_of
from trainer.config import TrainConfig
from trainer.downstream.features import Features
from trainer.downstream.knn import knn_auc
from trainer.downstream.linear import standardise
from trainer.downstream.metrics import macro_auc
from trainer.step import is_logged
from trainer.whole import whole_sample, whole_shape

log = logging.getLogger(__name__)
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
BATCH = 64
BATCH_PIXELS = 512 * 512  # of one of them at the most: fewer larger ones, as boxes of volumes are
# Inverse L2 strength, the middle of what trainer.downstream.linear tries; to validate it takes too long here.
PROBE_C = 0.01
PROBE_ITERATIONS = 50


@dataclass(frozen=True)
class Labelled:
    """Of one modality: images uint8 [n, 1, S, S], or boxes [n, 1, Z, Y, X], to fit on and to be judged by,
    labels into `classes`."""

    classes: tuple[str, ...]
    fit_x: Images
    fit_y: Labels
    val_x: Images
    val_y: Labels


def load_labelled(config: TrainConfig) -> dict[str, Labelled]:
    """The modalities that can be evaluated; for the others one line of log.

    Raises UserError for a table that is not there, is not of classes, or when there is no such modality.
    """
    found: dict[str, Labelled] = {}
    reasons = dict.fromkeys(config.data.modalities, "no labels")
    root = config.data.dataset
    for name in config.online.labels:
        table = catalog.labels(root, name)
        if "label" not in table.column_names:
            raise UserError(
                f"online.labels: {name} holds no classes, and online evaluation takes nothing else"
            )
        for modality in config.data.modalities:
            one = _of_modality(config, modality, table)
            if isinstance(one, str):
                reasons[modality] = one if reasons[modality] == "no labels" else reasons[modality]
            elif modality in found:
                raise UserError(
                    f"online.labels names two tables that label {modality}: leave one of them out"
                )
            else:
                found[modality] = one
    left = "; ".join(f"{m}: {why}" for m, why in reasons.items() if m not in found)
    if not found:
        raise UserError(f"online.labels: no modality can be evaluated ({left})")
    if left:
        log.warning("online evaluation leaves out %s", left)
    return found


def _of_modality(config: TrainConfig, modality: str, table: pa.Table) -> Labelled | str:
    """Or why there is none. A table's own column `split` must say the same as the catalogue."""
    parts: dict[str, tuple[Modality, list[str]]] = {}
    own = table["split"].to_pylist() if "split" in table.column_names else [""] * table.num_rows
    for split in ("train", "val"):
        label_of = {
            key: label
            for key, label, said in zip(
                table["key"].to_pylist(), table["label"].to_pylist(), own, strict=True
            )
            if label is not None and said in ("", None, split)
        }
        rows = rows_of(config.data.dataset, modality, split, pa.array(list(label_of), pa.string()))
        rows = _some(rows, config.online.images)
        parts[split] = rows, [label_of[rows.key(i)] for i in range(len(rows))]
    if not any(labels for _, labels in parts.values()):
        return "no labels"
    classes = tuple(sorted(set(parts["train"][1])))
    for split, (_, labels) in parts.items():
        if len(set(labels) & set(classes)) < 2:
            return f"fewer than two classes in its {split} split"
    (fit_x, fit_y), (val_x, val_y) = (_read(config, *part, classes) for part in parts.values())
    return Labelled(classes, fit_x, fit_y, val_x, val_y)


def _some(rows: Modality, most: int) -> Modality:
    """Evenly spaced rows: keys are keyed hashes, so they are a random sample."""
    n = min(most, len(rows))
    return type(rows)(rows.name, rows.table.take(np.arange(n) * len(rows) // max(n, 1)))


def _read(
    config: TrainConfig, rows: Modality, labels: Sequence[str], classes: tuple[str, ...]
) -> tuple[Images, Labels]:
    """Images whose class was seen in the train split, and their labels."""
    known = [i for i, label in enumerate(labels) if label in classes]
    size, reader = config.views.whole_size, ShardReader(config.data.dataset)
    intensity = config.data.intensity_of(rows.name)
    images = np.empty((len(known), 1, *whole_shape(size)), np.uint8)
    for place, i in enumerate(known):
        unit = whole_sample(reader, rows.name, rows.row(i), size, intensity, config.views.volume)
        images[place, 0] = np.rint(255 * unit)
    return images, np.array([classes.index(labels[i]) for i in known], np.int64)


class Online:
    """What rank 0 does every online.every_steps steps, from step 0 (the network as it began) on."""

    def __init__(self, config: TrainConfig, data: dict[str, Labelled], device: torch.device) -> None:
        self._config, self._data, self._device = config, data, device

    def is_due(self, step: int) -> bool:
        """On logged steps only; the last step is one."""
        if not is_logged(step, self._config):
            return False
        return step % self._config.online.every_steps == 0 or step == self._config.max_steps - 1

    def evaluate(self, backbone: nn.Module) -> dict[str, float]:
        """online/<modality>/knn_auc and linear_auc, and online_seconds. The backbone is as before
        afterwards, each module in its own mode."""
        began = time.perf_counter()
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()
        found: dict[str, float] = {}
        try:
            for modality, data in self._data.items():
                fit, val = (features(backbone, x, self._device) for x in (data.fit_x, data.val_x))
                found[f"online/{modality}/knn_auc"] = knn_auc(fit, data.fit_y, val, data.val_y)
                scores = linear_scores(fit, data.fit_y, val, len(data.classes), self._device)
                found[f"online/{modality}/linear_auc"] = macro_auc(data.val_y, scores)
        finally:
            for module, mode in modes:
                module.training = mode
        return found | {"online_seconds": time.perf_counter() - began}


@torch.no_grad()
def features(backbone: nn.Module, images: Images, device: torch.device) -> Features:
    """f32 [n, F] of uint8 [n, 1, S, S] (or boxes [n, 1, Z, Y, X]), in float32 whatever the training
    computes in."""
    channels = next(backbone.parameters()).shape[1]
    parts = []
    batch = max(1, BATCH * BATCH_PIXELS // max(images[0].size, BATCH_PIXELS)) if len(images) else BATCH
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start : start + batch]).to(device).float().div_(255)
        parts.append(backbone(x.expand(-1, channels, *x.shape[2:])).float().cpu().numpy())
    return np.concatenate(parts)


def linear_scores(
    fit_x: Features, fit_y: Labels, val_x: Features, classes: int, device: torch.device
) -> NDArray[np.float64]:
    """Class probabilities [n, classes] of multinomial logistic regression, as trainer.downstream.linear with
    C = PROBE_C: mean cross-entropy + |W|^2 / (2 C n), by L-BFGS in float64 from zero, on the device."""
    x = torch.from_numpy(standardise(fit_x, fit_x)).to(device)
    y = torch.from_numpy(fit_y).to(device)
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, device=device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight + bias, y)
        loss = loss + weight.square().sum() / (2 * PROBE_C * len(y))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        val = torch.from_numpy(standardise(fit_x, val_x)).to(device)
        return torch.softmax(val @ weight + bias, dim=1).cpu().numpy()
