"""Ingest through Ray: what is killed changes no byte of the dataset."""

import json
import os
import signal

import psutil
import pytest

from orchestration.metrics_endpoint import TARGETS_FILE
from shards.store import Store
from shards.verify import verify
from tests.orchestration import jobs
from tests.orchestration.jobs import committed, contents

pytestmark = pytest.mark.ray


def test_a_killed_worker_changes_nothing(patients, undisturbed_ingest, ray_cluster, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    given = jobs.ingest(patients, out, "--address", ray_cluster.address)
    with jobs.child(given, log, ray_cluster.env) as process:
        jobs.poll("first commits", lambda: committed(out) >= 2, process)
        victims = jobs.poll("a worker", lambda: jobs.workers(ray_cluster.root, "ray::_convert"), process)
        for victim in victims:
            jobs.kill(victim)
        assert process.wait(timeout=jobs.DEADLINE_SECONDS) == 0, log.read_text()
    assert contents(out) == undisturbed_ingest
    assert verify(Store(out), deep=True).clean


def test_a_killed_driver_and_a_second_run_change_nothing(patients, undisturbed_ingest, tmp_path):
    out, log, env = tmp_path / "out", tmp_path / "log", jobs.environment()
    with jobs.child(jobs.ingest(patients, out), log, env) as process:  # a local Ray of its own
        jobs.poll("first commits", lambda: committed(out) >= 3, process)
        left = jobs.descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        assert committed(out) < jobs.commits_in(undisturbed_ingest)
        jobs.poll("end of the workers", lambda: not [p for p in left if works(p)])
        for process_left in left:  # Ray's own agents wait a minute for it to come back
            jobs.kill(process_left)
    assert jobs.run(jobs.ingest(patients, out), log, env) == 0, log.read_text()
    assert contents(out) == undisturbed_ingest
    assert jobs.run(jobs.ingest(patients, out, "--json"), tmp_path / "again", env) == 0
    assert "nothing to do" in (tmp_path / "again").read_text()


def works(process: psutil.Process) -> bool:
    """Is it a live worker of ours, or a decoder?"""
    try:
        title = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return title.startswith("ray::_convert") or "ingest.sandbox" in title


def test_ctrl_c_is_130_and_the_same_command_goes_on(patients, undisturbed_ingest, ray_cluster, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    given = jobs.ingest(patients, out, "--address", ray_cluster.address)
    with jobs.child(given, log, ray_cluster.env) as process:
        jobs.poll("first commits", lambda: committed(out) >= 1, process)
        (entry,) = json.loads((out / TARGETS_FILE).read_text())
        assert entry["labels"]["task"] == "ingest"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    assert "run the same command again" in log.read_text()
    assert jobs.run(given, log, ray_cluster.env) == 0, log.read_text()
    assert contents(out) == undisturbed_ingest


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_code_2_and_loses_nothing(patients, undisturbed_ingest, ray_cluster, tmp_path):
    small, log = tmp_path / "small", tmp_path / "log"
    small.mkdir()
    mounted = jobs.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], log, dict(os.environ)
    )
    if mounted != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        out = small / "out"
        given = jobs.ingest(patients, out, "--address", ray_cluster.address)
        assert jobs.run(given, log, ray_cluster.env) == 2, log.read_text()
        assert log.read_text().strip().splitlines()[-1].startswith("error: ")
        assert "the disk is full" in log.read_text() and "Traceback" not in log.read_text()
        bigger = ["mount", "-o", "remount,size=100m", str(small)]
        assert jobs.run(bigger, log, dict(os.environ)) == 0
        assert jobs.run(given, log, ray_cluster.env) == 0, log.read_text()
        assert contents(out) == undisturbed_ingest
    finally:
        assert jobs.run(["umount", str(small)], log, dict(os.environ)) == 0
