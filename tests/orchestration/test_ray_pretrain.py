"""G11 in a small form: whatever is killed, the losses go on exactly as without it; jobs tell the truth."""

import contextlib
import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from orchestration.metrics_endpoint import TARGETS_FILE
from tests.batches.make import dataset
from tests.orchestration import jobs
from trainer import checkpoint, journal

pytestmark = pytest.mark.ray
STEPS, EVERY = 80, 10
MEDSWAV = str(jobs.BIN / "medswav")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrain")
    dataset(root / "data", root / "scratch")
    return root / "data"


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    settings = [
        "data.modalities=[ct,us,xr]",
        "data.batch_size=12",
        f"max_steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        "swav.queue_length=24",
        "log_every_steps=1",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    flags += ["--feeders", "1"]
    return ["pretrain", "--dataset", str(data), "--run-dir", str(run_dir), *flags, *more]


def rows(run_dir: Path) -> list[dict[str, float]]:
    return journal.read(journal.journal_path(run_dir))


def losses(run_dir: Path) -> list[float]:
    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(STEPS))
    return [row["loss"] for row in found]


def begun(run_dir: Path, steps: int):
    """A condition: so many steps are done."""
    return lambda: len(rows(run_dir)) >= steps


@pytest.fixture(scope="module")
def undisturbed(data, ray_cluster, tmp_path_factory) -> list[float]:
    """The losses of a run that nothing happened to, but for its twin: two jobs at once on one cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with contextlib.ExitStack() as stack:
        twins = []
        for name in ("one", "two"):
            command = [MEDSWAV, "submit", "--address", ray_cluster.dashboard, "--run-id", name, "--"]
            command += arguments(data, folder / name)
            log = folder / f"{name}.log"
            twins.append((stack.enter_context(jobs.child(command, log, ray_cluster.env)), log))
        for process, log in twins:
            assert process.wait(timeout=jobs.DEADLINE_SECONDS) == 0, log.read_text()
    assert (folder / "one" / "encoder.safetensors").is_file()
    found = losses(folder / "one")
    assert losses(folder / "two") == found
    return found


def test_kills_of_an_actor_a_rank_and_the_driver_change_no_loss(data, undisturbed, ray_cluster, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [MEDSWAV, *arguments(data, run_dir, "--address", ray_cluster.address)]
    with jobs.child(command, log, ray_cluster.env) as process:
        jobs.poll("steps", begun(run_dir, 5), process)
        jobs.kill(one_worker(ray_cluster.root, "ray::Augmenter"))
        jobs.poll("a checkpoint", lambda: checkpoint.list_steps(run_dir), process)
        jobs.kill(one_worker(ray_cluster.root, "ray::RayTrainWorker"))
        jobs.poll("the restart", lambda: "a rank failed" in log.read_text(), process)
        jobs.poll("going on", lambda: "go on from step" in log.read_text(), process)
        before = max(checkpoint.list_steps(run_dir))
        jobs.poll("a new checkpoint", lambda: max(checkpoint.list_steps(run_dir)) > before, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert len(rows(run_dir)) < STEPS
    assert jobs.run(command, log, ray_cluster.env) == 0, log.read_text()
    assert log.read_text().count("go on from step") >= 2
    assert losses(run_dir) == undisturbed


def one_worker(root: int, title: str):
    return jobs.poll(title, lambda: jobs.workers(root, title))[0]


def test_sigterm_saves_a_checkpoint_and_exits_130(data, undisturbed, ray_cluster, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [MEDSWAV, *arguments(data, run_dir)]
    with jobs.child(command, log, jobs.environment()) as process:  # a local Ray of its own
        jobs.poll("steps", begun(run_dir, EVERY + 5), process)
        text = scrape(run_dir)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 130, log.read_text()
    for sample in ('train_loss{modality="ct"}', "loader_queue_depth", "train_checkpoint_timestamp_seconds"):
        assert float(value_of(f"medswav_{sample}", text)) > 0
    done = len(rows(run_dir))
    assert done < STEPS
    assert max(checkpoint.list_steps(run_dir)) == done
    assert "checkpoint saved" in log.read_text()
    assert not (run_dir / TARGETS_FILE).exists()
    command += ["--address", ray_cluster.address]  # and goes on anywhere
    assert jobs.run(command, log, ray_cluster.env) == 0, log.read_text()
    assert losses(run_dir) == undisturbed
    assert jobs.run(command, tmp_path / "again", ray_cluster.env) == 0
    assert "nothing to do" in (tmp_path / "again").read_text()


def value_of(sample: str, text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{sample} ")]
    return line.split()[1]


def scrape(run_dir: Path) -> str:
    (entry,) = json.loads((run_dir / TARGETS_FILE).read_text())
    with urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=10) as response:
        return response.read().decode()


def test_ray_job_submit_fails_when_the_command_fails(data, ray_cluster, tmp_path):
    entrypoint = ["medswav", *arguments(data, tmp_path / "run", "--preset", "nosuch")]
    command = [str(jobs.BIN / "ray"), "job", "submit", "--address", ray_cluster.dashboard, "--", *entrypoint]
    done = subprocess.run(command, env=ray_cluster.env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "no preset is called 'nosuch'" in done.stdout + done.stderr


def test_submit_gives_the_exit_code_of_the_command(data, ray_cluster, tmp_path):
    log = tmp_path / "log"
    command = [MEDSWAV, "submit", "--address", ray_cluster.dashboard, "--retries", "2", "--"]
    given = arguments(data, tmp_path / "run", "--preset", "nosuch")
    assert jobs.run(command + given, log, ray_cluster.env) == 2, log.read_text()
    assert "no preset is called 'nosuch'" in log.read_text()
    submitted = [line for line in log.read_text().splitlines() if line.startswith("job medswav-")]
    assert len(submitted) == 1  # a mistake in the settings is not submitted again


def test_no_cluster_is_one_line_and_code_2(tmp_path):
    log = tmp_path / "log"
    command = [MEDSWAV, "submit", "--address", "http://127.0.0.1:1", "--", "doctor"]
    assert jobs.run(command, log, jobs.environment()) == 2
    assert log.read_text().strip().splitlines()[-1].startswith("error: no Ray job server answers")
