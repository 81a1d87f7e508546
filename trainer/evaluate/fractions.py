"""Label fractions: nested, stratified subsets of the training patients (100, 50, 25, 10 %), several seeds.

The patients of each stratum are shuffled, and all are put into one order in which every stratum is spread
evenly. A fraction is a beginning of that order: smaller subsets lie in larger ones, each holds the strata
nearly in their proportions, and its size is the fraction of all to the nearest patient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

FRACTIONS = (1.0, 0.5, 0.25, 0.1)
SEEDS = (0, 1, 2, 3, 4)
NEGATIVE = -1  # the stratum of a patient without a positive label

Strata = Mapping[str, int]


@dataclass(frozen=True)
class Subset:
    """samples: indices, ascending; patients: their names, ascending."""

    fraction: float
    seed: int
    patients: tuple[str, ...]
    samples: NDArray[np.int64]


def nested_subsets(
    patients: NDArray[np.str_],
    strata: Strata,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = SEEDS,
    least: int = 1,
) -> list[Subset]:
    """Seed by seed, each in the order of `fractions`.

    patients: [n], of each training sample. strata: patient to stratum, such as its class
    (splits.patient_classes) or `rarest_positive`. least: patients of each stratum that every subset holds;
    where a fraction is less than that, it is that. Raises UserError for a stratum with fewer patients, and
    for fractions that are none.
    """
    wrong = [f for f in fractions if not 0 < f <= 1]
    if wrong:
        raise UserError(f"a label fraction must be above 0 and not above 1, not {wrong[0]:g}")
    there = sorted({str(p) for p in patients})
    members: dict[int, list[str]] = {}
    for patient in there:
        members.setdefault(strata[patient], []).append(patient)
    for stratum, names in members.items():
        if len(names) < least:
            raise UserError(f"label {stratum} has {len(names)} training patients, {least} are needed")
    found = []
    for seed in seeds:
        order = _order(members, seed, least)
        for fraction in fractions:
            count = max(round(fraction * len(there)), least * len(members))
            chosen = sorted(order[:count])
            samples = np.flatnonzero(np.isin(patients, chosen))
            found.append(Subset(fraction, seed, tuple(chosen), samples))
    return found


def rarest_positive(patients: NDArray[np.str_], labels: NDArray[np.int8]) -> dict[str, int]:
    """The stratum of each patient of a table of several labels: of those that a sample of the patient has,
    the one that the fewest patients have (the first on ties); NEGATIVE where it has none.

    labels [n, L]: 1; anything else is not positive.
    """
    names, index = np.unique(patients, return_inverse=True)
    has = np.zeros((len(names), labels.shape[1]), bool)
    np.logical_or.at(has, index, labels == 1)
    by_rarity = np.argsort(has.sum(0), kind="stable")
    first = has[:, by_rarity].argmax(1)
    found = np.where(has.any(1), by_rarity[first], NEGATIVE)
    return {str(name): int(stratum) for name, stratum in zip(names, found, strict=True)}


def check_disjoint(patients: NDArray[np.str_], splits: NDArray[np.str_]) -> None:
    """No patient is in two splits. Raises UserError that names how many are, and which two splits."""
    pairs = np.unique(np.stack([patients.astype(np.str_), splits.astype(np.str_)]), axis=1)
    names, counts = np.unique(pairs[0], return_counts=True)
    twice = names[counts > 1]
    if len(twice):
        of_first = sorted(pairs[1][pairs[0] == twice[0]].tolist())
        raise UserError(
            f"{len(twice)} patients are in two splits (the first in {' and '.join(of_first)}): give every "
            "sample of a patient the same split"
        )


def _order(members: Mapping[int, Sequence[str]], seed: int, least: int) -> list[str]:
    """`least` patients of each stratum, then all others, each stratum spread evenly over them.

    The i-th of n others of a stratum stands at (i + u) / n, u one random number of the stratum.
    """
    places: list[tuple[float, int, str]] = []
    for stratum, names in sorted(members.items()):
        random = np.random.default_rng((seed, stratum - NEGATIVE))
        shuffled = [names[i] for i in random.permutation(len(names))]
        offset, others = float(random.random()), len(names) - least
        places += [(-1.0, stratum, name) for name in shuffled[:least]]
        places += [((i + offset) / others, stratum, n) for i, n in enumerate(shuffled[least:])]
    return [name for _, _, name in sorted(places)]
