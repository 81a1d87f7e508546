"""Label fractions: whole patients, nested, stratified, the same for the same seed."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from trainer.downstream.splits import patient_classes
from trainer.evaluate.fractions import FRACTIONS, check_disjoint, nested_subsets, rarest_positive


def cohort(counts, images=3):
    """`counts` patients of each stratum with `images` images each, mixed."""
    names = [f"p{s}_{i}" for s, n in enumerate(counts) for i in range(n)]
    patients = np.random.default_rng(0).permutation(np.repeat(names, images))
    return patients, {name: int(name[1 : name.index("_")]) for name in names}


def test_forty_patients_give_4_10_20_and_40_with_their_images_and_one_in_four_positive():
    patients, strata = cohort((30, 10))
    subsets = nested_subsets(patients, strata, seeds=(0, 1))
    assert [(s.seed, s.fraction) for s in subsets] == [(seed, f) for seed in (0, 1) for f in FRACTIONS]
    for one in subsets:
        assert len(one.patients) == round(40 * one.fraction) and len(one.samples) == 3 * len(one.patients)
        assert set(patients[one.samples]) == set(one.patients) and (np.diff(one.samples) > 0).all()
        assert abs(sum(strata[p] for p in one.patients) - 10 * one.fraction) <= 1
    assert subsets[3].patients != subsets[7].patients
    again = nested_subsets(patients[::-1], strata, seeds=(0, 1))
    assert [s.patients for s in again] == [s.patients for s in subsets]


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 5))
def test_smaller_subsets_lie_in_larger_ones_and_hold_every_stratum_in_its_share(counts, seed):
    patients, strata = cohort(counts, 1)
    subsets = nested_subsets(patients, strata, seeds=[seed])
    for larger, smaller in pairwise(subsets):
        assert set(smaller.patients) <= set(larger.patients)
    for one in subsets:
        total = sum(counts)
        assert len(one.patients) == max(round(one.fraction * total), len(counts))
        share = len(one.patients) / total
        for stratum, n in enumerate(counts):
            held = sum(strata[p] == stratum for p in one.patients)
            assert held >= 1 and abs(held - share * n) <= 1 + len(counts)  # one of each is sure


def test_a_subset_holds_as_many_of_each_stratum_as_asked_for():
    patients, strata = cohort((95, 5))
    for one in nested_subsets(patients, strata, fractions=(0.1, 0.02), seeds=(4,), least=3):
        assert sum(strata[p] == 1 for p in one.patients) >= 3
    with pytest.raises(UserError, match="label 1 has 5 training patients, 6 are needed"):
        nested_subsets(patients, strata, least=6)
    with pytest.raises(UserError, match=r"above 0 and not above 1, not 1\.5"):
        nested_subsets(patients, strata, fractions=(1.5,))


def test_classes_of_patients_are_strata():
    patients, strata = cohort((8, 8))
    labels = np.array([strata[p] for p in patients])
    found = nested_subsets(patients, patient_classes(patients, labels), fractions=(0.5,), seeds=(0,))
    assert sorted(strata[p] for p in found[0].patients) == [0] * 4 + [1] * 4


def test_the_stratum_of_a_patient_with_several_labels_is_the_rarest_of_them():
    patients = np.array(["a", "a", "b", "c", "d"])
    labels = np.array([[1, -1], [0, 1], [1, 0], [0, -1], [1, 0]], np.int8)
    assert rarest_positive(patients, labels) == {"a": 1, "b": 0, "c": -1, "d": 0}
    assert nested_subsets(patients, rarest_positive(patients, labels), fractions=(1,), seeds=(0,))


def test_a_patient_in_two_splits_is_refused_in_one_line():
    patients = np.array(["a", "a", "b", "b"])
    check_disjoint(patients, np.array(["train", "train", "val", "val"]))
    with pytest.raises(UserError, match=r"1 patients are in two splits \(the first in train and val\)"):
        check_disjoint(patients, np.array(["train", "train", "train", "val"]))
