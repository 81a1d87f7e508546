"""WebDataset tars: a deterministic writer, an index, and reads by offset.

POSIX ustar (IEEE Std 1003.1, pax): a 512-byte header and padded data a member, two zero blocks at the end.
Times, owners and modes are constant, so that equal samples give equal bytes.
"""

import errno
import os
import re
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from shards import store
from shards.errors import UserError
from shards.objects import is_url, open_store

BLOCK = 512
_ATTEMPTS, _FIRST_WAIT = 4, 0.25  # of reads of a file; seconds before the second, doubled each time
_PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET})
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ZERO = bytes(BLOCK)


# What tarfile makes of a regular file without a name: its times, owners and modes are constants.
_EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 135), slice(148, 156)
_EMPTY_SUM = sum(_EMPTY[: _SIZE.start]) + sum(_EMPTY[_SIZE.stop : _SUM.start]) + 8 * 32 + sum(_EMPTY[156:])


def _header(name: bytes, size: int) -> bytes:
    """tarfile's header of a regular file, byte for byte, in a tenth of the time."""
    if len(name) > _NAME.stop or size >= 8**11:
        info = tarfile.TarInfo(name.decode())
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)
    digits = b"%011o" % size
    total = _EMPTY_SUM + sum(name) + sum(digits)
    return b"".join(
        (
            name.ljust(100, b"\0"),
            _EMPTY[_NAME.stop : _SIZE.start],
            digits,
            _EMPTY[_SIZE.stop : _SUM.start],
            b"%06o\0 " % total,
            _EMPTY[_SUM.stop :],
        )
    )


def _parsed(header: bytes) -> tuple[str, int]:
    """(name, size) of a member. Raises ValueError for what is no header of a regular file."""
    name, digits = header[_NAME].partition(b"\0")[0], header[_SIZE]
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:
        size = int(digits, 8)
        if header == _header(name, size):  # one of ours
            return name.decode(), size
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except tarfile.TarError:
        raise ValueError("the tar has a damaged header") from None
    if not info.isreg():
        raise ValueError("the tar holds something else than regular files")
    return info.name, info.size


class ShardWriter:
    """Writes one tar; add() returns where the data went. close() makes it durable and complete.

    Left by an exception it stays without its end marker: list_members refuses such a file.
    """

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._offset = 0
        self._keys: set[str] = set()

    def add(
        self, key: str, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]]
    ) -> dict[str, tuple[int, int]]:
        """Append one sample: members `<key>.<extension>`, in the order given -> {extension: (offset, size)}.

        files: a mapping, or pairs of which one at a time is in memory.

        Raises ValueError for a key that was added before or that WebDataset would cut at a dot.
        """
        if not _KEY.fullmatch(key):
            raise ValueError("a sample key has only letters, digits, - and _: a dot would merge samples")
        if key in self._keys:
            raise ValueError("a sample key was added twice")
        self._keys.add(key)
        places = {}
        for extension, data in files.items() if isinstance(files, Mapping) else files:
            padding = -len(data) % BLOCK
            header = _header(f"{key}.{extension}".encode(), len(data))
            store.write_all(self._fd, header + data + bytes(padding))
            places[extension] = (self._offset + BLOCK, len(data))
            self._offset += BLOCK + len(data) + padding
        return places

    def close(self) -> None:
        """Write the end marker, fsync, close."""
        store.write_all(self._fd, 2 * _ZERO)
        store.OPS.fsync(self._fd)
        self._release()

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._release()


def list_members(path: str | Path) -> list[tuple[str, int, int]]:
    """(name, offset of the data, size) of each member, in file order.

    Raises ValueError for anything but a complete ustar of regular files; a tar cut at a member boundary,
    which tar readers take for a shorter one, lacks its end marker and is refused too.
    """
    with open(path, "rb") as file:
        return scan_members(file)


def scan_members(file: BinaryIO) -> list[tuple[str, int, int]]:
    """list_members of an open, seekable file."""
    members = []
    end = file.seek(0, os.SEEK_END)
    offset = 0
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise ValueError("the tar is cut off: it has no end marker")
        if header == _ZERO:
            break
        name, size = _parsed(header)
        members.append((name, offset + BLOCK, size))
        offset += BLOCK + size + -size % BLOCK
    if file.read(BLOCK) != _ZERO or offset + 2 * BLOCK != end:
        raise ValueError("the tar is cut off or has something after its end marker")
    return members


class _Handle:
    """An open file that closes with its last user: a thread may still read what the cache has dropped."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardReader:
    """Reads encoded pixels by catalogue offset, safe between threads.

    In a folder one pread each, with few open files; in an object store one ranged request each.
    """

    def __init__(self, root: str | Path, open_files: int = 64) -> None:
        self._objects = open_store(root) if is_url(root) else None
        self._folder = Path(root) / "shards"
        self._capacity = open_files
        self._handles: OrderedDict[tuple[str, str], _Handle] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def remote(self) -> bool:
        """Whether each read is a request to an object store."""
        return self._objects is not None

    def read(self, modality: str, shard: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a shard.

        Raises FileNotFoundError, ValueError if it is too short, UserError for a disk or a store that fails
        again and again.
        """
        if self._objects is None:
            data = self._pread(modality, shard, offset, size)
        else:
            data = self._objects.read(f"shards/{modality}/{shard}", offset, size)
        if len(data) != size:
            raise ValueError(f"shard {shard} is shorter than its catalogue says: run ingest verify")
        return data

    def _pread(self, modality: str, shard: str, offset: int, size: int) -> bytes:
        """A few tries: a network file system may fail for a moment, or have dropped the open file."""
        for attempt in range(_ATTEMPTS):
            try:
                handle = self._handle(modality, shard)  # held by name until it is read, or it may close
                return os.pread(handle.fd, size, offset)
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                if attempt == _ATTEMPTS - 1:
                    cause = os.strerror(error.errno or 0)
                    raise UserError(
                        f"{self._folder}: {cause}, {_ATTEMPTS} times: check the disk or the network mount, "
                        "then run again"
                    ) from error
            with self._lock:
                self._handles.pop((modality, shard), None)
            time.sleep(_FIRST_WAIT * 2**attempt)
        raise AssertionError("not reached")

    def _handle(self, modality: str, shard: str) -> _Handle:
        name = (modality, shard)
        with self._lock:
            handle = self._handles.get(name)
            if handle is None:
                handle = self._handles[name] = _Handle(self._folder / modality / shard)
                if len(self._handles) > self._capacity:
                    self._handles.popitem(last=False)
            else:
                self._handles.move_to_end(name)
            return handle

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            self._handles.clear()
