"""The header scan in several processes: untrusted headers are parsed in children that may die.

A child gets files and answers with entries, both as JSON lines. One that crashes, hangs or asks for too much
memory is replaced; the file that did it becomes an input all the same, which its unit refuses with a reason.
The entries come in the order of the files.
"""

import dataclasses
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from ingest.archives import archive_kind
from ingest.config import IngestConfig
from ingest.discover import Entry, File, entries_of, paired
from ingest.identity import content_of, identity_of
from ingest.sniff import read_head, sniff
from ingest.tables import Listing, Listings
from shards.errors import UserError
from shards.schema import Reason

_T = TypeVar("_T")

BATCH_FILES = 64
_AHEAD = 3  # batches a child: memory stays flat
_ENTRIES_A_LINE = 64
_START_SECONDS = 60.0
CHILD = "ingest.scan"


def scanner(config: IngestConfig, workers: int) -> Callable[..., Iterator[list[Entry]]]:
    """An `entries_of` for discover.scan that works in `workers` children."""

    def scan(files: Iterable[File], listed: Listings, _: IngestConfig) -> Iterator[list[Entry]]:
        children: list[_Child] = []
        own = threading.local()
        first = json.dumps(
            {
                "config": config.model_dump_json(),
                "listed": {path: dataclasses.asdict(listing) for path, listing in listed.items()},
            }
        ).encode()

        def work(batch: tuple[File, ...]) -> list[list[Entry]]:
            if not hasattr(own, "child"):
                own.child = _Child(first, config.file_seconds, config.memory_mib)
                children.append(own.child)
            found: list[list[Entry]] = _scanned(own.child, batch)
            return found

        pool = ThreadPoolExecutor(workers)
        try:
            waiting: deque[Future[list[list[Entry]]]] = deque()
            for batch in _batched(files, BATCH_FILES):
                waiting.append(pool.submit(work, batch))
                if len(waiting) >= workers * _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for child in children:  # first: what runs ends at once
                child.close(last=True)
            pool.shutdown(cancel_futures=True)

    return scan


def _scanned(child: "_Child", batch: tuple[File, ...]) -> list[list[Entry]]:
    """The entries of each file. A file that ends the child is found by halves."""
    try:
        return child.ask(batch)
    except _LostError:
        if child.ended:  # the scan itself was ended
            return []
        child.close()
    if len(batch) == 1:
        return [[_lost(batch[0])]]
    middle = len(batch) // 2
    return _scanned(child, batch[:middle]) + _scanned(child, batch[middle:])


def _lost(file: File) -> Entry:
    """A file whose headers end a process: an input that its unit will refuse."""
    path, relative, source = file
    head = read_head(path) or b""
    try:
        size = os.stat(path).st_size  # noqa: PTH116 - as in discover
    except OSError:
        size = 0
    reason = Reason.CRASHED.value
    if archive_kind(head):
        identity = identity_of(relative, size, reason.encode())
        return Entry(path, relative, source, 0, "other", identity, hint=reason, member=f"!{reason}")
    kind = sniff(head)
    identity = identity_of(relative, size, content_of(path, size, head, kind))
    return dataclasses.replace(paired(Entry(path, relative, source, size, kind, identity), head), hint=reason)


class _LostError(Exception):
    """The child died, or said nothing for too long."""


class _Child:
    """One process that scans, started when needed."""

    def __init__(self, first: bytes, seconds: float, memory_mib: int) -> None:
        self._first, self._seconds, self._memory_mib = first, seconds, memory_mib
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self.ended = False

    def ask(self, batch: tuple[File, ...]) -> list[list[Entry]]:
        """The entries of each file. Raises _LostError."""
        if self._process is None:
            self._start()
        self._send(json.dumps(batch).encode())
        found: list[list[Entry]] = [[] for _ in batch]
        while (answer := self._line(self._seconds)) is not None:
            try:
                index, rows = json.loads(answer)
                found[index] += [Entry(*row) for row in rows]
            except (ValueError, TypeError, IndexError):
                raise _LostError from None
        return found

    def _start(self) -> None:
        if self.ended:
            raise _LostError
        command = [sys.executable, "-m", CHILD, str(self._memory_mib)]
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "HOME") if name in os.environ}
        environment = kept | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONUTF8": "1",
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # parsers write header values there
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        self._buffer = b""
        try:
            self._send(self._first)
            self._line(_START_SECONDS)
        except _LostError:
            if self.ended:
                raise
            self.close()
            raise UserError(
                f"a process of the header scan does not start: raise memory_mib ({self._memory_mib}), "
                "or look at the load of the machine"
            ) from None

    def _send(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        view = memoryview(line + b"\n")
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except OSError:
            raise _LostError from None

    def _line(self, seconds: float) -> bytes | None:
        """The next line of an answer; None at its end."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise _LostError
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise _LostError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line or None

    def close(self, last: bool = False) -> None:
        """End the process; `last`: and start no other."""
        self.ended = self.ended or last
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _batched(items: Iterable[_T], count: int) -> Iterator[tuple[_T, ...]]:
    iterator = iter(items)
    while batch := tuple(islice(iterator, count)):
        yield batch


def main() -> None:
    """A child: the first line is the configuration, each further one a list of files; until EOF."""
    import resource

    memory = int(sys.argv[1]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not break the lines
    first = json.loads(sys.stdin.buffer.readline())
    config = IngestConfig.model_validate_json(first["config"])
    listed = Listings({path: Listing(**values) for path, values in first["listed"].items()})
    channel.write(b"\n")  # ready
    channel.flush()
    for line in sys.stdin.buffer:
        for index, (path, relative, source) in enumerate(json.loads(line)):
            for rows in _batched(entries_of(path, relative, source, listed, config), _ENTRIES_A_LINE):
                _answer(channel, [index, [_row(entry) for entry in rows]])
        channel.write(b"\n")
        channel.flush()


def _row(entry: Entry) -> list[Any]:
    return [getattr(entry, field.name) for field in dataclasses.fields(entry)]


def _answer(channel: Any, value: Any) -> None:
    channel.write(json.dumps(value).encode() + b"\n")
    channel.flush()


if __name__ == "__main__":
    main()
