"""The one way to read a source file: through the limits of the job, never more than they allow.

Under limits a worker reads each input once, whole, into a private copy (memory, a large one in an unlinked
temporary file), holds the copy to its identity and gives that to the decoder process. So every byte is
counted in one place, and one source file is open at a time.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ingest import limits

COPIES = "/proc/"  # where the copies are that this process made: read from the source already
_BUFFER_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20


def open_source(path: str) -> io.BufferedReader:
    """A source file to read from. Raises OSError."""
    meter = limits.current()
    if meter is None or path.startswith(COPIES):
        return open(path, "rb")
    from ingest.archives import forget

    forget()  # the archive that stayed open: one source file is open at a time
    raw = _Metered(io.FileIO(path), meter)
    return io.BufferedReader(raw, min(_BUFFER_BYTES, meter.lease_bytes))


def is_copied(path: str) -> bool:
    """Whether the decoder process gets a copy of the file, and not the file."""
    return limits.current() is not None and not path.startswith(COPIES)


def chunks(path: str, most: int) -> Iterator[bytes]:
    """The first `most` bytes of a source file, in pieces. Raises OSError."""
    with open_source(path) as file:
        while most > 0 and (data := file.read(min(_CHUNK_BYTES, most))):
            most -= len(data)
            yield data


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


class _Metered(io.RawIOBase):
    """A file of which each read waits for its bytes."""

    def __init__(self, file: io.FileIO, meter: limits.Meter) -> None:
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
