"""`RUN/metrics.jsonl`: one JSON object a step, written by rank 0, in step order, no step twice.

`loss` is written with repr's digits, so it reads back as exactly the number that was computed.
"""

import contextlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer import files

log = logging.getLogger(__name__)
_TAIL_BYTES = 256 << 10  # of the end of a file, in which the last line lies


def journal_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that a crash cut off is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def last(path: Path) -> dict[str, Any] | None:
    """The newest complete line, without reading the others; None where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                return row
    return None


def truncate(path: Path, step: int) -> None:
    """Drop every line of `step` and later: they are computed again after a resume."""
    kept = [row for row in read(path) if row["step"] < step]
    with files.disk_full_is_clear("writing metrics"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(path, _lines(kept).encode())


class Writer:
    """Appends to one file for as long as an attempt lasts.

    The file stays open: a newer attempt puts another in its place, and what an older one may still write is
    then in none that has a name. What a full disk does not take is kept and written with a later row.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)
        self._rest = b""
        self._lock = threading.Lock()  # a save in the background sees to it that all rows are on the disk

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        with self._lock:
            was_full = bool(self._rest)
            self._rest += _lines(rows).encode()
            try:
                self._write()
            except files.DiskFullError:
                if not was_full:
                    log.warning("WARNING: the disk is full: rows of %s wait in memory", self._path.name)

    def sync(self) -> None:
        """All rows are durable. Raises DiskFullError."""
        with self._lock:
            self._write()
        with files.disk_full_is_clear("writing metrics"):
            files.before("fsync", self._path)
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self) -> None:
        with files.disk_full_is_clear("writing metrics"):
            while self._rest:
                files.before("append", self._path)
                self._rest = self._rest[self._file.write(self._rest) or 0 :]


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with files.disk_full_is_clear("writing metrics"), path.open("a") as file:
        file.write(_lines(rows))


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON has no nan: a diagnostic that is not finite becomes null."""
    return "".join(json.dumps({n: _clean(v) for n, v in row.items()}) + "\n" for row in rows)


def _clean(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
