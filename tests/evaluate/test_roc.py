"""Metrics of labels and scores: against scikit-learn, with missing labels, with intervals by patient."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from trainer.downstream.metrics import macro_auc
from trainer.evaluate import roc
from trainer.evaluate.bootstrap import patient_interval

pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None, database=None)
@given(pairs)
def test_auc_average_precision_and_accuracy_are_scikit_learns_with_many_ties(drawn):
    labels = np.array([a for a, _ in drawn], int)
    scores = np.array([b for _, b in drawn]) / 6
    if labels.any():
        assert roc.average_precision(labels, scores) == pytest.approx(
            sk.average_precision_score(labels, scores)
        )
        assert roc.sensitivity(labels, scores, 0.5) == pytest.approx(sk.recall_score(labels, scores >= 0.5))
    if 0 < labels.sum() < len(labels):
        assert roc.auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))
        assert roc.auc(1 - labels, scores) == pytest.approx(1 - roc.auc(labels, scores))
        assert roc.auc(labels, np.exp(3 * scores)) == pytest.approx(roc.auc(labels, scores))
        found = sk.recall_score(labels, scores >= 0.5, pos_label=0)
        assert roc.specificity(labels, scores, 0.5) == pytest.approx(found)
    assert roc.accuracy(labels, scores, 0.5) == pytest.approx(sk.accuracy_score(labels, scores >= 0.5))


def test_what_cannot_be_computed_is_nan_and_what_is_wrong_is_an_error():
    assert np.isnan(roc.auc([1, 1], [0.2, 0.3])) and np.isnan(roc.average_precision([0, 0], [0.2, 0.3]))
    assert np.isnan(roc.sensitivity([0], [0.2])) and np.isnan(roc.specificity([1], [0.2]))
    with pytest.raises(ValueError, match="0 or 1"):
        roc.auc([1, -1], [0.2, 0.3])
    with pytest.raises(ValueError, match="not a finite number"):
        roc.auc([1, 0], [0.2, np.nan])
    with pytest.raises(ValueError, match="one length"):
        roc.auc([1, 0], [0.2])


def test_missing_labels_are_left_out_label_by_label():
    labels = np.array([[1, 0, 1, -1], [0, -1, 1, -1], [1, 1, 1, 1], [-1, 1, -1, -1]])
    scores = np.array(
        [[0.9, 0.2, 0.5, 0.1], [0.3, 0.9, 0.5, 0.1], [0.2, 0.1, 0.5, 0.1], [0.99, 0.4, 0.5, 0.1]]
    )
    # first: .9 and .2 against .3, half; second: .1 and .4 against .2, half; third and fourth: one kind only
    assert roc.per_label(roc.auc, labels, scores)[:2].tolist() == [0.5, 0.5]
    assert np.isnan(roc.per_label(roc.accuracy, labels, scores)[2:]).all()
    labels[3, 0] = 0
    assert roc.per_label(roc.auc, labels, scores)[0] == 0.25  # .99 is a negative now
    assert roc.macro(roc.auc, labels, scores) == pytest.approx((0.25 + 0.5) / 2)
    assert np.isnan(roc.macro(roc.auc, labels[:, 2:], scores[:, 2:]))


def test_classes_one_against_the_rest_give_the_macro_auc_of_the_probes():
    random = np.random.default_rng(0)
    classes, scores = random.integers(0, 4, 50), random.random((50, 4))
    assert roc.macro(roc.auc, roc.one_vs_rest(classes, 4), scores) == pytest.approx(
        macro_auc(classes, scores)
    )
    assert roc.one_vs_rest([2, -1], 3).tolist() == [[0, 0, 1], [-1, -1, -1]]


def test_a_draw_holds_each_drawn_patient_whole():
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    of = {"a": {1, 4}, "b": {0, 2, 5}, "c": {3}}
    seen = []
    patient_interval(lambda i: float(seen.append(i) or 0), patients, draws=40)
    assert seen[-1].tolist() == [0, 1, 2, 3, 4, 5]  # the value itself
    for drawn in seen[:-1]:
        times = {p: {int(np.sum(drawn == i)) for i in samples} for p, samples in of.items()}
        assert all(len(t) == 1 for t in times.values())
        assert sum(t.pop() for t in times.values()) == 3
    assert len({tuple(s) for s in seen}) > 5


def test_the_interval_of_a_mean_has_the_width_that_theory_says():
    random = np.random.default_rng(1)
    values = random.standard_normal(400)
    alone = patient_interval(lambda i: float(values[i].mean()), np.arange(400).astype(str), draws=800)
    assert (alone.high - alone.low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    # four copies of every image of a patient are no news: the width stays, by image it would be halved
    copies = np.repeat(values, 4)
    owners = np.repeat(np.arange(400), 4).astype(str)
    again = patient_interval(lambda i: float(copies[i].mean()), owners, draws=800)
    assert (again.high - again.low) == pytest.approx(alone.high - alone.low, rel=0.15)


def test_draws_are_those_of_the_seed_and_undefined_ones_are_counted():
    labels, scores = np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3])

    def of(i):
        return roc.auc(labels[i], scores[i])

    patients = np.array(list("abcd"))
    first, again, other = (patient_interval(of, patients, draws=60, seed=s) for s in (0, 0, 1))
    assert first == again and first.value == 1 and 20 < first.draws < 60  # (3/4)^4 hold no positive
    assert other.draws != first.draws or other != first
    none = patient_interval(lambda i: float("nan"), patients, draws=5)
    assert none.draws == 0 and np.isnan(none.low)
    with pytest.raises(ValueError, match="no samples"):
        patient_interval(of, np.array([], str))


def test_the_table_has_every_metric_of_every_label_and_the_macro_row():
    random = np.random.default_rng(2)
    labels = random.integers(-1, 2, (60, 3))
    scores = (0.3 * random.random((60, 3)) + 0.5 * (labels == 1)).clip(0, 1)
    patients = np.array([f"p{i // 2}" for i in range(60)])
    rows = roc.table_with_intervals(labels, scores, patients, ["x", "y", "z"], draws=30)
    assert len(rows) == 4 * 5 and rows[0]["label"] == "x" and rows[0]["metric"] == "auc"
    assert rows[0]["known"] == (labels[:, 0] >= 0).sum() and rows[0]["positive"] == (labels[:, 0] == 1).sum()
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    of_auc = [row["value"] for row in rows if row["metric"] == "auc"]
    assert of_auc[3] == pytest.approx(np.mean(of_auc[:3])) and rows[-1]["label"] == "macro"
    with pytest.raises(ValueError, match="2 names for 3 labels"):
        roc.table_with_intervals(labels, scores, patients, ["x", "y"])
