"""The private path map: which file a source pseudonym stands for. A file of its own, never in a dataset.

JSON lines {"source": pseudonym, "path": original path, "member": inside an archive}, mode 0600, append only.
It undoes the pseudonyms of the paths: whoever has it needs no key.
"""

import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.objects import is_url

if TYPE_CHECKING:
    from ingest.discover import Entry
    from shards.ids import Pseudonymizer

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_LINES = 10_000  # written at once


def check(path: str | Path, output: str | Path, sources: Sequence[str | Path]) -> None:
    """Refuse a path inside the dataset (it would be copied along) or a source (it would be an input)."""
    place = Path(os.path.realpath(path))
    if is_url(path):
        raise UserError("the path map is a private file of this machine: give a local path")
    for name, folder in (("dataset", output), *(("source", source) for source in sources)):
        if not is_url(folder) and place.is_relative_to(os.path.realpath(folder)):
            raise UserError(f"the path map must not lie inside a {name} folder: choose another place")
    if place.is_dir():
        raise UserError(f"the path map {path} is a folder: give a file")
    if place.exists():
        read(path)


def write(path: str | Path, entries: Iterable["Entry"], names: "Pseudonymizer") -> int:
    """Append what the file does not hold yet; the number of new lines. Raises UserError.

    Safe after a kill: a torn last line is ended and written again. Two writers may repeat a line.
    """
    from ingest.deidentify import source_id

    handle = _open(path, _FLAGS)
    try:
        with os.fdopen(os.dup(handle), "rb") as file:
            content = file.read()
        known = set(content.splitlines())
        torn = bool(content) and not content.endswith(b"\n")
        waiting: list[bytes] = [b""] if torn else []
        written = 0
        for entry in entries:
            facts = {"source": source_id(entry.source, names), "path": entry.path}
            if getattr(entry, "member", ""):
                facts["member"] = str(getattr(entry, "member", ""))
            line = json.dumps(facts).encode()
            if line in known:
                continue
            known.add(line)
            waiting.append(line)
            written += 1
            if len(waiting) >= _LINES:
                _append(handle, waiting)
                waiting = []
        _append(handle, waiting)
        os.fsync(handle)
        return written
    except OSError as error:
        raise UserError(f"cannot write the path map {path}: {error.strerror}") from None
    finally:
        os.close(handle)


def read(path: str | Path) -> dict[str, list[str]]:
    """{source pseudonym: the paths it stood for, with `!member` of an archive}. Raises UserError."""
    handle = _open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found: dict[str, list[str]] = {}
    with os.fdopen(handle, "rb") as file:
        for line in file:
            try:
                facts = json.loads(line)
                name = facts["path"] + (f"!{facts['member']}" if "member" in facts else "")
                source = facts["source"]
            except (ValueError, KeyError, TypeError):  # a line that a kill tore
                continue
            if name not in found.setdefault(source, []):
                found[source].append(name)
    return found


def _open(path: str | Path, flags: int) -> int:
    try:
        handle = os.open(path, flags, 0o600)
    except OSError as error:
        raise UserError(f"cannot open the path map {path}: {error.strerror}") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(handle)
        raise UserError(f"the path map {path} can be read by others: run chmod 600 {path}")
    return handle


def _append(handle: int, lines: list[bytes]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    while data:
        data = data[os.write(handle, data) :]
