"""Evaluation during training: it changes no bit of it, sees no test image, and finds what is there."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from shards import catalog
from shards.commit import commit_unit
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.ids import digest
from shards.store import Store
from tests.batches.make import sample
from tests.dist import run_ranks
from tests.shards.make import info
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import checkpoint, journal, online
from trainer.config import TrainConfig
from trainer.downstream.linear import standardise
from trainer.loop import TrainResult, train
from trainer.models.resnet import build_backbone
from trainer.online import Online, linear_scores, load_labelled

SPLITS = ("train",) * 12 + ("val",) * 8 + ("test",) * 6


def striped(number: int) -> np.ndarray:
    """Stripes, across or along by the parity of the number."""
    random = np.random.default_rng(number)
    wave = np.sin(np.arange(48) / 2 + random.uniform(0, 6))[:, None] * np.ones(48)
    wave = wave if number % 2 else wave.T
    return (120 + 80 * wave + random.normal(0, 10, (48, 48))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """CT of two classes that a network tells apart as it begins, in every split; X-rays without a label."""
    folder = tmp_path_factory.mktemp("online")
    store = Store(folder / "root")
    open_or_create(store, info(codec="png16"))
    for modality in ("ct", "xr"):
        unit = digest("unit", modality)
        samples = [sample(unit, modality, n, striped(n), split, "png16") for n, split in enumerate(SPLITS)]
        commit_unit(store, unit, samples, [], folder / "scratch", len(samples))
    keys = [s.row["key"] for s in samples_of("ct")]
    words = ["along" if n % 2 else "across" for n in range(len(keys))]
    catalog.write_labels(store, "stripes", pa.table({"key": keys, "label": words}))
    catalog.write_labels(store, "again", pa.table({"key": keys, "label": words}))
    catalog.write_labels(store, "one", pa.table({"key": keys, "label": ["same"] * len(keys)}))
    catalog.write_labels(store, "several", pa.table({"key": keys, "labels": [[w] for w in words]}))
    own = ["test" if n < 6 else "" for n in range(len(keys))]
    catalog.write_labels(store, "split", pa.table({"key": keys, "label": words, "split": own}))
    return str(folder / "root")


def samples_of(modality: str) -> list:
    return [sample("u", modality, n, striped(n), split, "png16") for n, split in enumerate(SPLITS)]


def config_of(dataset: str, *labels: str, **more: object) -> TrainConfig:
    found = {"labels": list(labels), "every_steps": 4}
    return tiny(**{"data__dataset": dataset, "online": found, "log_every_steps": 2, **more})


def run(run_dir: Path, config: TrainConfig, **options: object) -> TrainResult:
    return train(config, FakeBatches(config), run_dir, dataset_fingerprint=FINGERPRINT, **options)


def found_in(run_dir: Path) -> dict[float, dict[str, float]]:
    rows = journal.read(journal.journal_path(run_dir))
    return {
        r["step"]: {k: v for k, v in r.items() if k.startswith("online/")}
        for r in rows
        if "online_seconds" in r
    }


def test_it_changes_no_bit_of_the_training_and_a_resume_finds_the_same(dataset, tmp_path):
    off, on = config_of(dataset), config_of(dataset, "stripes")
    without = run(tmp_path / "off", off)
    seen: list[dict[str, float]] = []
    with_it = run(tmp_path / "on", on, on_metrics=seen.append)
    assert with_it.losses == without.losses
    saved = [checkpoint.load(tmp_path / name, 12).tensors for name in ("off", "on")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0] | saved[1])
    found = found_in(tmp_path / "on")
    assert list(found) == [0, 4, 8, 11]
    assert all(set(v) == {"online/ct/knn_auc", "online/ct/linear_auc"} for v in found.values())
    assert found[0]["online/ct/linear_auc"] > 0.9  # stripes need no training
    assert [m["step"] for m in seen if "online/ct/knn_auc" in m] == [0, 4, 8, 11]

    asked = iter(range(1, 100))
    run(tmp_path / "again", on, should_stop=lambda: next(asked) >= 5)
    run(tmp_path / "again", on)
    assert found_in(tmp_path / "again") == found


def _rank(rank: int, world: int, dataset: str, run_dir: str) -> list[list[float]]:
    losses = []
    for name, labels in (("off", ()), ("on", ("stripes",))):
        config = config_of(dataset, *labels, max_steps=6)
        own = {"rank": rank, "world": world, "dataset_fingerprint": FINGERPRINT}
        losses.append(train(config, FakeBatches(config, rank, world), Path(run_dir) / name, **own).losses)
    return losses


def test_rank_0_evaluates_and_the_losses_of_all_are_the_same(dataset, tmp_path):
    for off, on in run_ranks(_rank, 2, dataset, str(tmp_path)):
        assert off == on and len(on) == 6
    assert list(found_in(tmp_path / "on")) == [0, 4, 5]


def test_no_image_of_the_test_split_is_read_and_no_more_of_the_others_than_asked_for(dataset, monkeypatch):
    split_of = {s.row["key"]: s.row["split"] for s in samples_of("ct")}
    read: list[str] = []
    real = online.whole_sample

    def spy(reader, modality, row, *more):
        read.append(row["key"])
        return real(reader, modality, row, *more)

    monkeypatch.setattr(online, "whole_sample", spy)
    data = load_labelled(config_of(dataset, "stripes"))["ct"]
    assert sorted(split_of[key] for key in read) == ["train"] * 12 + ["val"] * 8
    assert (len(data.fit_x), len(data.val_x), data.classes) == (12, 8, ("across", "along"))
    read.clear()
    few = {"labels": ["stripes"], "images": 5, "every_steps": 4}
    load_labelled(config_of(dataset, online=few))
    assert len(read) == 10
    read.clear()  # the table's own split says test of six training images
    load_labelled(config_of(dataset, "split"))
    assert sorted(split_of[key] for key in read) == ["train"] * 6 + ["val"] * 8


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["nothing"], "has no labels 'nothing'"),
        (["several"], "several holds no classes"),
        (["stripes", "again"], "two tables that label ct"),
        (
            ["one"],
            r"no modality can be evaluated \(ct: fewer than two classes in its train split; xr: no labels",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(dataset, tmp_path, labels, text):
    with pytest.raises(UserError, match=text):
        run(tmp_path, config_of(dataset, *labels))
    assert not journal.read(journal.journal_path(tmp_path))


def test_steps_that_are_not_logged_are_refused():
    with pytest.raises(ValueError, match=r"every_steps=5 is no multiple of log_every_steps=2"):
        tiny(online={"labels": ["a"], "every_steps": 5}, log_every_steps=2)


def test_every_module_keeps_its_own_mode(dataset):
    config = config_of(dataset, "stripes")
    backbone = build_backbone("resnet-tiny", 1)
    frozen = next(m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    modes = [module.training for module in backbone.modules()]
    values = Online(config, load_labelled(config), torch.device("cpu")).evaluate(backbone)
    assert [module.training for module in backbone.modules()] == modes and not frozen.training
    assert set(values) == {"online/ct/knn_auc", "online/ct/linear_auc", "online_seconds"}


@pytest.mark.parametrize(("classes", "width"), [(2, 10), (3, 80)])
def test_the_linear_probe_is_logistic_regression(classes, width):
    random = np.random.default_rng(0)
    y = np.arange(60) % classes
    x = random.standard_normal((60, width)).astype(np.float32) + y[:, None] * random.standard_normal(
        width
    ).astype("f4")
    other = random.standard_normal((20, width)).astype(np.float32)
    found = linear_scores(x, y, other, classes, torch.device("cpu"))
    # scikit-learn has one vector of weights for two classes, where the pair of ours has half its penalty
    c = online.PROBE_C * (2 if classes == 2 else 1)
    model = LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit(standardise(x, x), y)
    assert np.abs(found - model.predict_proba(standardise(x, other))).max() < 1e-4
