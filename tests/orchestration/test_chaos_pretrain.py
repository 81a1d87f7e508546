"""G11 in full: kill -9 of ranks, augmentation actors, the driver and whole nodes at 20 random steps.

Three raylets are three nodes (a head without CPUs, with the driver; one rank on each of the others). Every
loss of the disturbed run is compared (==) with that of a run to which nothing happened, so the 50 steps after
each kill are. `MEDSWAV_CHAOS_SEED` draws other steps, `MEDSWAV_CHAOS_EACH` is
the number of kills of each kind; `pytest -m chaos -rP` prints what happened.
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.batches.make import dataset
from tests.orchestration import jobs
from tests.orchestration.conftest import free_ports
from tests.orchestration.test_ray_nodes import start
from trainer import attempts, checkpoint, journal

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(3000)]
KINDS, EACH = ("rank", "actor", "driver", "node"), int(os.environ.get("MEDSWAV_CHAOS_EACH", "5"))
AFTER, GAP, EVERY = 50, 12, 5
STEPS = 100 + 16 * EACH * len(KINDS)
TITLES = {"rank": "ray::RayTrainWorker", "actor": "ray::Augmenter"}
# A dead node is noticed after some five seconds, and one that is merely slow is not called dead.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
LEAN = "--include-log-monitor=false"
CPUS = 3  # of a node: one rank, with its augmentation actor, and no second


class Cluster:
    """A head and two nodes, each with its raylet and workers below one child process."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.env = jobs.environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            TMPDIR=str(folder),
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="600",
            RAY_worker_register_timeout_seconds="300",
            **HEALTH_CHECKS,
        )
        self._folder, self._stack, self._started = folder, stack, 0
        self.address = ""
        self._start(self._head)
        self.nodes: list[subprocess.Popen] = []
        self.add()
        self.add()

    def _head(self) -> list[str]:
        port, client, dashboard = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        more = ["--head", f"--port={port}", f"--ray-client-server-port={client}"]
        more += [f"--temp-dir={self._folder}", "--include-dashboard=false", f"--dashboard-port={dashboard}"]
        more += ["--no-monitor", LEAN]
        return start("head", 0, *more)

    def add(self) -> None:
        node = self._start(lambda: start(f"node-{self._started}", CPUS, f"--address={self.address}", LEAN))
        self.nodes.append(node)

    def _start(self, command: Callable[[], list[str]]) -> subprocess.Popen:
        """A process of Ray, once it says that it runs; tried again if it ends before: on a busy machine
        Ray gives up after 15 to 30 s. One after the other: two that start at once choose the same ports."""
        for _ in range(20):
            self._started += 1
            child = self._try(command(), self._folder / f"{self._started}.log")
            if child is not None:
                return child
        raise AssertionError(f"no Ray starts: {self._folder / str(self._started)}.log")

    def _try(self, command: list[str], log: Path) -> subprocess.Popen | None:
        child = self._stack.enter_context(jobs.child(command, log, self.env))
        jobs.poll(str(log), lambda: child.poll() is not None or "block forever" in log.read_text())
        return child if child.poll() is None else None

    def with_workers(self, title: str) -> list[tuple[subprocess.Popen, list]]:
        found = [(node, jobs.workers(node.pid, title)) for node in self.nodes]
        return [(node, workers) for node, workers in found if workers]

    def kill(self, kind: str, draw: random.Random) -> None:
        title = TITLES.get(kind, TITLES["rank"])
        node, workers = draw.choice(jobs.poll(title, lambda: self.with_workers(title)))
        if kind in TITLES:
            jobs.kill(draw.choice(workers))
            return
        for one in jobs.descendants(node.pid):
            jobs.kill(one)
        node.kill()
        self.nodes.remove(node)
        self.add()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chaos")
    dataset(root / "data", root / "scratch")
    return root / "data"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(jobs, "DEADLINE_SECONDS", 600.0)
    folder = Path(tempfile.mkdtemp(prefix="mw-chaos-", dir="/tmp"))
    try:
        with contextlib.ExitStack() as stack:
            yield Cluster(folder, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(data: Path, run_dir: Path, *more: str) -> list[str]:
    settings = [
        "data.modalities=[ct,us,xr]",
        "data.batch_size=6",
        f"max_steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        "swav.queue_length=24",
        "swav.prototypes=8",
        "model.hidden_dim=16",
        "model.feature_dim=8",
        "views.crops=[{count: 2, size: 16}, {count: 2, size: 12}]",
        "views.energy_probability=0",
        "log_every_steps=5",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    given = ["pretrain", "--dataset", str(data), "--run-dir", str(run_dir)]
    given += ["--feeders", "1", "--max-failures", "10"]
    return [str(jobs.BIN / "medswav"), *given, *flags, *more]


def done(run_dir: Path) -> int:
    """Rows are few bytes and lines are whole: no need to parse them."""
    with contextlib.suppress(FileNotFoundError):
        return journal.journal_path(run_dir).read_bytes().count(b"\n")
    return 0


def plan(draw: random.Random) -> list[tuple[int, str]]:
    """(step, kind), at least GAP steps apart, each with AFTER steps behind it."""
    count = len(KINDS) * EACH
    room = STEPS - AFTER - count * GAP - EVERY
    steps = [EVERY + s + GAP * i for i, s in enumerate(sorted(draw.choices(range(room), k=count)))]
    kinds = list(KINDS) * EACH
    draw.shuffle(kinds)
    return list(zip(steps, kinds, strict=True))


def losses(run_dir: Path) -> list[float]:
    rows = journal.read(journal.journal_path(run_dir))
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["loss"] for row in rows]


def test_twenty_kills_of_ranks_actors_driver_and_nodes_change_no_loss(data, cluster, tmp_path):
    seed = int(os.environ.get("MEDSWAV_CHAOS_SEED", "1"))
    draw = random.Random(seed)
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    assert jobs.run(command(data, undisturbed), tmp_path / "log0", jobs.environment(), 900) == 0
    print(f"seed {seed}: {STEPS} steps on 2 ranks, one a node, a checkpoint every {EVERY}")
    given, log = command(data, run_dir, "--address", cluster.address), tmp_path / "log"
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(jobs.child(given, log, cluster.env))
        for step, kind in plan(draw):
            jobs.poll(f"step {step}", lambda at=step: done(run_dir) >= at, process)
            at, saved = done(run_dir), max(checkpoint.list_steps(run_dir), default=0)
            if kind == "driver":
                os.kill(process.pid, signal.SIGKILL)
                process.wait(timeout=60)
                process = stack.enter_context(jobs.child(given, log, cluster.env))  # at once
            else:
                cluster.kill(kind, draw)
            print(f"{time.monotonic() - began:6.0f} s  killed {kind:6} after step {at}, saved {saved}")
        assert process.wait(timeout=900) == 0, log.read_text()[-3000:]
    starts = attempts.starts(run_dir)
    print(f"attempts went on from {[starts[n] for n in sorted(starts)]}")
    assert len(starts) > 3 * EACH, "a kill of a rank, a driver or a node begins an attempt"
    before, after = losses(undisturbed), losses(run_dir)
    same = sum(a == b for a, b in zip(before, after, strict=True))
    seconds = time.monotonic() - began
    print(f"{same} of {STEPS} losses are equal (==); {seconds:.0f} s, {len(starts)} attempts")
    assert after == before
    assert (run_dir / "encoder.safetensors").read_bytes() == (
        undisturbed / "encoder.safetensors"
    ).read_bytes()
    assert jobs.run([given[0], "checkpoints", "verify", str(run_dir)], log, jobs.environment()) == 0
