"""A cache of ranges of shards on a disk of the node: several processes share it, its size is limited.

Keys are names of content: a shard's name is a digest of its committed sha256, so a range of it never changes
and datasets may share a folder. An entry is a file: a header with a CRC-32 of each 64 KiB, then the bytes.
It is written under another name and renamed: no reader sees a part of it, and what a power cut left of it
fails its checks. Nothing is locked: two processes that miss at once both read and the second rename wins; two
that make room at once remove the same oldest files.
"""

import contextlib
import hashlib
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from shards.errors import UserError

_MAGIC = b"MSWCACH1"
_HEAD = struct.Struct("<8sQI")  # magic, bytes of the payload, CRC-32 of what follows in the header
_CHUNK = 64 << 10
_FOLDERS = 256
_TEMPORARY = ".tmp-"
_TEMPORARY_SECONDS = 600.0  # older ones were left by killed writers
_TOUCH_SECONDS = 60.0  # a hit renews an entry's time at most so often
# Filled up to 7/8 before old entries go; each process looks after every 1/256 of the limit that it wrote, so
# that 32 processes between two looks stay below it.
KEEP, _LOOK = 7 / 8, 1 / 256
_ENTRIES = 32  # fit at least


@dataclass
class Usage:
    """What this process did: entries found, not found, written, removed; entries that failed their checks."""

    hits: int = 0
    misses: int = 0
    written_bytes: int = 0
    evicted: int = 0
    damaged: int = 0


class NodeCache:
    """`get` and `put` by name, safe between threads and processes. Never raises for a disk that fails: then
    it is a miss. Raises UserError where the folder cannot be made.

    limit: bytes of all files in it; an entry of more than a 32nd of that is not kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self.usage = Usage()
        self._since_look = limit  # the first put looks
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError
        except OSError:
            raise UserError(
                f"data.node_cache={folder} cannot be written: name a folder on a disk of the node, or leave "
                "it out"
            ) from None

    def get(self, name: str, offset: int, size: int) -> bytes | None:
        """`size` bytes at `offset` of an entry, or None: not there, or not what was put."""
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.usage.misses += 1
            return None
        try:
            data = _checked(fd, offset, size)
            if data is not None and time.time() - os.fstat(fd).st_mtime > _TOUCH_SECONDS:
                os.utime(fd)
        except OSError:
            data = None
        finally:
            os.close(fd)
        if data is None:
            self.usage.damaged += 1
            self.usage.misses += 1
            self.drop(name)
            return None
        self.usage.hits += 1
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep an entry, whole or not at all."""
        size = _header_bytes(len(data)) + len(data)
        if size > self._limit // _ENTRIES:
            return
        self._since_look += size
        if self._since_look >= self._limit * _LOOK:
            self.make_room(size)
            self._since_look = size
        path = self._path(name)
        temporary = path.with_name(f"{_TEMPORARY}{os.urandom(8).hex()}")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "xb", buffering=0) as file:
                view = memoryview(_header(data) + data)
                while view:
                    view = view[file.write(view) or 0 :]
            temporary.rename(path)
            self.usage.written_bytes += size
        except OSError:  # a full disk: the cache is no reason to stop
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Remove an entry."""
        with contextlib.suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._files())

    def make_room(self, wanted: int) -> None:
        """Remove what was not used for longest until `wanted` bytes fit below the mark."""
        files = sorted(self._files())
        total, now = sum(size for _, size, _ in files) + wanted, time.time()
        for used, size, path in files:
            left_behind = path.name.startswith(_TEMPORARY) and now - used > _TEMPORARY_SECONDS
            if left_behind or total > self._limit * KEEP:
                with contextlib.suppress(OSError):
                    path.unlink()
                    self.usage.evicted += 1
                total -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for number in range(_FOLDERS):
            try:
                with os.scandir(self._folder / f"{number:02x}") as entries:
                    for entry in entries:
                        with contextlib.suppress(OSError):  # another process has removed it
                            known = entry.stat()
                            found.append((known.st_mtime, known.st_size, Path(entry.path)))
            except OSError:
                continue
        return found

    def _path(self, name: str) -> Path:
        key = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / key[:2] / key[2:42]


def _header_bytes(size: int) -> int:
    return _HEAD.size + 4 * -(-size // _CHUNK)


def _header(data: bytes) -> bytes:
    view = memoryview(data)
    sums = [crc32(view[start : start + _CHUNK]) for start in range(0, len(data), _CHUNK)]
    packed = struct.pack(f"<{len(sums)}I", *sums)
    return _HEAD.pack(_MAGIC, len(data), crc32(packed, len(data) & 0xFFFFFFFF)) + packed


def _checked(fd: int, offset: int, size: int) -> bytes | None:
    """A range of an entry, after the checks of the chunks that it lies in."""
    head = os.pread(fd, _HEAD.size, 0)
    if len(head) < _HEAD.size:
        return None
    magic, length, check = _HEAD.unpack(head)
    begin = _header_bytes(length) if magic == _MAGIC and length < 1 << 40 else 0
    if not begin or os.fstat(fd).st_size != begin + length or offset + size > length:
        return None
    packed = os.pread(fd, begin - _HEAD.size, _HEAD.size)
    if crc32(packed, length & 0xFFFFFFFF) != check:
        return None
    first, last = offset // _CHUNK, -(-(offset + size) // _CHUNK)
    start, end = first * _CHUNK, min(last * _CHUNK, length)
    data = os.pread(fd, end - start, begin + start)
    view = memoryview(data)
    sums = struct.unpack(f"<{last - first}I", packed[4 * first : 4 * last])
    if len(data) != end - start or any(
        crc32(view[i * _CHUNK : (i + 1) * _CHUNK]) != known for i, known in enumerate(sums)
    ):
        return None
    return data[offset - start : offset - start + size]
