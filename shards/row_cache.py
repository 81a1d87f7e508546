"""The row file of a selection in a folder of the node: built by one process, mapped by all.

Its name has a digest of the commits it came from, so that a file of another state of the dataset is never
opened. It is built under another name, durable before it is renamed, and by one process at a time: a lock of
the file system holds the others, and goes with the process that has it. A process that builds first removes
what killed ones left of the same selection, and its files of earlier states (who has mapped one keeps it).
"""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.catalog import Selection
from shards.errors import UserError
from shards.ids import digest
from shards.objects import location
from shards.row_file import FORMAT, LongKeyError, RowFile, row_bytes, write
from shards.store import OPS, sync_folder

log = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"


class NoRowCacheError(UserError):
    """The folder cannot be used: no room, no permission, no such disk."""


def open_rows(selection: Selection, modality: str, columns: Sequence[str], folder: Path) -> RowFile | None:
    """The rows of a selection, by shard and offset; None where it has none. They are written at the first
    time, which takes twice their size of disk for a moment.

    Raises NoRowCacheError, UserError for a dataset that cannot be read.
    """
    slot = digest("rows", str(location(selection.store.root)), modality, selection.split or "")
    target = folder / f"{slot}-{digest('state', str(FORMAT), *columns, selection.digest)}"
    opened = _open(target, columns)
    if opened is not None:
        return opened
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / f"{slot}.lock"):
            opened = _open(target, columns)
            if opened is not None:
                return opened
            _remove(folder, slot)
            return _build(selection, modality, columns, target)
    except LongKeyError as error:
        raise NoRowCacheError(f"{error}: set data.catalogue_cache=off") from None
    except OSError as error:
        raise NoRowCacheError(f"{folder}: {(error.strerror or str(error)).lower()}") from error


def _open(target: Path, columns: Sequence[str]) -> RowFile | None:
    """None where it is not there, or not what was written."""
    try:
        return RowFile(target, columns)
    except (OSError, ValueError):
        return None


def _build(selection: Selection, modality: str, columns: Sequence[str], target: Path) -> RowFile | None:
    needed = selection.committed * 2 * row_bytes(columns)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise NoRowCacheError(
            f"{target.parent} has {free / 1e9:.1f} GB free, and the catalogue of {modality} takes "
            f"{needed / 1e9:.1f} GB while it is written, half of it then"
        )
    log.info("writing the catalogue of %s, %s rows, to %s", modality, f"{selection.committed:,}", target)
    temporary = target.with_name(f"{_TEMPORARY}{target.name}")
    temporary.mkdir(mode=0o700)
    try:
        if not write(temporary, selection.tables(columns), columns):
            return None
        sync_folder(temporary)
        OPS.rename(temporary, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return RowFile(target, columns)


def _remove(folder: Path, slot: str) -> None:
    """What there is of this selection: of another state, damaged, or left by a killed process."""
    for path in (*folder.glob(f"{slot}-*"), *folder.glob(f"{_TEMPORARY}{slot}-*")):
        shutil.rmtree(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
