"""Alarms: raised by runs that collapse and by no other, once, over when it is over; a resume changes none."""

import csv
import dataclasses
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from orchestration.cluster import StopFlag
from orchestration.metrics import Metrics, observe_alarms
from orchestration.pretrain_job import _Job
from orchestration.pretrain_rank import ControlState
from orchestration.progress import Progress
from orchestration.report_gather import alarm_texts
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import alarms, journal
from trainer.alarms import Alarm, Watch
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.loop import train

LABELLED = (
    Path(os.environ.get("MEDSWAV_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "labelled"
)


class OneImage(FakeBatches):
    """A detector that is dead, or a reader that gives one image again and again."""

    def __call__(self, step: int) -> Batch:
        batch = super().__call__(step)
        return dataclasses.replace(batch, crops=tuple(np.full_like(crop, 128) for crop in batch.crops))


def short(**changes) -> TrainConfig:
    return tiny(**{"max_steps": 30, "log_every_steps": 2, "checkpoint__every_steps": 10, **changes})


def run(
    run_dir: Path, config: TrainConfig, batches: Callable[[int], Batch] | None = None, **more
) -> list[set[str]]:
    """The signs that alarms.jsonl says were raised, for each modality."""
    train(config, batches or FakeBatches(config), run_dir, dataset_fingerprint=FINGERPRINT, **more)
    found = [row for row in journal.read(alarms.alarms_path(run_dir)) if row["event"] == "raised"]
    return [{row["sign"] for row in found if row["modality"] == m} for m in config.groups]


def test_a_run_that_learns_raises_none(tmp_path, caplog):
    assert run(tmp_path, short()) == [set(), set()]
    assert not alarms.alarms_path(tmp_path).exists() and "alarm" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "batches", "expected"),
    [
        ({"swav__epsilon": 1.0}, FakeBatches, "uniform_codes"),
        ({"optim__weight_decay": 100.0}, FakeBatches, "one_point"),
        ({}, OneImage, "one_point"),
    ],
    ids=["epsilon far too high", "weights that vanish", "images all the same"],
)
def test_a_run_that_collapses_raises_the_alarm_within_thirty_steps(tmp_path, changes, batches, expected):
    config = short(**changes)
    assert all(expected in signs for signs in run(tmp_path, config, batches(config)))


@pytest.mark.skipif(not LABELLED.is_dir(), reason="the folder of real test data is absent")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"swav__epsilon": 1.0}, "uniform_codes"),
        ({"optim__weight_decay": 100.0}, "one_point"),
        ({"optim__learning_rate": 30.0, "swav__freeze_prototypes_steps": 0}, "loss_at_chance"),
    ],
    ids=["learns", "epsilon far too high", "weights that vanish", "huge learning rate, nothing frozen"],
)
def test_the_same_on_real_images(tmp_path, changes, expected):
    config = short(
        **{
            "max_steps": 60,
            "log_every_steps": 4,
            "model__hidden_dim": 64,
            "model__feature_dim": 32,
            "swav__queue_length": 0,
            "swav__freeze_prototypes_steps": 20,
            **changes,
        }
    )
    for signs in run(tmp_path, config, real_batches(config)):
        # Sixty steps are few to learn from.
        assert signs <= {"loss_at_chance"} if expected is None else expected in signs


def real_batches(config: TrainConfig) -> Callable[[int], Batch]:
    """Crops of 128 CT slices and 128 X-rays of 24 px, drawn by the step."""
    images = []
    for name in ("ct_covid_ucsd_cropped", "cxr_nih1000_64px"):
        rows = list(csv.DictReader((LABELLED / name / "labels.csv").open()))[:128]
        read = (cv2.imread(str(LABELLED / name / row["file"]), cv2.IMREAD_GRAYSCALE) for row in rows)
        images.append([cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA) for image in read])

    def batch(step: int) -> Batch:
        random = np.random.default_rng(step)
        share = config.data.per_modality
        chosen = [(m, i) for m in (0, 1) for i in random.integers(0, 128, share)]
        crops = []
        for group in config.views.crops:
            corners = random.integers(0, 24 - group.size + 1, (group.count, len(chosen), 2))
            crops.append(
                np.stack(
                    [
                        [
                            images[m][i][y : y + group.size, x : x + group.size]
                            for (m, i), (y, x) in zip(chosen, of_view, strict=True)
                        ]
                        for of_view in corners
                    ]
                )
            )
        keys = tuple(f"{m}-{i}" for m, i in chosen)
        return Batch(step, tuple(crops), config.data.modalities, keys, (0,) * len(keys), {"read": 0.0})

    return batch


def test_an_alarm_is_told_once_and_again_when_it_is_over(tmp_path, caplog):
    """Features are one point while all images are one; then images as they should be."""
    config = short()
    broken, sound = OneImage(config), FakeBatches(config)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, config, lambda step: (broken if step < 7 else sound)(step))
    lines = [r.message for r in caplog.records if "ct" in r.message and "one point" in r.message]
    assert len(lines) == 2
    assert lines[0].startswith("alarm, ct since step 0: features are one point (collapse): lower optim.")
    assert lines[1] == "alarm over at step 12, ct: features are one point (collapse) no more"
    rows = [r for r in journal.read(alarms.alarms_path(tmp_path)) if r["sign"] == "one_point"]
    assert [(r["step"], r["event"], r["since"]) for r in rows if r["modality"] == "ct"] == [
        (4, "raised", 0),
        (12, "over", 0),
    ]
    assert set(lines) <= set(alarm_texts(tmp_path))


def test_a_resumed_run_has_the_alarms_of_one_that_was_not_interrupted(tmp_path):
    config = short(swav__epsilon=1.0)
    run(tmp_path / "straight", config)
    asked = iter(range(100))

    def stop() -> bool:
        return next(asked) == 12  # step 13, after the checkpoint of step 10

    run(tmp_path / "stopped", config, should_stop=stop)
    (tmp_path / "stopped" / "checkpoints" / "step-00000013").rename(tmp_path / "gone")  # back to step 10
    run(tmp_path / "stopped", config)
    texts = [(tmp_path / name / "alarms.jsonl").read_text() for name in ("straight", "stopped")]
    assert texts[0] == texts[1] and texts[0].count("uniform_codes") == 2


def test_the_driver_says_an_alarm_once_though_the_ranks_start_over(tmp_path):
    """It reads along: of a resumed run first what metrics.jsonl holds, then what the ranks tell."""
    config, said, bad = tiny(), [], {"feature_std": 0.01}
    journal.append(journal.journal_path(tmp_path), [row(0, **bad), row(4, **bad)])
    job = _Job(config, tmp_path, Metrics("train"), 3, StopFlag(), said.append, None)
    told = [row(step, **bad) for step in (4, 8, 4, 8, 11)]  # from step 4 on, twice
    job._book(ControlState(steps=[{k: float(v or 0) for k, v in r.items()} for r in told]), Shown())
    assert [line.partition(" (collapse)")[0] for line in said] == [
        "pretrain: alarm, ct since step 0: features are one point"
    ]


class Shown(Progress):
    """A progress line that goes nowhere."""

    def __init__(self) -> None:
        super().__init__("", 1, "", stream=io.StringIO())


def row(step: int, **values: float | None) -> dict[str, float | None]:
    return {"step": step, **{f"m/ct/{name}": value for name, value in values.items()}}


def test_one_odd_batch_raises_nothing_and_a_number_that_is_missing_decides_nothing():
    config = tiny(max_steps=10_000)
    good, bad = {"feature_std": 0.6}, {"feature_std": 0.01}
    flicker = [row(i, **(bad if i % 3 else good)) for i in range(30)]
    assert alarms.alarms(flicker, config) == []
    lost = [row(0, **bad), row(1, **bad), row(2, feature_std=None), row(3), row(4, **bad)]
    (alarm,) = alarms.alarms(lost, config)
    assert (alarm.modality, alarm.sign, alarm.since) == ("ct", "one_point", 0)


def signs_after(config: TrainConfig, steps: range, **values: float) -> dict[str, Alarm]:
    return {a.sign: a for a in alarms.alarms([row(i, **values) for i in steps], config)}


def test_dead_prototypes_and_the_loss_are_judged_only_when_there_was_time_to_learn():
    config = tiny(max_steps=10_000, swav__freeze_prototypes_steps=500, swav__prototypes=300)
    values = {"dead_share": 0.71, "loss_minus_ln_k": 0.0}
    assert signs_after(config, range(0, 490, 4), **values) == {}
    # 16 views a step of each modality: 300 prototypes have had ten each after 188 logged steps, 752 steps.
    found = signs_after(config, range(0, 800, 4), **values)
    assert set(found) == {"dead_prototypes"} and "71% of them" in found["dead_prototypes"].advice
    assert found["dead_prototypes"].since == 752
    found = signs_after(config, range(0, 1100, 4), **values)
    assert found["loss_at_chance"].since == 1036  # ten rows from step 1000 on
    assert "ln K +0.00" in found["loss_at_chance"].advice
    assert signs_after(config, range(0, 1100, 4), dead_share=0.3, loss_minus_ln_k=-0.2) == {}


def test_a_stale_queue_is_told_with_its_age():
    found = signs_after(tiny(), range(0, 12, 4), queue_age_steps=400.0)
    assert "400 steps old" in found["stale_queue"].advice
    assert signs_after(tiny(), range(0, 12, 4), queue_age_steps=60.0) == {}


def test_simclr_at_chance_is_told_in_its_own_words():
    config = tiny(method="simclr", swav={}, views__crops=[{"count": 2, "size": 16}], max_steps=10_000)
    found = signs_after(config, range(0, 1100, 4), loss_minus_chance=-0.01)
    assert "ln(2N - 1) -0.01" in found["loss_at_chance"].advice


def test_every_sign_of_every_modality_has_a_gauge_and_reads_0_when_it_is_over():
    config, metrics = tiny(), Metrics("train")
    watch = Watch(config)

    def gauge(modality: str, sign: str) -> float | None:
        return metrics.value("medswav_train_alarm", modality=modality, sign=sign)

    for step, std in enumerate([0.01] * 3 + [0.6] * 3):
        watch.add(row(step, feature_std=std))
        observe_alarms(metrics, watch)
        assert gauge("ct", "one_point") == (1.0 if 2 <= step < 5 else 0.0)
    assert {gauge(m, s) for m in ("ct", "xr") for s in alarms.SIGNS} == {0.0}
