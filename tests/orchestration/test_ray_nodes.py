"""Ingest on a cluster of several nodes, one of which dies in the middle: no byte of the dataset changes."""

import contextlib
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestration.metrics_endpoint import TARGETS_FILE
from shards.store import Store
from shards.verify import verify
from tests.orchestration import jobs
from tests.orchestration.conftest import free_ports
from tests.orchestration.jobs import committed, contents

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
            jobs.poll("head", lambda: listens(port))
            workers: list[subprocess.Popen] = []
            for number in (1, 2):  # one after the other: two that start at once choose the same ports
                given = start(f"worker-{number}", 1, f"--address={address}")
                worker = stack.enter_context(jobs.child(given, folder / f"{number}.log", env))
                wait_for_nodes(number + 1, address, folder, env)
                workers.append(worker)
            yield Nodes(address, env, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(count: int, address: str, folder: Path, env: dict[str, str]) -> None:
    """Until the head knows of so many that are alive: in one process, whose start costs seconds."""
    code = (
        "import ray, sys, time; ray.init(address='auto', _node_ip_address='127.0.0.1', log_to_driver=False)\n"
        "while sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[1]): time.sleep(0.1)"
    )
    log = folder / "wait.log"
    waiting = [str(jobs.BIN / "python"), "-c", code, str(count)]
    assert jobs.run(waiting, log, env | {"RAY_ADDRESS": address}) == 0, log.read_text()


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_node_killed_in_the_middle_changes_nothing(
    nodes: Nodes, patients: Path, undisturbed_ingest: dict[str, str], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    given = jobs.ingest(patients, out, "--address", nodes.address)
    with jobs.child(given, log, nodes.env) as process:
        jobs.poll("first commits", lambda: committed(out) >= 2, process)
        victim = nodes.workers[1]
        jobs.poll("a unit on that node", lambda: jobs.workers(victim.pid, "ray::_convert"), process)
        for one in jobs.descendants(victim.pid):
            jobs.kill(one)
        victim.kill()
        assert committed(out) < jobs.commits_in(undisturbed_ingest), "it was killed in the middle"
        assert process.wait(timeout=jobs.DEADLINE_SECONDS) == 0, log.read_text()
    assert contents(out) == undisturbed_ingest
    assert verify(Store(out), deep=True).clean
    assert not (out / TARGETS_FILE).exists()
