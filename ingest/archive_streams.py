"""What an archive is by its first bytes, and its bytes as streams that a bomb cannot run away with."""

import bz2
import lzma
import zlib
from typing import Any, BinaryIO

from ingest.frames import Refused
from ingest.sniff import inflate_head
from shards.schema import Reason

RATIO, RATIO_FREE = 200, 64 << 20  # inflated / packed bytes that are refused, beyond so many inflated bytes
META_LIMIT = 1 << 20  # bytes of a name or of extended headers in a tar
_LZMA_MEMORY = 128 << 20
_CHUNK = 1 << 20


def archive_kind(head: bytes) -> str:
    """zip | tar | tar.gz | bz2 | xz | "" of the first bytes; of the last two the content is not looked at."""
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return "zip"
    if is_tar(head):
        return "tar"
    if head[:2] == b"\x1f\x8b":
        return "tar.gz" if is_tar(inflate_head(head)) else ""
    if head[:3] == b"BZh":
        return "bz2"
    return "xz" if head[:6] == b"\xfd7zXZ\0" else ""


def is_tar(head: bytes) -> bool:
    """A header block with the right sum (POSIX ustar, also without the magic)."""
    if len(head) < 512 or not head[0]:
        return False
    try:
        declared = int(head[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return declared == sum(head[:148]) + 8 * 32 + sum(head[156:512])


class Forward:
    """The inflated bytes of a stream, forwards only, with a guard on their ratio."""

    def __init__(self, file: BinaryIO, kind: str) -> None:
        file.seek(0)
        self._file, self._kind = file, kind
        self._packed = self._at = 0
        self._input = b""
        self._engine = self._new()
        self.last = b""

    def _new(self) -> Any:
        if self._kind == "tar.gz":
            return zlib.decompressobj(31)
        return bz2.BZ2Decompressor() if self._kind == "bz2" else lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < self._at:
            raise Refused(Reason.UNREADABLE)
        while self._at < position:
            if not self._some(min(_CHUNK, position - self._at)):
                break
        return self._at

    def read(self, count: int) -> bytes:
        if not 0 <= count <= META_LIMIT:
            raise Refused(Reason.TOO_LARGE)
        parts = []
        while count:
            part = self._some(count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        self.last = b"".join(parts)
        return self.last

    def _some(self, most: int) -> bytes:
        while True:
            if self._engine.eof:
                self._input = self._engine.unused_data or self._more()
                if not self._input.strip(b"\0"):
                    return b""
                self._engine = self._new()
            wanting = getattr(self._engine, "needs_input", True)
            if wanting and not self._input:
                self._input = self._more()
                if not self._input:
                    raise Refused(Reason.UNREADABLE)  # cut off
            try:
                found: bytes = self._engine.decompress(self._input, most)
            except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError):
                raise Refused(Reason.UNREADABLE) from None
            self._input = self._engine.unconsumed_tail if self._kind == "tar.gz" else b""
            self._at += len(found)
            if self._at > max(RATIO_FREE, RATIO * self._packed):
                raise Refused(Reason.TOO_LARGE)
            if found:
                return found

    def _more(self) -> bytes:
        data = self._file.read(64 << 10)
        self._packed += len(data)
        return data


class Direct:
    """A plain tar, with a limit on what one header may ask for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last = b""

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        return self._file.seek(position, whence)

    def read(self, count: int) -> bytes:
        if not 0 <= count <= META_LIMIT:
            raise Refused(Reason.TOO_LARGE)
        self.last = self._file.read(count)
        return self.last
