"""Classification with any encoder: images, volumes, classes, findings, frozen or not."""

from functools import partial

import numpy as np
import pytest
import torch

from shards.errors import UserError
from trainer.downstream.classify import Labelled, classification
from trainer.downstream.finetune import FinetuneConfig, finetune, metric_curve
from trainer.evaluate import convergence, figures
from trainer.models.encoders import build_encoder


def spots(prefix: str, n: int, seed: int, shape=(24, 24), side=5) -> Labelled:
    """Noise; every second image has a bright square somewhere."""
    random = np.random.default_rng(seed)
    images = random.random((n, 1, *shape), np.float32) * 0.5
    labels = np.arange(n) % 2
    for i in np.flatnonzero(labels):
        y, x = random.integers(0, shape[-1] - side + 1, 2)
        images[i, ..., y : y + side, x : x + side] += 0.4
    patients = np.array([f"{prefix}{i}" for i in range(n)])
    return Labelled(lambda i, stream: images[i], labels.astype(np.int64), patients)


def three(**options) -> dict[str, Labelled]:
    sizes = {"train": 96, "val": 40, "test": 40}
    return {name: spots(name, n, seed, **options) for seed, (name, n) in enumerate(sizes.items())}


def fixed_encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build_encoder("resnet-tiny")


def test_fine_tuning_finds_the_spots_and_its_curve_makes_the_figure(tmp_path):
    one = classification("spots", three(side=6), ("none", "spot"), partial(build_encoder, "resnet-tiny"))
    config = FinetuneConfig(epochs=6, batch_size=16, learning_rate=1e-2)
    result = finetune(one, config, tmp_path / "run")
    assert result.test["auc"] > 0.9
    curve = metric_curve(tmp_path / "run", "auc")
    assert 1 <= convergence.convergence_epoch(curve) <= 6
    png, _ = figures.curves_figure(tmp_path / "curves", {"random": [curve]})
    assert png.exists()


def test_a_frozen_encoder_stays_as_it_is_and_its_head_learns(tmp_path):
    seen = []

    def counted(given):
        return Labelled(lambda i, s: seen.append(s) or given.image(i, s), given.labels, given.patients)

    splits = {name: counted(given) for name, given in three(side=10).items()}
    one = classification("spots", splits, ("none", "spot"), fixed_encoder, "frozen")
    assert len(seen) == 176 and set(seen) == {None}
    result = finetune(one, FinetuneConfig(epochs=5, learning_rate=0.03), tmp_path)
    assert len(seen) == 176  # features were computed once
    assert {name for name, p in one.network().named_parameters()} == {"1.weight", "1.bias"}
    assert result.test["auc"] > 0.9


def test_volumes_go_through_the_3d_network(tmp_path):
    splits = {name: spots(name, 6, s, shape=(4, 16, 16)) for s, name in enumerate(("train", "val", "test"))}
    one = classification("ct", splits, ("none", "bleeding"), partial(build_encoder, "densenet3d"))
    result = finetune(one, FinetuneConfig(epochs=1, batch_size=3), tmp_path)
    assert set(result.test) == {"auc", "average_precision", "accuracy", "sensitivity", "specificity"}
    assert result.n_train == 6


def test_unknown_findings_are_left_out_of_loss_and_metrics():
    images = np.zeros((3, 1, 24, 24), np.float32)
    table = np.array([[1, -1], [0, 1], [-1, -1]], np.int8)
    split = Labelled(lambda i, s: images[i], table, np.array(["a", "b", "c"]))
    one = classification("x", {"train": split, "val": split, "test": split}, ("a", "b"), fixed_encoder)
    network = one.network()
    logits = network.eval()(torch.zeros(2, 1, 24, 24)).double()
    found = one.loss(network, torch.zeros(3, 1, 24, 24), list(table))
    # first image: only its 1; second: both; third: none, and not in the mean
    p = logits[0].sigmoid()
    by_hand = (-p[0].log() + (-(1 - p[0]).log() - p[1].log()) / 2) / 2
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)
    scores = [np.array([0.9, 0.1]), np.array([0.2, 0.1]), np.array([0.99, 0.9])]
    assert one.metrics(scores, list(table))["auc"] == 1  # of the first finding; the second has no negative
    assert one.strata == {"a": 0, "b": 1, "c": -1}


def test_two_classes_are_judged_by_the_second_and_more_by_each():
    split = spots("a", 4, 0)
    one = classification("x", {"train": split, "val": split, "test": split}, ("n", "p"), fixed_encoder)
    scores = [np.array([1 - s, s]) for s in (0.1, 0.7, 0.65, 0.5)]
    found = one.metrics(scores, [0, 1, 0, 1])
    assert (found["auc"], found["accuracy"], found["sensitivity"], found["specificity"]) == (
        0.75,
        0.5,
        0.5,
        0.5,
    )
    more = Labelled(split.image, np.array([0, 1, 2, 2]), split.patients)
    three_classes = classification("x", dict.fromkeys(("train", "val", "test"), more), "abc", fixed_encoder)
    rows = [np.array(r) for r in ((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8), (0.9, 0.05, 0.05))]
    assert three_classes.metrics(rows, [0, 1, 2, 2])["auc"] == pytest.approx((2 / 3 + 1 + 0.5) / 3)


def test_labels_that_do_not_fit_are_refused_in_one_line():
    split = spots("a", 4, 0)
    wrong = Labelled(split.image, np.array([0, 1, 2, 0]), split.patients)
    with pytest.raises(UserError, match="x: labels of val must be 0 to 1: mend the label table"):
        classification("x", {"train": split, "val": wrong, "test": split}, ("n", "p"), fixed_encoder)
    table = Labelled(split.image, np.zeros((4, 3), np.int8), split.patients)
    with pytest.raises(UserError, match=r"labels \[4, 3\] of test do not fit 4 samples and 2 classes"):
        classification("x", {"train": split, "val": split, "test": table}, ("n", "p"), fixed_encoder)
