"""Parse and decode in a child process that may die: a time and memory limit for every file.

A crafted file can make a codec crash, hang or ask for all memory; then only the child ends, the file is
refused with CRASHED and the next file gets a new child. The wire form is a JSON header and raw pixel bytes,
never a pickle: what comes from a file cannot run in this process. Measured: about 0.4 ms an image over
reading in this process (512 x 512 x 16 bit: 6 %), and 0.5 s for the start of a child, once a process.
"""

import fcntl
import json
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from ingest.config import IngestConfig, ReadRules
from ingest.frames import Item, Refusal, from_message
from ingest.memory import ENVIRONMENT, keep_freed
from ingest.read import read_file
from shards.schema import Reason

HEADER = struct.Struct("<IQ")  # bytes of JSON, bytes of pixels
LONGEST_JSON = 1 << 20
_PIPE_BYTES = 1 << 20


class Reader(Protocol):
    """Reads one file at a time to at least one item. Arguments: of ingest.read.read_file."""

    def read(
        self, path: str, kind: str, modality: str, member: str = "", partner: str = ""
    ) -> Iterator[Item]: ...

    def close(self) -> None: ...


class InlineReader:
    """Reads in this process: no limits, for trusted files and tests."""

    def __init__(self, rules: ReadRules) -> None:
        self._rules = rules

    def read(
        self, path: str, kind: str, modality: str, member: str = "", partner: str = ""
    ) -> Iterator[Item]:
        return read_file(path, kind, modality, self._rules, member, partner)

    def close(self) -> None:
        """Nothing to close."""


class _ChildLostError(Exception):
    """The child died, ran out of time or sent what makes no sense."""


class ProcessReader:
    """Reads in one child process that is started when needed and replaced when lost."""

    def __init__(self, rules: ReadRules, file_seconds: float, memory_mib: int) -> None:
        self._rules = rules
        self._seconds = file_seconds
        self._memory_mib = memory_mib
        self._child: subprocess.Popen[bytes] | None = None
        self._served = 0  # requests that this child got

    def read(
        self, path: str, kind: str, modality: str, member: str = "", partner: str = ""
    ) -> Iterator[Item]:
        """Items of the file; the last one is Refusal(CRASHED) where the child was lost."""
        fields = {"path": path, "kind": kind, "modality": modality, "member": member, "partner": partner}
        request = json.dumps(fields).encode()
        finished = started = False
        try:
            while not finished:
                try:
                    if not started:
                        self._send(request)
                    item, finished = self._receive()
                except _ChildLostError:
                    if not started and self._served > 1:
                        # It may have died of an earlier file or of an outside kill: a new child shows.
                        self.close()
                        continue
                    yield Refusal(Reason.CRASHED, modality=modality)
                    return
                started = True
                yield item
        finally:
            if not finished:  # also when the consumer stopped half-way: what follows would be misread
                self.close()

    def usage(self) -> tuple[float, int]:
        """(CPU seconds so far, peak of resident bytes) of the child; (0, 0) where none runs."""
        return (0.0, 0) if self._child is None else process_usage(self._child.pid)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                _close(pipe)

    def _send(self, request: bytes) -> None:
        if self._child is None:
            self._child, self._served = _start(self._rules, self._seconds, self._memory_mib), 0
        self._served += 1
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(HEADER.pack(len(request), 0) + request)
        except BrokenPipeError:
            raise _ChildLostError from None

    def _receive(self) -> tuple[Item, bool]:
        """The next item and whether it is the last of its file."""
        deadline = time.monotonic() + self._seconds
        json_bytes, pixel_bytes = HEADER.unpack(self._exactly(HEADER.size, deadline))
        if json_bytes > LONGEST_JSON or pixel_bytes > 2 * self._rules.max_frame_pixels:
            raise _ChildLostError
        text, pixels = self._exactly(json_bytes, deadline), self._exactly(pixel_bytes, deadline)
        try:
            header: dict[str, Any] = json.loads(bytes(text))
            return from_message(header, pixels), bool(header["last"])
        except (KeyError, TypeError, ValueError):
            raise _ChildLostError from None

    def _exactly(self, count: int, deadline: float) -> memoryview:
        """The next bytes, in a buffer of their own: numpy is slow where pixels start at an odd address."""
        assert self._child is not None and self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        buffer = np.empty(count, np.uint8).data
        view = buffer
        while view:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise _ChildLostError
            got = os.readv(descriptor, [view])
            if got == 0:
                raise _ChildLostError
            view = view[got:]
        return buffer


def process_usage(pid: int) -> tuple[float, int]:
    """(CPU seconds, peak of resident bytes) of a live process, from /proc. Raises OSError for a dead one."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    ticks = int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK"), int(peak[1]) << 10 if peak else 0


def open_reader(config: IngestConfig) -> Reader:
    """A reader as configured; close it after use."""
    return _reader(config.sandbox, config.rules(), config.file_seconds, config.memory_mib)


def shared_reader(config: IngestConfig) -> Reader:
    """The reader of this process for these settings: its child is started once, not once a unit."""
    rules = config.rules().model_dump_json()
    return _shared(os.getpid(), config.sandbox, rules, config.file_seconds, config.memory_mib)


@lru_cache(maxsize=2)
def _shared(pid: int, sandbox: str, rules: str, file_seconds: float, memory_mib: int) -> Reader:
    # pid: a forked process must not talk to the child of its parent.
    return _reader(sandbox, ReadRules.model_validate_json(rules), file_seconds, memory_mib)


def _reader(sandbox: str, rules: ReadRules, file_seconds: float, memory_mib: int) -> Reader:
    return InlineReader(rules) if sandbox == "inline" else ProcessReader(rules, file_seconds, memory_mib)


def _start(rules: ReadRules, seconds: float, memory_mib: int) -> "subprocess.Popen[bytes]":
    environment = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "HOME") if name in os.environ
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    } | ENVIRONMENT
    keep_freed()  # this process converts from now on
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ingest.sandbox_child",
            rules.model_dump_json(),
            str(seconds),
            str(memory_mib),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # codecs write header values there
        bufsize=0,
        env=environment,
        start_new_session=True,  # an interrupt of the terminal is for this process, which ends the child
    )
    assert child.stdout is not None
    with suppress(OSError):  # over the user's limit: slower only
        fcntl.fcntl(child.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return child


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with suppress(OSError):
            pipe.close()
