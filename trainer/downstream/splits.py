"""Patient-disjoint splits of labelled samples.

A patient is never in two parts, whatever the protocol. Patients are drawn within their class, so that every
part holds every class.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Protocol = Literal["repeated", "catalogue"]
MIN_PATIENTS = 4  # of each class: 2 in the test half, 1 to train, 1 to validate


@dataclass(frozen=True)
class ProbeSplit:
    """Sample indices, ascending."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def patient_classes(patients: NDArray[np.str_], labels: Labels) -> dict[str, int]:
    """Each patient's most frequent label (the smallest on ties)."""
    return {str(p): int(np.bincount(labels[patients == p]).argmax()) for p in np.unique(patients)}


def repeated(
    patients: NDArray[np.str_],
    labels: Labels,
    seed: int,
    *,
    test_fraction: float = 0.5,
    fraction: float = 1.0,
) -> ProbeSplit:
    """Test on `test_fraction` of the patients; of `fraction` of the others a fifth validates."""
    test, rest = _draw(patient_classes(patients, labels), test_fraction, (seed, 0), leave=2)
    used, _ = _draw(rest, fraction, (seed, 1), least=2)
    val, train = _draw(used, 0.2, (seed, 2), least=1, leave=1)
    return ProbeSplit(_where(patients, train), _where(patients, val), _where(patients, test))


def catalogue(
    patients: NDArray[np.str_], labels: Labels, splits: NDArray[np.str_], seed: int, *, fraction: float = 1.0
) -> ProbeSplit:
    """The catalogue's own split; the seed draws 80 % (times `fraction`) of the training patients."""
    in_train = splits == "train"
    train, _ = _draw(
        patient_classes(patients[in_train], labels[in_train]), 0.8 * fraction, (seed, 0), least=1
    )
    return ProbeSplit(
        _where(patients, train), np.flatnonzero(splits == "val"), np.flatnonzero(splits == "test")
    )


def _draw(
    classes: dict[str, int], fraction: float, key: tuple[int, ...], *, least: int = 1, leave: int = 0
) -> tuple[dict[str, int], dict[str, int]]:
    """Of each class `fraction` of the patients (`least` or more; `leave` or more stay), and the others."""
    taken: dict[str, int] = {}
    for label in sorted(set(classes.values())):
        members = sorted(p for p, c in classes.items() if c == label)
        order = np.random.default_rng((*key, label)).permutation(len(members))
        count = max(least, min(round(fraction * len(members)), len(members) - leave))
        taken.update({members[i]: label for i in order[:count]})
    return taken, {p: c for p, c in classes.items() if p not in taken}


def _where(patients: NDArray[np.str_], chosen: dict[str, int]) -> NDArray[np.int64]:
    return np.flatnonzero(np.isin(patients, sorted(chosen)))
