"""Simulated machines, each with a Ray node, that lose power and come back.

Where root may make network namespaces, a machine is one of its own: an address on a bridge, all ports free,
no other way to its neighbours. Else all machines share the loopback interface. They share one disk, as the
nodes of a cluster share a file system.
"""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.orchestration import jobs
from tests.orchestration.conftest import free_ports

PREFIX = "medswav"  # of namespaces: medswav-<pid of the tests>-<name>
CPUS = 2  # logical, of a machine: one rank with one augmentation actor
STARTS = 6  # tries to start a node
OBJECT_STORE_BYTES = 150 * 2**20
# A silent node is noticed after some seconds instead of thirteen or more; this machine may be busy. A machine
# without power closes no connection: what waits for an answer of it (the driver of a task) waits for gRPC's
# keepalive, by default for seven minutes.
FAST_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_grpc_keepalive_time_ms": "3000",
    "RAY_grpc_keepalive_timeout_ms": "10000",
    "RAY_grpc_client_keepalive_time_ms": "3000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_worker_niceness": "0",  # Ray's own is 15: on a machine that others use, workers hardly run
    "RAY_agent_register_timeout_ms": "120000",
}
_CLONE_NEWNET = 0x40000000
_NODE_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
_NODE_PORTS += ("metrics-export-port", "runtime-env-agent-port")


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """A bridge in a namespace of its own, and one for each machine. Nothing of the host is touched."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._switch = self._namespace("switch")
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "addr", "add", "10.77.0.254/24", "dev", "br0")
        ip("-n", self._switch, "link", "set", "br0", "up")

    def _namespace(self, name: str) -> str:
        whole = f"{PREFIX}-{os.getpid()}-{name}"
        ip("netns", "add", whole)
        self._names.append(whole)
        return whole

    def plug(self, name: str, address: str) -> str:
        """A namespace with one interface at the bridge."""
        space = self._namespace(name)
        ip("-n", self._switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", self._switch, "link", "set", name, "master", "br0", "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")
        ip("-n", space, "route", "add", "default", "via", "10.77.0.254")
        return space

    def cable(self, name: str, state: str) -> None:
        """`up` or `down`: of the machine's port at the bridge."""
        ip("-n", self._switch, "link", "set", name, state)

    def close(self) -> None:
        for name in self._names:
            for pid in pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                ip("netns", "del", name)


def pids(namespace: str) -> list[int]:
    """Every process in a namespace of ours, whoever its parent is now."""
    return [int(pid) for pid in ip("netns", "pids", namespace).split()]


def network() -> Network | None:
    """None where namespaces or bridges cannot be made: no root, no `ip`, a container without the right."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return None
    for line in ip("netns").splitlines():  # of tests that were killed
        name = line.split()[0]
        owner = name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if name.startswith(f"{PREFIX}-") and owner.isdigit() and not psutil.pid_exists(int(owner)):
            ip("netns", "del", name)
    try:
        return Network()
    except OSError:
        return None


@dataclass
class Machine:
    name: str
    address: str
    namespace: str | None
    process: subprocess.Popen | None = None

    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []

    def processes(self) -> list[psutil.Process]:
        """All that runs on the machine."""
        if self.namespace:
            found = []
            for pid in pids(self.namespace):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
            return found
        if self.process is None or self.process.poll() is not None:
            return []
        return [psutil.Process(self.process.pid), *jobs.descendants(self.process.pid)]

    def workers(self, title: str) -> list[psutil.Process]:
        """Its Ray workers whose title (`ray::Name.method`) starts so."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found


@dataclass
class Machines:
    """A head and its workers. `folder`: what is on the disk that they share."""

    folder: Path
    network: Network | None
    env: dict[str, str]
    port: int
    dashboard: int
    head: Machine
    workers: list[Machine]
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def address(self) -> str:
        return f"{self.head.address}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.head.address}:{self.dashboard}"

    def command(self, machine: Machine) -> list[str]:
        """`ray start` of a machine, as it is typed there."""
        more = ["--head", f"--port={self.port}"] if machine is self.head else [f"--address={self.address}"]
        if machine is self.head:
            more += [f"--dashboard-host={machine.address}", f"--dashboard-port={self.dashboard}"]
        if self.network is None:
            names = _NODE_PORTS + (("ray-client-server-port",) if machine is self.head else ())
            more += [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
        return [
            *["ray", "start", "--block", *more, f"--node-ip-address={machine.address}"],
            *[f"--node-name={machine.name}", f"--num-cpus={CPUS}"],
            *[f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self.folder}/{machine.name}"],
            "--disable-usage-stats",
        ]

    def start(self, machine: Machine) -> None:
        """Power on; returns when the head knows the machine."""
        before = set() if machine is self.head else self.alive()
        if self.network is not None:
            self.network.cable(machine.name, "up")
        log = self.folder / f"{machine.name}.log"

        def known() -> bool:
            if machine.process is None or machine.process.poll() is not None:
                # Ray gives a node 30 s to start, which a busy machine may miss: again, as systemd would.
                starts.append(log.read_text() if log.exists() else "")
                assert len(starts) <= STARTS, starts[-1][-3000:]
                given = [*machine.prefix(), *self.command(machine)]
                machine.process = self._stack.enter_context(jobs.child(given, log, self.env))
            return any(name == machine.name for name, _ in self.alive() - before)

        starts: list[str] = []
        machine.process = None
        jobs.poll(f"node {machine.name}", known)

    def power_off(self, machine: Machine) -> None:
        """The cable first: nobody hears a last word. Then every process at once, with SIGKILL."""
        if self.network is not None:
            self.network.cable(machine.name, "down")
        for process in machine.processes():
            jobs.kill(process)
        assert machine.process is not None
        machine.process.wait(timeout=60)
        jobs.poll("an empty machine", lambda: not machine.processes())

    def alive(self) -> set[tuple[str, str]]:
        """(name, id) of the nodes that the head believes to be alive; none while it does not answer."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        found: set[tuple[str, str]] = inside(self.head.namespace, lambda: nodes_alive(self.url, token))
        return found

    def close(self) -> None:
        """Power off whatever is on, the head last."""
        with self._stack:
            for machine in [*self.workers, self.head]:
                if machine.process is not None and machine.process.poll() is None:
                    self.power_off(machine)
        if self.network is not None:
            self.network.close()


def nodes_alive(url: str, token: str) -> set[tuple[str, str]]:
    headers = {"Authorization": f"Bearer {token}"}
    try:
        request = urllib.request.Request(f"{url}/nodes?view=summary", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            nodes = json.load(response)["data"]["summary"]
    except (OSError, ValueError, KeyError):
        return set()
    raylets = [node.get("raylet", {}) for node in nodes]
    return {(one["nodeName"], one["nodeId"]) for one in raylets if one.get("state") == "ALIVE"}


def inside(namespace: str | None, look: Callable[[], Any]) -> Any:
    """Call `look` from the namespace: of a thread of its own, which alone moves there."""

    def enter_and_look() -> Any:
        if namespace is not None:
            with open(f"/run/netns/{namespace}") as space:
                if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
        return look()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter_and_look).result()


@contextlib.contextmanager
def machines(names: Sequence[str]) -> Iterator[Machines]:
    """A running cluster: `names[0]` is the head. Nothing of it is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="mw-", dir="/tmp"))  # sockets need a short path
    made = network()
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    env = jobs.environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), TMPDIR=str(folder), **FAST_CHECKS
    )
    all_machines = []
    cluster = None
    try:
        for number, name in enumerate(names, start=1):
            address = f"10.77.0.{number}" if made else "127.0.0.1"
            all_machines.append(Machine(name, address, made.plug(name, address) if made else None))
        if made:
            env["GLOO_SOCKET_IFNAME"] = "eth0"  # gloo would ask for the address of the host's name
        port, dashboard = (6379, 8265) if made else free_ports(2)
        cluster = Machines(folder, made, env, port, dashboard, all_machines[0], all_machines[1:])
        for machine in all_machines:
            cluster.start(machine)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        elif made is not None:
            made.close()
        shutil.rmtree(folder, ignore_errors=True)
