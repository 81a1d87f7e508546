"""Confidence intervals by patient: images of one patient are alike, so patients are drawn, not images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """value: of all samples; low, high: percentiles over the draws; draws: of those asked for, the ones that
    gave a number (a draw without a positive has no AUC)."""

    value: float
    low: float
    high: float
    draws: int


def patient_interval(
    metric: Callable[[Indices], float],
    patients: NDArray[np.str_],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron 1979) over patients.

    metric: of the samples with these indices, in which those of a patient come as often as the patient was
    drawn; nan where it is not defined. patients: [n], the patient of each sample. Draws depend on the seed,
    the names of the patients and their samples' order. low and high are nan where no draw gave a number.
    """
    found = [metric(drawn) for drawn in patient_draws(patients, draws=draws, seed=seed)]
    return interval(metric(np.arange(len(patients))), found, level)


def patient_draws(patients: NDArray[np.str_], *, draws: int = 1000, seed: int = 0) -> Iterator[Indices]:
    """The samples of each draw: as many patients as there are, with replacement, and all samples of each.
    Models that are judged on the same samples get the same draws, so that they can be compared draw by
    draw."""
    order, starts, counts = _by_patient(patients)
    random = np.random.default_rng(seed)
    for _ in range(draws):
        drawn = random.integers(len(starts), size=len(starts))
        yield order[_ranges(starts[drawn], counts[drawn])]


def interval(value: float, drawn: Sequence[float], level: float = 0.95) -> Interval:
    """From the values of the draws; nan are left out."""
    found = np.asarray(drawn, np.float64)
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(value, float("nan"), float("nan"), 0)
    tail = (1 - level) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(value, float(low), float(high), len(found))


def _by_patient(patients: NDArray[np.str_]) -> tuple[Indices, Indices, Indices]:
    """Samples ordered by patient, and where each patient's begin in that order and how many they are."""
    if not len(patients):
        raise ValueError("no samples: nothing to draw from")
    order = np.argsort(patients, kind="stable")
    _, starts, counts = np.unique(patients[order], return_index=True, return_counts=True)
    return order, starts, counts


def _ranges(starts: Indices, counts: Indices) -> Indices:
    """start, start + 1, ... of each, `count` of them, one after the other."""
    first = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - first, counts)
