"""The figures of a comparison: what is fitted on what, and how they become a table."""

import numpy as np
import pytest

from trainer.downstream.compare import LEAST, draw_labels, judge, less, markdown, summarise

N = 240


def task(distance: float = 2.0):
    """Features, labels, patients of four images, and splits of whole patients."""
    random = np.random.default_rng(0)
    labels = np.arange(N) // 4 % 2
    features = random.standard_normal((N, 6)).astype(np.float32)
    features[:, 0] += distance * labels
    patients = np.array([f"p{i // 4}" for i in range(N)])
    splits = np.array(["train"] * 120 + ["val"] * 40 + ["test"] * 80)
    return features, labels, patients, splits


def test_the_drawn_labels_are_a_share_of_each_class_and_a_smaller_share_is_part_of_a_larger():
    labels = np.array([0] * 100 + [1] * 60 + [2] * 3)
    few, more = draw_labels(labels, 0.1, 7), draw_labels(labels, 0.5, 7)
    assert np.bincount(labels[few]).tolist() == [10, 6, 3]
    assert set(few) < set(more)
    assert draw_labels(labels, 1.0, 7).tolist() == list(range(163))
    assert draw_labels(labels, 0.1, 8).tolist() != few.tolist()
    assert np.bincount(labels[draw_labels(labels, 0.001, 7)]).tolist() == [LEAST, LEAST, 3]


@pytest.mark.parametrize(
    ("fraction", "fitted"), [(1.0, 160), (0.1, 22)]
)  # 6 + 6 of train, LEAST + LEAST of val
def test_the_judgement_fits_the_drawn_labels_of_train_and_val_only(fraction, fitted):
    features, labels, patients, splits = task()
    plain = judge(features, labels, patients, splits, fraction, 3)
    assert (plain["n_fit"], plain["n_judged"]) == (fitted, 80)
    parts = [np.flatnonzero(splits == part) for part in ("train", "val")]
    used = np.concatenate([part[draw_labels(labels[part], fraction, 3)] for part in parts])
    others = np.setdiff1d(np.flatnonzero(splits != "test"), used)
    features[others] = np.nan
    assert judge(features, labels, patients, splits, fraction, 3) == plain


def rows(arm: str, aucs: dict[str, list[float]], fraction: float = 1.0):
    return [
        {"arm": arm, "seed": s, "modality": t[:2], "task": t, "fraction": fraction, "auc": a}
        for t, of in aucs.items()
        for s, a in enumerate(of)
    ]


def test_the_spread_of_a_modality_is_that_of_the_seeds_means_over_its_tasks():
    summary = summarise(rows("swav", {"mr-a": [0.6, 0.8], "mr-b": [0.8, 0.6], "us-a": [0.5, 0.9]}))
    found = {(one["modality"], one["task"]): one["arms"]["swav"] for one in summary}
    assert found["mr", "mean"] == pytest.approx({"mean": 0.7, "min": 0.7, "max": 0.7, "n": 2})
    assert found["us", "us-a"] == pytest.approx({"mean": 0.7, "min": 0.5, "max": 0.9, "n": 2})


def test_gains_over_an_arm_are_taken_seed_by_seed_on_the_same_images():
    both = [*rows("swav", {"mr-a": [0.7, 0.9]}), *rows("random", {"mr-a": [0.6, 0.85]})]
    unmatched = rows("swav", {"us-a": [0.9]})
    gains = less([*both, *unmatched], "random")
    assert [(r["arm"], r["task"], r["seed"]) for r in gains] == [("swav", "mr-a", 0), ("swav", "mr-a", 1)]
    assert markdown(summarise(gains), ["swav"], 1.0, 2, sign="+").splitlines()[2:] == [
        "| mr-a | +0.075 (+0.050 to +0.100) |"
    ]


def test_the_table_has_a_row_a_task_a_mean_of_several_and_a_dash_for_what_is_missing():
    summary = summarise(
        [
            *rows("swav", {"mr-a": [0.6, 0.7], "mr-b": [0.8, 0.7], "us-a": [0.5, 0.9]}),
            *rows("pixels", {"mr-a": [0.65]}),
            *rows("swav", {"mr-a": [0.1]}, fraction=0.1),
        ]
    )
    assert markdown(summary, ["pixels", "swav"], 1.0, 2).splitlines() == [
        "| | pixels | swav |",
        "|---|---|---|",
        "| mr-a | 0.650 (1 of 2 seeds) | 0.650 (0.600 to 0.700) |",
        "| mr-b | - | 0.750 (0.700 to 0.800) |",
        "| **mr, mean** | 0.650 (1 of 2 seeds) | 0.700 |",
        "| us-a | - | 0.700 (0.500 to 0.900) |",
    ]
