"""The demo end to end in one process, without Ray: it runs through, and finds what is done."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingest.config import load_config as load_ingest_config
from ingest.synthetic import build
from orchestration import demo as demo_module
from orchestration import ingest_job, pretrain_job
from orchestration.demo import demo
from orchestration.demo_steps import StepLog
from orchestration.ingest_job import plan_job
from orchestration.ingest_summary import IngestSummary
from orchestration.pretrain_job import PretrainResult
from shards import catalog
from shards.errors import UserError
from shards.ids import load_key
from trainer.batches import BatchMaker
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.prepare import prepare

PATIENTS = 8
OVERRIDES = ("max_steps=4", "data.batch_size=8", "log_every_steps=1", "checkpoint.every_steps=2")


def run_ingest_here(config: Any, **_: Any) -> IngestSummary:
    """orchestration.ingest_job.run_ingest, each unit in this process."""
    from ingest.convert import run_unit

    config = load_ingest_config(json.loads(config.model_dump_json()) | {"sandbox": "inline"})
    job = plan_job(config)
    for unit in job.units:
        run_unit(unit, config, job.pseudonymizer, config.output, Path(config.output).parent / "scratch")
    done, new = len(job.done), len(job.units)
    return IngestSummary(
        units=done + new, already=done, committed=new, samples=catalog.counts(config.output), inputs=1
    )


def pretrain_here(config: TrainConfig, run_dir: Path, *_: Any, **__: Any) -> PretrainResult:
    """orchestration.pretrain_job.pretrain with one rank, in this process."""
    ready = prepare(config, run_dir)
    result = train(
        config, BatchMaker(config, 0, 1, ready.bands), run_dir, dataset_fingerprint=ready.dataset_fingerprint
    )
    return PretrainResult(result.step, result.finished, 0, 0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "source"
    build(folder, PATIENTS, workers=1)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, source: Path) -> Iterator[None]:
    def copy(folder: Path, *_: Any, **__: Any) -> None:
        shutil.copytree(source, folder)

    monkeypatch.setattr(ingest_job, "run_ingest", run_ingest_here)
    monkeypatch.setattr(pretrain_job, "pretrain", pretrain_here)
    monkeypatch.setattr("ingest.synthetic.build", copy)
    yield


def run(folder: Path, **settings: Any) -> int:
    return demo(folder, overrides=OVERRIDES, ranks=1, **settings)


def test_the_demo_runs_through_and_a_second_run_does_nothing_again(
    tmp_path: Path,
    in_process: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "demo"
    assert run(folder, patients=PATIENTS) == 0
    page = (folder / "report.html").read_text()
    first = capsys.readouterr()
    assert "already done" not in first.err and "Report: " in first.out
    for text in ("AUC", "Ultrasound", "Pixel baseline", "burned_in_risk", "effective of", "ln K"):
        assert text in page
    assert str(tmp_path) not in page
    results = (folder / "results.json").read_bytes()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished step was run again")

    monkeypatch.setattr("ingest.synthetic.build", never)
    monkeypatch.setattr(pretrain_job, "pretrain", never)
    monkeypatch.setattr(demo_module.demo_evaluate, "evaluate", never)
    assert run(folder, patients=PATIENTS) == 0
    second = capsys.readouterr().err
    for step in ("[1/6] Generate patients", "[2/6] Ingest", "[4/6] Pretrain", "[5/6] Probe"):
        assert f"{step}: already done" in second
    assert (folder / "results.json").read_bytes() == results


def test_own_files_without_labels_get_a_report_that_says_so(
    tmp_path: Path, in_process: None, source: Path
) -> None:
    folder = tmp_path / "demo"
    assert run(folder, sources=[source]) == 0
    page = (folder / "report.html").read_text()
    assert "no labels were given" in page and "pixels of patients" in page
    assert str(source) not in page


def test_new_labels_redo_the_probe_alone(
    tmp_path: Path, in_process: None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    run(folder, sources=[source])
    monkeypatch.setattr(pretrain_job, "pretrain", None)  # calling it would fail
    run(folder, sources=[source], labels=source / "labels.csv")
    assert json.loads((folder / "results.json").read_text())["scores"]


def test_a_generation_that_was_cut_off_starts_over(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = IngestSummary(interrupted=True)
    monkeypatch.setattr(ingest_job, "run_ingest", lambda *_, **__: interrupted)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "source.partial").mkdir()
    (folder / "source.partial" / "half").write_text("cut")
    (folder / "demo.json").write_text(json.dumps({"source": "generated", "patients": PATIENTS, "seed": 0}))
    assert run(folder, patients=PATIENTS) == 130
    assert not (folder / "source.partial").exists() and not (folder / "source" / "half").exists()


def test_generated_patients_get_the_same_key_each_time_and_own_files_a_secret_one(
    tmp_path: Path, in_process: None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_job, "run_ingest", lambda *_, **__: IngestSummary(interrupted=True))
    keys = []
    for name, sources in (("a", []), ("b", []), ("c", [source]), ("d", [source])):
        run(tmp_path / name, sources=sources, patients=PATIENTS)
        assert (tmp_path / name / "key").stat().st_mode & 0o777 == 0o600
        keys.append(load_key(str(tmp_path / name / "key")))
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_of_another_demo_is_refused(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.json").write_text(json.dumps({"source": "generated", "patients": 96, "seed": 0}))
    with pytest.raises(UserError, match="another source"):
        demo(folder, [source])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "x.csv"}, "--labels goes with --source"),
        ({"sources": ["/nowhere/at/all"]}, "does not exist"),
        ({"overrides": ["nonsense=1"]}, "unknown setting nonsense"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "demo"
    with pytest.raises(UserError, match=message):
        demo(folder, **settings)
    assert not folder.exists()


def test_a_step_that_was_cut_off_is_not_counted_as_done(tmp_path: Path) -> None:
    said: list[str] = []
    log = StepLog(tmp_path, said.append)
    with pytest.raises(KeyboardInterrupt), log.step("Pretrain"):
        raise KeyboardInterrupt
    again = StepLog(tmp_path, said.append)
    assert again.rows() == []
    with again.step("Pretrain") as detail:
        detail.text = "4 steps"
    assert "goes on where it was interrupted" in said[-2]
    assert "after an interruption" in again.rows()[0]["detail"]


def test_a_stopped_training_is_not_counted_as_done_and_says_how_to_go_on(
    tmp_path: Path,
    in_process: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = PretrainResult(2, False, 0, 1.0)
    monkeypatch.setattr(pretrain_job, "pretrain", lambda *_, **__: stopped)
    assert run(tmp_path / "demo", patients=PATIENTS) == 130
    said = capsys.readouterr().err
    assert "[4/6] Pretrain: stopped" in said and "Pretrain: done" not in said
    assert "seconds" not in json.loads((tmp_path / "demo" / "steps.json").read_text())["Pretrain"]
