"""Trackers: what they hold is what metrics.jsonl holds, no step twice; nothing leaves the run folder."""

import importlib.util
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import checkpoint, journal, trackers
from trainer.loop import train


def run_with_a_loss_of_the_newest_checkpoint(run_dir: Path, name: str) -> dict[str, dict[int, float]]:
    """Stopped after step 7 and gone on with from step 6; {metric: {step: value}} of the logged rows."""
    config, asked = tiny(trackers=[name], log_every_steps=2), iter(range(1, 100))

    def go(**more: object) -> None:
        train(config, FakeBatches(config), run_dir, dataset_fingerprint=FINGERPRINT, **more)

    go(should_stop=lambda: next(asked) >= 7)
    checkpoint.path_of(run_dir, 7).rename(run_dir / "gone")
    go()
    go()  # complete: nothing is added
    rows = [r for r in journal.read(journal.journal_path(run_dir)) if "m/ct/loss" in r]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 10, 11]
    names = {name for row in rows for name in row if name != "step"}
    return {name: {row["step"]: row[name] for row in rows if row.get(name) is not None} for name in names}


def close_to(found: dict[int, float], expected: dict[int, float]) -> bool:
    return found.keys() == expected.keys() and all(
        math.isclose(found[step], value, rel_tol=1e-6, abs_tol=1e-9) for step, value in expected.items()
    )


def test_tensorboard_holds_every_number_of_every_logged_step_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    expected = run_with_a_loss_of_the_newest_checkpoint(tmp_path, "tensorboard")
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-7])  # as of a process that was killed
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, values in expected.items():
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == sorted(values), name
        assert close_to({event.step: event.value for event in scalars}, values), name
    assert {"step_seconds", "m/ct/dead_share"} <= set(events.Tags()["scalars"])


def test_mlflow_holds_every_number_of_every_logged_step_once(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'medswav[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = run_with_a_loss_of_the_newest_checkpoint(tmp_path, "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("medswav").experiment_id])
    assert run.data.params["swav.prototypes"] == "8" and "data.dataset" not in run.data.params
    for name, values in expected.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert len(history) == len(values)
        assert close_to({metric.step: metric.value for metric in history}, values), name


def log_records(data: bytes) -> Iterator[bytes]:
    """Of a LevelDB log behind a header of 7 bytes, which a .wandb file is."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def test_wandb_is_offline_and_holds_every_number_of_every_logged_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'medswav[wandb]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    expected = run_with_a_loss_of_the_newest_checkpoint(tmp_path, "wandb")
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows = []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    for name, values in expected.items():
        assert close_to({row["_step"]: row[name] for row in rows if name in row}, values), name


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tiny(trackers=["mlflow"])
    with pytest.raises(UserError, match=r"^trackers=mlflow .* pip install 'medswav\[mlflow\]'"):
        train(config, FakeBatches(config), tmp_path, dataset_fingerprint=FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_left_out():
    assert trackers._finite({"step": 3, "a": 1.0, "b": math.nan, "c": None}) == {"a": 1.0}
