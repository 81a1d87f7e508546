"""Ingest through Ray: what is killed changes no byte of the dataset."""

import hashlib
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from ingest.synthetic.build import build
from orchestration.metrics import TARGETS_FILE
from shards.ids import create_key
from shards.store import TEMPORARY_PREFIX, Store
from shards.verify import verify
from tests.orchestration import jobs

pytestmark = pytest.mark.ray
INGEST = str(jobs.BIN / "ingest")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated patients below `files`, and a key; about 20 units of 4 files or one series."""
    root = tmp_path_factory.mktemp("sources")
    build(root / "files", patients=4, workers=2)
    create_key(root / "key")
    return root


def command(sources: Path, out: Path, *more: str) -> list[str]:
    settings = ["--set", "unit_files=4", "--workers", "2"]
    return [INGEST, "run", str(sources / "files"), str(out), "--key", str(sources / "key"), *settings, *more]


@pytest.fixture(scope="module")
def undisturbed(sources, ray_cluster, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    given = command(sources, folder / "out", "--address", ray_cluster.address)
    assert jobs.run(given, folder / "log", ray_cluster.env) == 0, (folder / "log").read_text()
    return contents(folder / "out")


def contents(root: Path) -> dict[str, str]:
    """sha256 by name of all that a reader can see; what a killed writer was writing has a temporary name."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(TEMPORARY_PREFIX)]
    assert TARGETS_FILE not in {p.name for p in files}
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def committed(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def test_a_killed_worker_changes_nothing(sources, undisturbed, ray_cluster, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    with jobs.child(command(sources, out, "--address", ray_cluster.address), log, ray_cluster.env) as process:
        jobs.poll("first commits", lambda: committed(out) >= 2, process)
        victims = jobs.poll("a worker", lambda: jobs.workers(ray_cluster.root, "ray::_convert"), process)
        for victim in victims:
            jobs.kill(victim)
        assert process.wait(timeout=jobs.DEADLINE_SECONDS) == 0, log.read_text()
    assert contents(out) == undisturbed
    assert verify(Store(out), deep=True).clean


def test_a_killed_driver_and_a_second_run_change_nothing(sources, undisturbed, tmp_path):
    out, log, env = tmp_path / "out", tmp_path / "log", jobs.environment()
    with jobs.child(command(sources, out), log, env) as process:  # a local Ray of its own
        jobs.poll("first commits", lambda: committed(out) >= 3, process)
        left = jobs.descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        assert committed(out) < len([name for name in undisturbed if name.startswith("commits/")])
        jobs.poll("end of the workers", lambda: not [p for p in left if works(p)])
        for process_left in left:  # Ray's own agents wait a minute for it to come back
            jobs.kill(process_left)
    assert jobs.run(command(sources, out), log, env) == 0, log.read_text()
    assert contents(out) == undisturbed
    assert jobs.run(command(sources, out, "--json"), tmp_path / "again", env) == 0
    assert "nothing to do" in (tmp_path / "again").read_text()


def works(process: psutil.Process) -> bool:
    """Is it a live worker of ours, or a decoder?"""
    try:
        title = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return title.startswith("ray::_convert") or "ingest.sandbox" in title


def test_ctrl_c_is_130_and_the_same_command_goes_on(sources, undisturbed, ray_cluster, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    given = command(sources, out, "--address", ray_cluster.address)
    with jobs.child(given, log, ray_cluster.env) as process:
        jobs.poll("first commits", lambda: committed(out) >= 1, process)
        (entry,) = json.loads((out / TARGETS_FILE).read_text())
        assert entry["labels"]["task"] == "ingest"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    assert "run the same command again" in log.read_text()
    assert jobs.run(given, log, ray_cluster.env) == 0, log.read_text()
    assert contents(out) == undisturbed


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_code_2_and_loses_nothing(sources, undisturbed, ray_cluster, tmp_path):
    small, log = tmp_path / "small", tmp_path / "log"
    small.mkdir()
    mounted = jobs.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], log, dict(os.environ)
    )
    if mounted != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        out = small / "out"
        given = command(sources, out, "--address", ray_cluster.address)
        assert jobs.run(given, log, ray_cluster.env) == 2, log.read_text()
        assert log.read_text().strip().splitlines()[-1].startswith("error: ")
        assert "the disk is full" in log.read_text() and "Traceback" not in log.read_text()
        bigger = ["mount", "-o", "remount,size=100m", str(small)]
        assert jobs.run(bigger, log, dict(os.environ)) == 0
        assert jobs.run(given, log, ray_cluster.env) == 0, log.read_text()
        assert contents(out) == undisturbed
    finally:
        assert jobs.run(["umount", str(small)], log, dict(os.environ)) == 0
