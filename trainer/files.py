"""Durable file operations: what a crash at any point may leave behind is decided here.

Every change of the disk announces itself to `before` first, so that the crash tests can stop the process
at the n-th one.
"""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError


def before(operation: str, path: Path) -> None:
    """Called before each change of the disk; does nothing (the crash tests replace it)."""


class DiskFullError(UserError):
    """There is no room (or quota) left; what was there before is untouched."""


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and fsync it."""
    write_parts(path, [memoryview(data)])


def write_parts(path: Path, parts: Iterable[memoryview]) -> tuple[int, str]:
    """Write a new file of several parts and fsync it; its size and sha256, made on the way."""
    before("write", path)
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += part.nbytes
        file.flush()
        before("fsync", path)
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def sync_folder(path: Path) -> None:
    """fsync a directory, which makes the names in it durable."""
    before("fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    before("rename", target)
    source.rename(target)


def replace_file(path: Path, data: bytes) -> None:
    """Atomically replace (or create) a file: readers see the old or the new bytes, never a mixture."""
    temporary = path.with_name(f"{path.name}.tmp-{new_attempt()}")
    try:
        write_synced(temporary, data)
        rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk must not be filled further
        raise
    sync_folder(path.parent)


def new_attempt() -> str:
    """A name no other live attempt has."""
    return os.urandom(6).hex()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_full_is_clear(doing: str) -> Iterator[None]:
    """Turn a full disk into one line that says what to do. Raises DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"disk full while {doing}: free some space and run the same command again; "
                "the last complete checkpoint is kept"
            ) from None
        raise
