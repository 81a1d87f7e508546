"""The one way to read a source: a file or an object of a bucket, within the limits of the job.

Under limits, and of a bucket, a worker reads each input once, whole, into a private copy (memory, a large one
in an unlinked temporary file), holds the copy to its identity and gives that to the decoder process. So every
byte is counted in one place, one source file is open at a time, and the decoder process needs no network.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ingest import limits
from shards.objects import ObjectStore, is_url

COPIES = "/proc/"  # where the copies are that this process made: read from the source already
BUFFER_BYTES = 1 << 20
_CHUNK_BYTES = 8 << 20  # an object up to this size is one request


def open_source(path: str, buffer: int = BUFFER_BYTES) -> io.BufferedReader:
    """A source to read from. Raises OSError, of a bucket FileNotFoundError and UserError."""
    meter = limits.current()
    if path.startswith(COPIES):
        return open(path, "rb")
    if meter is None and not is_url(path):
        return open(path, "rb")
    from ingest.archives import forget

    forget()  # the archive that stayed open: one source file is open at a time
    meter = meter or limits.Meter(None)
    if not is_url(path):
        buffer = min(64 << 10, meter.lease_bytes)  # of a file, a small read stays small
    return io.BufferedReader(_Metered(_Object(path) if is_url(path) else io.FileIO(path), meter), buffer)


def is_copied(path: str) -> bool:
    """Whether the decoder process gets a copy of the file, and not the file."""
    return is_url(path) or (limits.current() is not None and not path.startswith(COPIES))


def chunks(path: str, most: int) -> Iterator[bytes]:
    """The first `most` bytes of a source, in pieces, all of one state. Raises as open_source.

    One that is written to or replaced in the middle is FileNotFoundError: pieces of two make none.
    """
    if not is_url(path):
        with open_source(path) as file:
            found = os.fstat(file.fileno())
            while most > 0 and (data := file.read(min(BUFFER_BYTES, most))):
                most -= len(data)
                yield data
            after = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise FileNotFoundError
        return
    meter = limits.current() or limits.Meter(None)
    store, name = split(path)
    before = store.state(name) if most > min(_CHUNK_BYTES, meter.lease_bytes) else None
    offset = 0
    while offset < most:
        wanted = meter.take(min(_CHUNK_BYTES, most - offset))
        data = store.read(name, offset, wanted)
        offset += len(data)
        yield data
        if len(data) < wanted:
            meter.give_back(wanted - len(data))
            break
    if before is not None and store.state(name) != before:
        raise FileNotFoundError


def prefix(path: str, count: int) -> bytes:
    """The first bytes of an object: one request."""
    return b"".join(chunks(path, count))


def size_of(path: str) -> int:
    """Bytes of a source, 0 where it is not there."""
    try:
        return split(path)[0].size(split(path)[1]) if is_url(path) else os.stat(path).st_size  # noqa: PTH116
    except (OSError, ValueError):
        return 0


def state_of(path: str) -> tuple[Any, ...]:
    """What changes when a source is replaced or written to. Raises OSError."""
    if is_url(path):
        store, name = split(path)
        return store.state(name)
    found = os.stat(path)  # noqa: PTH116
    return found.st_size, found.st_mtime_ns


def real_path(path: str) -> str:
    """The one path of a file behind links; of an object its URL."""
    return path if is_url(path) else os.path.realpath(path)


def split(url: str) -> tuple[ObjectStore, str]:
    """The bucket and the key."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return bucket_store(f"{scheme}://{bucket}"), key


@lru_cache(maxsize=8)
def bucket_store(root: str) -> ObjectStore:
    return ObjectStore(root)


def objects(source: str, output: str) -> Iterator[tuple[str, str, int]]:
    """(URL, key below the source, bytes) of the objects of s3://bucket/prefix, without those of `output`.

    A source may be one object. Raises UserError.
    """
    store, top = split(source)
    nothing = True
    for name, size in store.each(top):
        nothing = False
        url = f"{store.root}/{name}"
        if not (output and f"{url}/".startswith(output.rstrip("/") + "/")):
            yield url, name[len(top) + 1 if top else 0 :], size
    if nothing and top and store.exists(top):
        yield source, top.rpartition("/")[2], store.size(top)


def is_odd(key: str) -> bool:
    """Whether a key is no path, so that no file could have it: refused, as a file system would."""
    return any(part in ("", ".", "..") for part in key.split("/"))


@contextmanager
def limited(meter: limits.Meter | None) -> Iterator[None]:
    """limits.metered, without a file that stays open behind its end."""
    from ingest.archives import forget

    forget()
    with limits.metered(meter):
        try:
            yield
        finally:
            if meter is not None:
                forget()


class _Object(io.RawIOBase):
    """Ranged reads of an object."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._store, self._name = split(url)
        self._size, self._at = self._store.size(self._name), 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        if self._at < 0:
            raise ValueError("a negative position")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._store.read(self._name, self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Metered(io.RawIOBase):
    """A file of which each read waits for its bytes."""

    def __init__(self, file: io.FileIO | _Object, meter: limits.Meter) -> None:
        super().__init__()
        self._file, self._meter = file, meter
        self.name = ""  # pydicom asks for one

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: Any) -> int:
        count = self._meter.take(len(buffer))
        got = self._file.readinto(memoryview(buffer)[:count]) or 0
        if got < count:
            self._meter.give_back(count - got)
        return got

    def close(self) -> None:
        self._file.close()
        super().close()
