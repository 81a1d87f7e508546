"""Where a dataset lies: atomic put, create-if-absent, reads. POSIX here; shards.objects has S3 and GCS.

Every call that changes a disk goes through OPS, a few one-line wrappers, so that the crash tests can stop or
fail a writer at each of them. Names are relative to the root, with forward slashes.
"""

import errno
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from shards.errors import UserError

TEMPORARY_PREFIX = ".tmp-"
_CHUNK_BYTES = 8 << 20
_Names = list[str]  # inside the class `list` is its method


def _nothing(operation: str) -> None:
    """The default of Operations.before."""


class Operations:
    """The system calls that change a disk. `before(name)` runs ahead of each: the hook of the crash tests."""

    def __init__(self) -> None:
        self.before: Callable[[str], None] = _nothing

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.before("write")
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        self.before("fsync")
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename")
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        self.before("link")
        target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        self.before("unlink")
        path.unlink()

    def mkdir(self, path: Path) -> None:
        self.before("mkdir")
        path.mkdir(exist_ok=True)


OPS = Operations()

_NOT_A_FOLDER = "a part of the path is a file, not a folder: choose another folder"
_CAUSES = {
    errno.ENOSPC: "the disk is full: free some space, or use another folder, and run again",
    errno.EDQUOT: "the disk quota is used up: free some space, or use another folder, and run again",
    errno.EROFS: "the file system is read-only: use another folder, or mount it writable",
    errno.EACCES: "permission denied: change the permissions of the folder, or use another one",
    errno.EPERM: "not permitted: use a folder on a file system with hard links that you may write to",
    errno.ENOTSUP: "the file system has no hard links, which exactly-once commits need: use another one",
    errno.EIO: "input/output error: check the disk or the network mount, then run again",
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,  # of mkdir: where a file may exist, the caller has dealt with it
}


@contextmanager
def clear_errors(folder: str | Path) -> Iterator[None]:
    """Turn the disk's own errors (full, read-only, forbidden, I/O) into one UserError that names `folder`."""
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0)
        if cause is None:
            raise
        raise UserError(f"{folder}: {cause}") from error


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte, whatever short counts the system call returns."""
    view = memoryview(data)
    while view:
        view = view[OPS.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        OPS.fsync(fd)
    finally:
        os.close(fd)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """A folder of immutable files. Errors of the disk are UserError, a missing file is FileNotFoundError.

    remote: whether the files have no paths (`local`): they are then read through `read` and `open`.
    """

    remote = False
    root: str | Path

    def __init__(self, root: str | Path) -> None:
        self.root = self._folder = Path(root)

    def local(self, name: str) -> Path:
        """The path of a name. Raises ValueError for a name that leads out of the root."""
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(f"not a name inside a store: {name!r}")
        return self._folder.joinpath(*parts)

    def put(self, name: str, data: bytes | Path) -> str:
        """Write or replace a file atomically and durably. data: bytes or a local file. Returns its sha256."""
        target = self.local(name)
        with clear_errors(self.root), self._temporary(target, data) as (temporary, sha256):
            OPS.rename(temporary, target)
            sync_folder(target.parent)
        return sha256

    def create(self, name: str, data: bytes) -> bool:
        """Write a file if there is none of that name: True for exactly one of any number of callers."""
        target = self.local(name)
        with clear_errors(self.root), self._temporary(target, data) as (temporary, _):
            try:
                OPS.link(temporary, target)
                created = True
            except FileExistsError:
                # NFS may repeat a link whose answer was lost: then the target is our own second name.
                created = temporary.stat().st_nlink == 2 and temporary.samefile(target)
            # Also where another writer was first: its name must be durable before we say it is there.
            sync_folder(target.parent)
        return created

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file, or `size` of them from `offset` (fewer at the end of the file)."""
        with clear_errors(self.root), open(self.local(name), "rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)

    def sha256(self, name: str) -> str:
        """Hex sha256 of the bytes of a file."""
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open(self, name: str) -> io.BufferedReader:
        """A seekable binary file to read from."""
        with clear_errors(self.root):
            return open(self.local(name), "rb")

    def exists(self, name: str) -> bool:
        return self.local(name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with clear_errors(self.root):
            return self.local(name).stat().st_size

    def list(self, prefix: str = "") -> _Names:
        """Sorted names of all files below a folder; temporary files are left out."""
        return [n for n in self._walk(prefix) if not n.rpartition("/")[2].startswith(TEMPORARY_PREFIX)]

    def temporaries(self) -> _Names:
        """Sorted names of temporary files: of live writers, or left behind by killed ones."""
        return [n for n in self._walk("") if n.rpartition("/")[2].startswith(TEMPORARY_PREFIX)]

    def delete(self, name: str) -> None:
        """Remove a file; no error where it is gone already."""
        with clear_errors(self.root), suppress(FileNotFoundError):
            OPS.unlink(self.local(name))

    def age_seconds(self, name: str) -> float:
        """Seconds since a file was last written, by this machine's clock."""
        return time.time() - self.local(name).stat().st_mtime

    def _walk(self, prefix: str) -> _Names:
        top = self.local(prefix) if prefix else self._folder
        names = []
        with clear_errors(self.root):
            for folder, _, files in os.walk(top):
                relative = Path(folder).relative_to(self._folder)
                names += [(relative / file).as_posix() for file in files]
        return sorted(names)

    @contextmanager
    def _temporary(self, target: Path, data: bytes | Path) -> Iterator[tuple[Path, str]]:
        """A durable file with the data beside `target`, under a name of its own; removed at the end."""
        self._make_folder(target.parent)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}-{target.name}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                sha256 = _copy(data, fd)
                OPS.fsync(fd)
            finally:
                os.close(fd)
            yield temporary, sha256
        finally:
            if temporary.exists():
                with suppress(OSError):  # the sweep removes what cannot be removed now
                    OPS.unlink(temporary)

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder.parent != folder:
            self._make_folder(folder.parent)
        OPS.mkdir(folder)
        sync_folder(folder.parent)


def _copy(data: bytes | Path, fd: int) -> str:
    """Write bytes or a local file to fd; the sha256 of what was written."""
    if isinstance(data, bytes):
        write_all(fd, data)
        return hashlib.sha256(data).hexdigest()
    hasher = hashlib.sha256()
    with open(data, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            write_all(fd, chunk)
    return hasher.hexdigest()
