"""Ingest on a cluster of several nodes, one of which dies in the middle: no byte of the dataset changes."""

import contextlib
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ingest.synthetic.build import build
from orchestration.metrics import TARGETS_FILE
from shards.ids import create_key
from shards.store import Store
from shards.verify import verify
from tests.orchestration import jobs
from tests.orchestration.conftest import free_ports
from tests.orchestration.test_ray_ingest import command, committed, contents

pytestmark = pytest.mark.ray
# A dead node is noticed after about a second instead of thirteen.
FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}


@dataclass
class Nodes:
    """A head without CPUs, which runs nothing, and two workers; the processes whose descendants they are."""

    address: str
    env: dict[str, str]
    workers: list[subprocess.Popen]


def start(name: str, cpus: int, *more: str) -> list[str]:
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "runtime-env-agent-port")
    ports = zip(names, free_ports(len(names)), strict=True)
    return [
        str(jobs.BIN / "ray"),
        *["start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--node-name={name}"],
        *[f"--object-store-memory={100 * 2**20}", "--disable-usage-stats", *more],
        *[f"--{port_name}={port}" for port_name, port in ports],
    ]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="mw-nodes-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    env = jobs.environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), TMPDIR=str(folder), **FAST_HEALTH_CHECKS
    )
    port, client, dashboard = free_ports(3)
    address = f"127.0.0.1:{port}"
    head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    head += ["--include-dashboard=false", f"--dashboard-port={dashboard}"]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(jobs.child(start("head", 0, *head), folder / "head.log", env))
            jobs.poll("head", lambda: alive(address, folder, env) >= 1)
            workers: list[subprocess.Popen] = []
            for number in (1, 2):  # one after the other: two that start at once choose the same ports
                given = start(f"worker-{number}", 1, f"--address={address}")
                worker = stack.enter_context(jobs.child(given, folder / f"{number}.log", env))
                jobs.poll("node", lambda more=number + 1: alive(address, folder, env) >= more, worker)
                workers.append(worker)
            yield Nodes(address, env, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def alive(address: str, folder: Path, env: dict[str, str]) -> int:
    """Nodes that the head knows to be alive; 0 where it does not answer yet."""
    log = folder / "count"
    log.unlink(missing_ok=True)
    count = (
        "import ray; ray.init(address='auto', _node_ip_address='127.0.0.1', log_to_driver=False); "
        "print('nodes', sum(n['Alive'] for n in ray.nodes()))"
    )
    python = str(jobs.BIN / "python")
    if jobs.run([python, "-c", count], log, env | {"RAY_ADDRESS": address}) != 0:
        return 0
    return int(log.read_text().rpartition("nodes ")[2])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    build(root / "files", patients=4, workers=2)
    create_key(root / "key")
    return root


def test_a_node_killed_in_the_middle_changes_nothing(nodes: Nodes, sources: Path, tmp_path: Path) -> None:
    undisturbed, out, log = tmp_path / "undisturbed", tmp_path / "out", tmp_path / "log"
    assert jobs.run(command(sources, undisturbed), log, jobs.environment()) == 0, log.read_text()
    given = command(sources, out, "--address", nodes.address)
    with jobs.child(given, log, nodes.env) as process:
        jobs.poll("first commits", lambda: committed(out) >= 2, process)
        victim = nodes.workers[1]
        jobs.poll("a unit on that node", lambda: jobs.workers(victim.pid, "ray::_convert"), process)
        for one in jobs.descendants(victim.pid):
            jobs.kill(one)
        victim.kill()
        assert committed(out) < committed(undisturbed), "it was killed in the middle"
        assert process.wait(timeout=jobs.DEADLINE_SECONDS) == 0, log.read_text()
    assert contents(out) == contents(undisturbed)
    assert verify(Store(out), deep=True).clean
    assert not (out / TARGETS_FILE).exists()
