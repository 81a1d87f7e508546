"""One Ray cluster for the session, as a child of the tests; sources and datasets made once."""

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ingest.synthetic.build import build
from shards.ids import create_key
from tests.orchestration import jobs


@dataclass(frozen=True)
class RayCluster:
    """address: of the GCS; dashboard: URL; root: pid whose descendants are Ray's; env: to reach it."""

    address: str
    dashboard: str
    root: int
    env: dict[str, str]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """`ray start --head --block` with token authentication; ended by SIGTERM, never by `ray stop`."""
    folder = Path(tempfile.mkdtemp(prefix="mw-ray-", dir="/tmp"))  # sockets need a short path
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    # What killed workers leave goes with the folder.
    env = jobs.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), TMPDIR=str(folder))
    port, dashboard, *others = free_ports(7)
    names = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "runtime-env-agent-port")
    command = [
        str(jobs.BIN / "ray"),
        *["start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"],
        *["--num-cpus=8", f"--object-store-memory={200 * 2**20}", f"--temp-dir={folder}"],
        *["--include-dashboard=true", f"--dashboard-port={dashboard}"],
        *[f"--{name}={other}" for name, other in zip(names, others, strict=True)],
        "--disable-usage-stats",
    ]
    url = f"http://127.0.0.1:{dashboard}"
    try:
        with jobs.child(command, folder / "log", env) as process:
            jobs.poll("dashboard", lambda: answers(url, token.read_text()), process)
            yield RayCluster(f"127.0.0.1:{port}", url, process.pid, env)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)  # then it is killed with all its descendants
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated patients below `files`, and a key; about 20 units of 4 files or one series."""
    root = tmp_path_factory.mktemp("patients")
    build(root / "files", patients=4, workers=2)
    create_key(root / "key")
    return root


@pytest.fixture(scope="session")
def undisturbed_ingest(
    patients: Path, ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """jobs.contents of the dataset of `patients` when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    given = jobs.ingest(patients, folder / "out", "--address", ray_cluster.address)
    assert jobs.run(given, folder / "log", ray_cluster.env) == 0, (folder / "log").read_text()
    return jobs.contents(folder / "out")


def answers(url: str, token: str) -> bool:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different, outside Ray's range for workers (10002-19999)."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
    assert not any(10002 <= port <= 19999 for port in ports)
    return ports
