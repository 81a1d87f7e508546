"""Probes on features whose answer is known; splits that no patient crosses."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from shards import catalog
from shards.commit import commit_unit
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.ids import digest
from shards.store import Store
from tests.shards.make import info, samples
from tests.trainer.fake import tiny
from trainer.downstream import linear, probe, splits
from trainer.downstream.features import extract, pixels
from trainer.downstream.knn import knn_auc, knn_scores
from trainer.downstream.linear import linear_probe_auc
from trainer.downstream.metrics import macro_auc
from trainer.export import encoder_info
from trainer.models.resnet import build_backbone


def blobs(n: int, classes: int, distance: float, seed: int, width: int = 30):
    random = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = random.standard_normal((n, width))
    x[np.arange(n), y] += distance
    return x.astype(np.float32), y.astype(np.int64)


def patients(n: int):
    return np.array([f"p{i // 3}" for i in range(n)])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("width", [30, 400])  # fewer and more features than samples
def test_separable_features_give_auc_one(classes, width):
    train, test = (blobs(150, classes, 12.0, seed, width) for seed in range(2))
    # standardised, 2 telling features are no louder than 398 of noise: 150 samples do not find them fully
    assert linear_probe_auc(*train, *test, patients(150)) > (0.99 if width == 30 else 0.95)
    assert knn_auc(*train, *test) > 0.98


@pytest.mark.parametrize("classes", [2, 3])
def test_noise_gives_auc_one_half(classes):
    train, test = (blobs(900, classes, 0.0, seed) for seed in range(2))
    assert linear_probe_auc(*train, *test, patients(900)) == pytest.approx(0.5, abs=0.06)
    assert knn_auc(*train, *test) == pytest.approx(0.5, abs=0.06)


def test_the_probe_does_not_depend_on_scale_or_offset_of_a_feature():
    train, test = (blobs(120, 2, 1.5, seed) for seed in range(2))
    scale = np.float32(10.0) ** np.arange(-3, 3).repeat(5)
    moved = [(x * scale + 4, y) for x, y in (train, test)]
    assert linear_probe_auc(*moved[0], *moved[1], patients(120)) == pytest.approx(
        linear_probe_auc(*train, *test, patients(120)), abs=0.01
    )


def test_the_strength_of_the_probe_is_chosen_across_patients(monkeypatch):
    seen = []

    def spy(train, labels, test, classes, c):
        seen.append(len(labels))
        return fit(train, labels, test, classes, c)

    fit = linear._fit_scores
    monkeypatch.setattr(linear, "_fit_scores", spy)
    owners = np.array(["a"] * 30 + ["b"] * 30 + ["c"] * 30)
    x, y = blobs(90, 2, 1.0, 0)
    linear_probe_auc(x, y, x, y, owners)
    assert seen[:-1] == [60] * (3 * linear.REPEATS * len(linear.C_GRID)) and seen[-1] == 90


def test_knn_votes_by_cosine_with_exponential_weights():
    train = np.array([[1, 0], [0, 2], [-3, 0]], np.float32)
    scores = knn_scores(train, np.array([0, 1, 0]), np.array([[5, 0]], np.float32), 2, k=2, temperature=0.5)
    e2 = np.exp(2.0)
    np.testing.assert_allclose(scores, [[e2 / (e2 + 1), 1 / (e2 + 1)]], rtol=1e-6)


def test_macro_auc_is_the_mean_of_one_versus_rest():
    labels = np.array([0, 0, 1, 2])
    scores = np.array([[0.9, 0.1, 0], [0.8, 0.1, 0.3], [0.2, 0.7, 0.1], [0.85, 0.2, 0.2]])
    # class 0: 3 of 4 pairs in order; class 1: all; class 2: above 2 of 3
    assert macro_auc(labels, scores) == pytest.approx((0.75 + 1 + 2 / 3) / 3)
    assert np.isnan(macro_auc(np.zeros(3, np.int64), np.ones((3, 2))))


def cohort(n_patients: int = 40, images: int = 3):
    patients = np.repeat([f"p{i:02d}" for i in range(n_patients)], images)
    labels = np.repeat(np.arange(n_patients) % 2, images)
    return patients, labels


@pytest.mark.parametrize("fraction", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_in_two_parts_and_every_part_holds_every_class(seed, fraction):
    patients, labels = cohort()
    part = splits.repeated(patients, labels, seed, fraction=fraction)
    groups = [set(patients[index]) for index in (part.train, part.val, part.test)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert all(set(labels[index]) == {0, 1} for index in (part.train, part.val, part.test))
    assert len(groups[2]) == 20


def test_splits_are_functions_of_the_seed_and_nested_test_sets_do_not_move_with_the_fraction():
    patients, labels = cohort()
    a, b = splits.repeated(patients, labels, 1), splits.repeated(patients, labels, 1, fraction=0.2)
    np.testing.assert_array_equal(a.test, b.test)
    np.testing.assert_array_equal(a.train, splits.repeated(patients, labels, 1).train)
    assert set(a.test) != set(splits.repeated(patients, labels, 2).test)


def test_the_catalogue_protocol_tests_on_the_catalogue_s_test_patients():
    patients, labels = cohort()
    of_patient = np.array(["train"] * 20 + ["val"] * 8 + ["test"] * 12).repeat(3)
    part = splits.catalogue(patients, labels, of_patient, 0)
    assert (of_patient[part.test] == "test").all() and len(part.test) == 36
    assert (of_patient[part.train] == "train").all() and len(set(patients[part.train])) == 16


def test_extract_is_frozen_batched_and_leaves_the_network_as_it_was():
    backbone = build_backbone("resnet-tiny", 3).train()
    images = np.random.default_rng(0).random((5, 1, 16, 16), np.float32)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    together, apart = extract(backbone, images), extract(backbone, images, batch_size=2)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert pixels(images).shape == (5, 32 * 32)


def fake_eval_images(root, modality, size, intensity, split=None):
    """Images with a bright square for label 1; 24 patients of 2; the texture tells random features little."""
    random = np.random.default_rng(len(modality))
    n = 48
    images = random.random((n, 1, size, size)).astype(np.float32) * 0.5
    for i in range(n):
        if i // 2 % 2:
            y, x = random.integers(0, size // 2, 2)
            images[i, 0, y : y + size // 2, x : x + size // 2] += 0.4
    keys = tuple(f"{modality}{i}" for i in range(n))
    patients = [f"{modality}-p{i // 2}" for i in range(n)]
    table = pa.table({"key": list(keys), "patient": patients, "split": ["train"] * 40 + ["test"] * 8})
    return keys, images, table


@pytest.fixture(scope="module")
def evaluation():
    keys = [f"ct{i}" for i in range(48)] + ["xr0", "xr2"]
    labels = pa.table({"key": keys, "label": [f"class{i // 2 % 2}" for i in range(48)] + ["a", "b"]})
    info = encoder_info(tiny(), 12, "madeup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "eval_images", fake_eval_images)
        encoder = (build_backbone("resnet-tiny", 1), info)
        return probe.evaluate("root", labels, [encoder], fractions=(1.0, 0.5))


def test_evaluation_rows_are_tidy_and_complete(evaluation):
    counts = {
        name: sum(row["encoder"] == name for row in evaluation.rows)
        for name in ("pretrained", "random", "pixels")
    }
    each = 3 * 2 * 2  # seeds, fractions, probes
    assert counts == {"pretrained": each, "random": 3 * each, "pixels": each}
    assert all(0 <= row["auc"] <= 1 and row["n_test"] == 24 for row in evaluation.rows)
    assert evaluation.skipped == {"xr": "a class has 1 patients, 4 are needed"}


def test_the_summary_says_what_lies_outside_the_spread():
    def row(encoder, seed, auc):
        names = {"modality": "ct", "probe": "linear", "fraction": 1.0, "encoder_seed": 0}
        return {**names, "encoder": encoder, "seed": seed, "auc": auc}

    rows = [
        row("pretrained", 0, 0.9),
        row("pretrained", 1, 0.8),
        row("random", 0, 0.85),
        row("random", 1, 0.7),
    ]
    (one,) = probe.summarise(rows, {})
    assert one["pretrained"] == {"mean": pytest.approx(0.85), "min": 0.8, "max": 0.9, "n": 2}
    assert one["margin"] == pytest.approx(0.075)
    assert one["outside_spread"] is False and one["every_seed"] is True
    (two,) = probe.summarise([*rows[:3], row("random", 1, 0.7), row("pretrained", 1, 0.86)][::1], {})
    assert two["outside_spread"] is False
    (three,) = probe.summarise([rows[0], row("random", 0, 0.7)], {})
    assert three["outside_spread"] is True


def test_summary_tells_how_much_of_the_test_set_pretraining_saw(evaluation):
    assert {s["probe"] for s in evaluation.summary} == {"linear", "knn"}
    assert all(0.5 < s["seen_in_pretraining"] < 1 and s["patients"] == 24 for s in evaluation.summary)


def test_a_dataset_s_own_images_are_joined_with_its_labels_by_key(tmp_path):
    unit = digest("unit", "labelled")
    store = Store(tmp_path / "root")
    open_or_create(store, info())
    commit_unit(store, unit, samples(unit, "ct", 0, 24), [], tmp_path / "scratch", 24)
    root = str(tmp_path / "root")
    table = catalog.load(root, "ct")
    patients = sorted(set(table["patient"].to_pylist()))
    classes = [f"class{patients.index(p) % 2}" for p in table["patient"].to_pylist()]
    labels = pa.table({"key": table["key"].to_pylist()[:-1], "label": classes[:-1]})
    data = probe.load_labelled(root, "ct", labels, 16, {})
    assert data.images.shape == (23, 1, 16, 16) and data.classes == ("class0", "class1")
    assert [f"class{y}" for y in data.labels] == classes[:-1]
    encoder = (build_backbone("resnet-tiny", 1), encoder_info(tiny(data__modalities=["ct"]), 12, "madeup"))
    found = probe.evaluate(root, labels, [encoder], seeds=(0,), random_seeds=(0,))
    assert {row["encoder"] for row in found.rows} == {"pretrained", "random", "pixels"}


def test_nothing_to_evaluate_is_a_clear_refusal(monkeypatch):
    monkeypatch.setattr(probe, "eval_images", fake_eval_images)
    labels = pa.table({"key": ["ct1"], "label": ["a"]})
    encoder = (build_backbone("resnet-tiny", 1), encoder_info(tiny(), 12, "madeup"))
    with pytest.raises(
        UserError, match="no modality can be evaluated \\(ct: all labels are the same; xr: no labels"
    ):
        probe.evaluate("root", labels, [encoder])
    with pytest.raises(UserError, match="no encoder was given"):
        probe.evaluate("root", labels, [])
