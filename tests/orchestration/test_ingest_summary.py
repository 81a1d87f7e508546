"""The end of `ingest run` tells the truth: what is not converted is said and is not exit code 0."""

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest

from ingest.convert import run_unit
from orchestration import ingest_job
from orchestration.cli import run_app
from orchestration.cli_ingest import build_config
from orchestration.ingest_job import _Conversion, plan_job, run_ingest
from orchestration.ingest_report import status_report, verify_report
from orchestration.ingest_summary import IngestSummary, summary_lines
from orchestration.metrics import Metrics
from shards.commit import release_unit
from shards.errors import UserError
from shards.store import Store
from tests.ingest.files import config, grey, write


@pytest.fixture
def given(tmp_path, monkeypatch):
    """(folder of one source, its settings); the key comes from the environment."""
    monkeypatch.setenv("MEDSWAV_KEY", "ab" * 32)
    write(tmp_path / "s" / "f")
    return tmp_path / "s", config(tmp_path / "s", tmp_path / "out")


def convert(settings):
    job = plan_job(settings, io.StringIO())
    for unit in job.units:
        run_unit(unit, settings, job.pseudonymizer, settings.output, settings.output + "-scratch")
    return job


def test_files_of_a_source_that_is_not_given_are_code_3_until_it_is(given, tmp_path):
    settings = given[1]
    write(tmp_path / "other" / "x", grey(seed=2), number=2)
    plan_job(settings, io.StringIO())  # killed before any unit
    other = config(tmp_path / "other", tmp_path / "out")
    convert(other)
    said = io.StringIO()
    summary = run_ingest(other, stream=said)
    assert summary.exit_code == 3 and summary.waiting == 1 and not summary.interrupted
    assert "1 planned files are not under the given sources" in said.getvalue()
    assert "nothing to do" not in said.getvalue()
    convert(settings)
    assert run_ingest(other, stream=said).exit_code == run_ingest(settings, stream=said).exit_code == 0


def test_verify_says_what_a_killed_run_has_left_to_do(given):
    settings = given[1]
    plan_job(settings, io.StringIO())  # killed before any unit
    clean, text = verify_report(Path(settings.output), False, False)
    assert clean and "1 planned units are not committed: run the same `ingest run` again" in text
    assert json.loads(verify_report(Path(settings.output), False, True)[1])["units_missing"] == 1
    assert status_report(Path(settings.output), False).startswith("units    0 of 1 committed (1 to do")
    convert(settings)
    assert "not committed" not in verify_report(Path(settings.output), False, False)[1]


def test_damaged_files_count_in_the_failure_budget(given):
    source, settings = given
    for number in range(3):
        path = write(source / f"{number}", grey(seed=number), number=number)
        path.write_bytes(path.read_bytes()[:-100])
    convert(settings)
    summary = run_ingest(settings, stream=io.StringIO())
    assert summary.quarantined == {"unreadable": 3} and summary.over_budget and summary.exit_code == 3


def test_a_run_into_a_folder_of_other_files_is_refused_before_anything_is_written(given, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="choose an empty or new folder"):
        run_ingest(given[1], stream=io.StringIO())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_refused_images_with_a_risk_of_text_come_with_the_setting_that_takes_them(given):
    risky = "\n".join(summary_lines(IngestSummary(quarantined={"burned_in_risk": 2}), given[1]))
    assert "may hold names in their pixels" in risky and "`--set allow_burned_in=true`" in risky
    none = "\n".join(summary_lines(IngestSummary(quarantined={"constant": 2}), given[1]))
    assert "allow_burned_in" not in none


def test_a_unit_that_another_driver_released_is_not_called_committed(given):
    settings = given[1]
    job = plan_job(settings, io.StringIO())
    (unit,) = job.units
    release_unit(Store(settings.output), unit.unit)
    result = run_unit(unit, settings, job.pseudonymizer, settings.output, settings.output + "-scratch")
    conversion = _Conversion.__new__(_Conversion)
    conversion._metrics, conversion._summary = Metrics("ingest"), IngestSummary(units=1)
    conversion._count(result)
    assert conversion._summary.failed == {"released": 1} and conversion._summary.exit_code == 3


def test_a_plan_has_no_output(tmp_path):
    assert build_config([tmp_path], None).output == ""


def signalled(number):
    """Stands for a long step in which a signal comes."""

    def step(*given):
        os.kill(os.getpid(), number)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            time.sleep(0.01)
        raise AssertionError("the step went on")

    return step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["take_inventory", "leave_out"])
def test_a_signal_while_sources_are_scanned_or_images_compared_ends_the_run_with_130(
    given, monkeypatch, capsys, step, number
):
    settings = given[1]
    convert(settings)
    monkeypatch.setattr(ingest_job, step, signalled(number))
    before = signal.getsignal(number)
    code = run_app(lambda *_, **__: run_ingest(settings, stream=io.StringIO()).exit_code, "ingest", [])
    assert code == 130 and "the same command continues" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    monkeypatch.setenv("MEDSWAV_KEY", "ab" * 32)
    assert run_ingest(settings, stream=io.StringIO()).exit_code == 0
