"""Labels and scores to numbers: ROC-AUC, average precision (its mean over labels is the mAP), accuracy,
sensitivity and specificity at a threshold; per label and macro, with missing labels.

AUC and average precision are those of scikit-learn, written with numpy because a bootstrap asks for them
thousands of times (.1 ms instead of 2 on 1000 samples); the tests hold them to scikit-learn's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.evaluate.bootstrap import Indices, patient_interval
from trainer.labels import UNKNOWN

THRESHOLD = 0.6  # of the paper's accuracy
MACRO = "macro"

Labels = NDArray[np.bool_]
Scores = NDArray[np.float64]
Metric = Callable[[ArrayLike, ArrayLike], float]


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """The share of pairs of a positive and a negative in which the positive scores higher; ties count half.

    labels [n]: 1 or 0; scores [n]. nan where there is no positive or no negative.
    """
    positive, score = _checked(labels, scores)
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    _, group, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # from 1 on, the mean rank of those that tie
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """sum_k (recall_k - recall_{k-1}) precision_k over the thresholds from the highest score down; not
    interpolated. nan where there is no positive."""
    positive, score = _checked(labels, scores)
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of each group of equal scores
    found = np.cumsum(positive[order])[last]
    return float(np.sum(np.diff(found, prepend=0) * found / (last + 1)) / positive.sum())


def accuracy(labels: ArrayLike, scores: ArrayLike, threshold: float = THRESHOLD) -> float:
    """The share of samples that are called rightly; from the threshold on a sample is called positive."""
    positive, score = _checked(labels, scores)
    return float(np.mean((score >= threshold) == positive)) if len(score) else float("nan")


def sensitivity(labels: ArrayLike, scores: ArrayLike, threshold: float = THRESHOLD) -> float:
    """The share of positives that are called positive; nan where there is none."""
    positive, score = _checked(labels, scores)
    return float(np.mean(score[positive] >= threshold)) if positive.any() else float("nan")


def specificity(labels: ArrayLike, scores: ArrayLike, threshold: float = THRESHOLD) -> float:
    """The share of negatives that are called negative; nan where there is none."""
    positive, score = _checked(labels, scores)
    return float(np.mean(score[~positive] < threshold)) if not positive.all() else float("nan")


def metrics_at(threshold: float = THRESHOLD) -> dict[str, Metric]:
    """All of them by name."""
    at_threshold = {"accuracy": accuracy, "sensitivity": sensitivity, "specificity": specificity}
    bound = {name: partial(metric, threshold=threshold) for name, metric in at_threshold.items()}
    return {"auc": auc, "average_precision": average_precision, **bound}


def one_vs_rest(classes: ArrayLike, count: int) -> NDArray[np.int8]:
    """Classes int [n] in 0..count-1, or UNKNOWN, as a table of labels int8 [n, count]."""
    given = np.asarray(classes)
    table = (given[:, None] == np.arange(count)).astype(np.int8)
    table[given == UNKNOWN] = UNKNOWN
    return table


def per_label(metric: Metric, labels: ArrayLike, scores: ArrayLike) -> Scores:
    """The metric of each label, f64 [L], over the samples that have it.

    labels [n, L]: 1, 0 or UNKNOWN (-1); scores [n, L]. nan for a label that no sample or every sample has,
    of those where it is known: also an accuracy would say nothing.
    """
    table, score = np.asarray(labels), np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape != score.shape:
        raise ValueError(f"labels {table.shape} and scores {score.shape} must be one [n, L]")
    found = np.full(table.shape[1], np.nan)
    for i in range(table.shape[1]):
        known = table[:, i] != UNKNOWN
        if len(np.unique(table[known, i])) == 2:
            found[i] = metric(table[known, i], score[known, i])
    return found


def macro(metric: Metric, labels: ArrayLike, scores: ArrayLike) -> float:
    """The mean of per_label over the labels that have a number; nan where none has."""
    found = per_label(metric, labels, scores)
    return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")


def table_with_intervals(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: NDArray[np.str_],
    names: Sequence[str],
    *,
    threshold: float = THRESHOLD,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of every metric, of each label and then of MACRO, with intervals by patient.

    label, metric, value, low, high, draws; known, positive: samples. The macro value of a draw is the mean
    over the labels that have a number in that draw.
    """
    table, score = np.asarray(labels), np.asarray(scores, np.float64)
    if len(names) != table.shape[1]:
        raise ValueError(f"{len(names)} names for {table.shape[1]} labels")
    columns = {name: [i] for i, name in enumerate(names)} | {MACRO: list(range(len(names)))}
    rows = []
    for name, chosen in columns.items():
        known, positive = int((table[:, chosen] != UNKNOWN).sum()), int((table[:, chosen] == 1).sum())
        for kind, metric in metrics_at(threshold).items():
            of_label = partial(_macro_of, metric, table[:, chosen], score[:, chosen])
            found = patient_interval(of_label, patients, draws=draws, level=level, seed=seed)
            what = {"label": name, "metric": kind, "known": known, "positive": positive}
            spread = {"low": found.low, "high": found.high, "draws": found.draws}
            rows.append({**what, "value": found.value, **spread})
    return rows


def _macro_of(metric: Metric, table: NDArray[Any], score: Scores, samples: Indices) -> float:
    return macro(metric, table[samples], score[samples])


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[Labels, Scores]:
    label, score = np.asarray(labels), np.asarray(scores, np.float64)
    if label.ndim != 1 or label.shape != score.shape:
        raise ValueError(f"labels {label.shape} and scores {score.shape} must be of one length")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 or 1: leave out the samples whose label is not known")
    if not np.isfinite(score).all():
        raise ValueError("a score is not a finite number")
    return label.astype(bool), score
