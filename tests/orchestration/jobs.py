"""Commands of ours as children, found and killed by recorded pid; polling with deadlines."""

import ctypes
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

BIN = Path(sys.executable).parent
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
