"""Commands of ours as children, found and killed by recorded pid; polling with deadlines."""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from orchestration.metrics_endpoint import TARGETS_FILE
from shards.store import TEMPORARY_PREFIX

BIN = Path(sys.executable).parent
INGEST = str(BIN / "ingest")
DEADLINE_SECONDS = 240.0
_PR_SET_PDEATHSIG = 1


def environment(**extra: str) -> dict[str, str]:
    """Ours without anything that names a Ray cluster, a token or a key."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "MEDSWAV_"))}
    kept["PATH"] = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"RAY_USAGE_STATS_ENABLED": "0"} | extra


def _end_with_parent() -> None:
    """In the child: SIGTERM when the tests are killed, so that no cluster outlives them (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def child(command: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A command in a session of its own; killed, with all its descendants, if it still runs at the end."""
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for descendant in descendants(process.pid):
                kill(descendant)
            process.kill()
        process.wait(timeout=60)


def run(command: Sequence[str], log: Path, env: dict[str, str], timeout: float = DEADLINE_SECONDS) -> int:
    with child(command, log, env) as process:
        return process.wait(timeout=timeout)


def poll(what: str, condition: Callable[[], Any], process: subprocess.Popen | None = None) -> Any:
    """Wait until the condition holds; its value. Fails at the deadline or when the process has ended."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        ended = None if process is None else process.poll()
        assert ended is None, f"the process ended with {ended} while waiting for {what}"
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {DEADLINE_SECONDS} s")


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(root: int, title: str) -> list[psutil.Process]:
    """Ray workers below the process `root` whose title (`ray::Name.method`) starts so."""
    found = []
    for process in descendants(root):
        try:
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
        if command.startswith(title):
            found.append(process)
    return found


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def ingest(sources: Path, out: Path, *more: str) -> list[str]:
    """The command that converts `sources`/files with `sources`/key in units of 4 files, by two workers."""
    settings = ["--set", "unit_files=4", "--workers", "2"]
    return [INGEST, "run", str(sources / "files"), str(out), "--key", str(sources / "key"), *settings, *more]


def contents(root: Path) -> dict[str, str]:
    """sha256 by name of all that a reader can see; what a killed writer was writing has a temporary name."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(TEMPORARY_PREFIX)]
    assert TARGETS_FILE not in {p.name for p in files}
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def committed(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def commits_in(found: dict[str, str]) -> int:
    """Of what `contents` gave."""
    return len([name for name in found if name.startswith("commits/")])
