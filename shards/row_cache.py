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
from dataclasses import dataclass
from pathlib import Path

from shards.catalog import Selection, select
from shards.errors import UserError
from shards.ids import digest
from shards.objects import location
from shards.row_file import FORMAT, LongKeyError, RowFile, row_bytes, write
from shards.store import OPS, Store, sync_folder

log = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"


class NoRowCacheError(UserError):
    """The folder cannot be used: no room, no permission, no such disk."""


@dataclass(frozen=True)
class Wanted:
    """The rows of a modality in a split (None: all) with these columns."""

    store: Store
    modality: str
    split: str | None
    columns: tuple[str, ...]

    @property
    def slot(self) -> str:
        """Of this user: in a folder of several, nobody could open the lock or the rows of another."""
        own = digest("rows", str(location(self.store.root)), self.modality, self.split or "")
        return f"{os.getuid()}_{own}"

    def file_name(self, state: str) -> str:
        return f"{self.slot}-{digest(str(FORMAT), state, *self.columns)}"


def open_rows(wanted: Wanted, state: str, folder: Path, at_least: int = 1) -> RowFile | None:
    """The rows by shard and offset; None where there are fewer than at_least. They are written at the first
    time, which takes twice their size of disk for a moment.

    state: catalog.state. Raises NoRowCacheError, UserError for a dataset that cannot be read.
    """
    opened = _open(folder / wanted.file_name(state), wanted.columns)
    if opened is not None:
        return opened
    selection = select(wanted.store, wanted.modality, wanted.split)
    if selection.committed < at_least:
        return None
    target = folder / wanted.file_name(selection.state)  # of the very commits that it will be built from
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / f"{wanted.slot}.lock"):
            opened = _open(target, wanted.columns)
            if opened is not None:
                return opened
            _remove(folder, wanted.slot)
            return _build(selection, wanted, target)
    except LongKeyError as error:
        raise NoRowCacheError(f"{error}: set data.catalogue_cache=none") from None
    except OSError as error:
        raise NoRowCacheError(f"{folder}: {(error.strerror or str(error)).lower()}") from error


def _open(target: Path, columns: Sequence[str]) -> RowFile | None:
    """None where it is not there, or not what was written."""
    try:
        return RowFile(target, columns)
    except (OSError, ValueError):
        return None


def _build(selection: Selection, wanted: Wanted, target: Path) -> RowFile | None:
    modality, columns = wanted.modality, wanted.columns
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
