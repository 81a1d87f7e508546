"""Zip and tar (plain, gzip, bzip2, xz) as streams: listed and read within bounds, never unpacked to disk.

Members are untrusted: what is no plain file of a harmless name, or inflates beyond the limits, is refused.
Zips and plain tars are read by offset; a compressed tar forwards only, so its members are read in order.
"""

import hashlib
import io
import os
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from ingest.archive_streams import RATIO, RATIO_FREE, Direct, Forward, archive_kind, is_tar
from ingest.config import ReadRules
from ingest.frames import Refused
from ingest.sources import open_source, state_of
from shards.schema import Reason
from shards.store import clear_errors

PREFIX_BYTES = 256 << 10  # of a member, read with its listing: identity, sniffing, header scan
_ARCHIVE_RATIO_FREE = 1 << 30  # of all declared sizes of a zip
_MEMORY_BYTES = 512 << 20  # a larger member is held in an unlinked temporary file
_CHUNK = 1 << 20
_REFUSAL = "!"  # member ids of what is refused at listing: "!reason"


@dataclass(frozen=True)
class Member:
    """One file of an archive. key: how to find it again. check: what tells another member apart.

    reason: "" or why it is refused. Private: name.
    """

    key: str
    name: str
    size: int
    check: bytes = b""
    prefix: bytes = b""
    reason: str = ""

    @property
    def content(self) -> bytes:
        return hashlib.sha256(self.check + self.prefix).digest()


class Archive:
    """An open archive. Raises Refused (UNREADABLE, TOO_LARGE) for one that cannot be listed."""

    def __init__(self, file: BinaryIO, kind: str, rules: ReadRules) -> None:
        self.file, self.kind, self._rules = file, kind, rules
        self.sequential = kind not in ("zip", "tar")
        self._zip = _open_zip(file, rules.max_members) if kind == "zip" else None
        self._stream: Any = None
        self._walk: Iterator[Member] | None = None
        self._at: Member | None = None  # of a sequential one: the member whose prefix was read last
        self._drained = False

    def members(self) -> Iterator[Member]:
        """All members in the order of the archive; directories are none. The last may be the refused rest."""
        number = 0
        try:
            for number, member in enumerate(self._all()):
                if number >= self._rules.max_members:
                    raise Refused(Reason.TOO_LARGE)
                yield member
        except Refused as refused:
            yield Member(
                _REFUSAL + refused.reason.value, "", 0, str(number).encode(), b"", refused.reason.value
            )
        except (OSError, MemoryError):
            yield _rest(number, Reason.UNREADABLE)

    def find(self, key: str) -> Member:
        """A member again. Raises Refused (SOURCE_MISSING) where it is not there."""
        if self._zip is not None:
            infos = self._zip.infolist()
            if int(key) < len(infos):
                return self._zip_member(int(key), infos[int(key)])
        elif not self.sequential:
            for member in self._tar(int(key)):
                return member
        else:
            if self._at is not None and self._at.key == key and not self._drained:
                return self._at
            if self._walk is None or self._at is None or int(self._at.key) >= int(key):
                self._walk = self._tar(0)
            for member in self._walk:
                self._at, self._drained = member, False
                if member.key == key:
                    return member
            self._walk = self._at = None
        raise Refused(Reason.SOURCE_MISSING)

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of a member, in pieces. Raises Refused."""
        member = self.find(key)
        if member.reason:
            raise Refused(Reason(member.reason))
        self._drained = True
        if self._zip is not None:
            yield from _zip_chunks(self._zip, self._zip.infolist()[int(key)])
            return
        yield member.prefix
        left = member.size - len(member.prefix)
        while left:
            data = self._stream.read(min(_CHUNK, left))
            if not data:
                raise Refused(Reason.UNREADABLE)
            yield data
            left -= len(data)

    def _all(self) -> Iterator[Member]:
        if self._zip is None:
            yield from self._tar(0)
            return
        for index, info in enumerate(self._zip.infolist()):
            if not info.is_dir():
                yield self._zip_member(index, info)

    def _zip_member(self, index: int, info: zipfile.ZipInfo) -> Member:
        check = f"{info.CRC} {info.file_size} {info.compress_size}".encode()
        reason = _name_reason(info.filename) or self._size_reason(info.file_size)
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            reason = Reason.UNSAFE_MEMBER.value
        elif info.flag_bits & 0x41:
            reason = reason or Reason.ENCRYPTED.value
        elif info.file_size > max(RATIO_FREE, RATIO * info.compress_size):
            reason = reason or Reason.TOO_LARGE.value
        prefix = b""
        if not reason:
            assert self._zip is not None
            try:
                prefix = b"".join(_zip_chunks(self._zip, info, PREFIX_BYTES))
            except Refused as refused:
                reason = refused.reason.value
        return _member(str(index), info.filename, info.file_size, check, prefix, reason)

    def _tar(self, start: int) -> Iterator[Member]:
        """Members from an offset on; of a compressed one from its first."""
        if self.sequential:
            self._stream = Forward(self.file, self.kind)
        else:
            self.file.seek(start)
            self._stream = Direct(self.file)
        number = 0
        try:
            tar = tarfile.TarFile(fileobj=self._stream, encoding="utf-8", errors="surrogateescape")
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # of a million members none is kept
                if not info.isdir():
                    yield self._tar_member(str(number if self.sequential else info.offset), info)
                    number += 1
                if number > self._rules.max_members:
                    raise Refused(Reason.TOO_LARGE)
        except Refused:
            raise
        except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError, IndexError):
            raise Refused(Reason.UNREADABLE) from None
        if not self._stream.last or self._stream.last.strip(b"\0"):  # no end mark: something is missing
            raise Refused(Reason.UNREADABLE)

    def _tar_member(self, key: str, info: tarfile.TarInfo) -> Member:
        reason = _name_reason(info.name) or self._size_reason(info.size)
        if not info.isreg() or info.issparse():
            reason = Reason.UNSAFE_MEMBER.value
        prefix = b""
        if not reason:
            self._stream.seek(info.offset_data)
            prefix = self._stream.read(min(PREFIX_BYTES, info.size))
            if len(prefix) < min(PREFIX_BYTES, info.size):
                reason = Reason.UNREADABLE.value
        check = f"{info.mtime} {info.chksum} {info.size}".encode()
        return _member(key, info.name, max(0, info.size), check, prefix, reason)

    def _size_reason(self, size: int) -> str:
        return Reason.TOO_LARGE.value if size > self._rules.max_member_bytes else ""


def open_archive(file: BinaryIO, kind: str, rules: ReadRules) -> Archive | None:
    """None for bzip2 and xz that hold no tar. Raises Refused."""
    if kind in ("bz2", "xz"):
        try:
            head = Forward(file, kind).read(512)
        except Refused:
            return None
        if not is_tar(head):
            return None
    return Archive(file, kind, rules)


_kept: list[tuple[Any, Archive]] = []  # the archive that was read last, by path and state; at most one


def opened(path: str, rules: ReadRules) -> Archive:
    """The archive at a path; the last one stays open, so that its members are read in one pass."""
    state = (path, *state_of(path), rules.model_dump_json())
    if _kept and _kept[0][0] == state:
        return _kept[0][1]
    forget()
    file = open_source(path)
    try:
        archive = open_archive(file, archive_kind(file.read(4096)), rules)
        if archive is None:
            raise Refused(Reason.SOURCE_MISSING)
    except BaseException:
        file.close()
        raise
    _kept.append((state, archive))
    return archive


def forget() -> None:
    """Close the archive that stayed open."""
    while _kept:
        _kept.pop()[1].file.close()


@contextmanager
def spooled(path: str, key: str, rules: ReadRules) -> Iterator[str]:
    """A path under which a member can be read while the context lasts. Raises Refused."""
    if key.startswith(_REFUSAL):
        raise Refused(Reason(key[1:]))
    archive = opened(path, rules)
    size = archive.find(key).size
    with prepared(archive.chunks(key), size, rules.max_member_bytes) as local:
        yield local


@contextmanager
def prepared(chunks: Iterator[bytes], size: int, limit: int, memory: int = _MEMORY_BYTES) -> Iterator[str]:
    """Bytes as a file without a name: in memory, above `memory` bytes in an unlinked temporary file.

    Processes of the same user can read it, too. Raises Refused, UserError for a full disk.
    """
    if size <= memory and hasattr(os, "memfd_create"):
        file: Any = os.fdopen(os.memfd_create("input"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    with file:
        written = 0
        for chunk in chunks:
            written += len(chunk)
            if written > limit:
                raise Refused(Reason.TOO_LARGE)
            with clear_errors(tempfile.gettempdir()):
                file.write(chunk)
        with clear_errors(tempfile.gettempdir()):
            file.flush()
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _member(key: str, name: str, size: int, check: bytes, prefix: bytes, reason: str) -> Member:
    if not reason and archive_kind(prefix[:4096]):
        reason = Reason.NESTED_ARCHIVE.value
    return Member(key, name, size, check, prefix, reason)


def _rest(number: int, reason: Reason) -> Member:
    """What of an archive could not be listed."""
    return Member(_REFUSAL + reason.value, "", 0, str(number).encode(), b"", reason.value)


def _name_reason(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    unsafe = not name or name[0] in "/\\" or ".." in parts or "\0" in name or parts[0][1:2] == ":"
    return Reason.UNSAFE_MEMBER.value if unsafe else ""


def _open_zip(file: BinaryIO, most: int) -> zipfile.ZipFile:
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - (66 << 10)))
    tail = file.read()
    at, large = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    count = int.from_bytes(tail[at + 10 : at + 12], "little") if at >= 0 else 0
    directory = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if large >= 0:
        count = int.from_bytes(tail[large + 32 : large + 40], "little")
        directory = int.from_bytes(tail[large + 40 : large + 48], "little")
    if count > most or directory > max(most, 1000) * 256:
        raise Refused(Reason.TOO_LARGE)
    try:
        found = zipfile.ZipFile(file)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception:  # noqa: BLE001 - a damaged directory raises many things
        raise Refused(Reason.UNREADABLE) from None
    declared = sum(info.file_size for info in found.infolist())
    if declared > max(_ARCHIVE_RATIO_FREE, RATIO * size):
        raise Refused(Reason.TOO_LARGE)
    return found


def _zip_chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int | None = None) -> Iterator[bytes]:
    left = info.file_size if most is None else min(most, info.file_size)
    try:
        with archive.open(info) as file:
            while left:
                data = file.read(min(_CHUNK, left))
                if not data:
                    raise Refused(Reason.UNREADABLE)
                left -= len(data)
                yield data
            if most is None:
                file.read(1)  # holds the sum to what was read
    except (Refused, MemoryError, GeneratorExit):
        raise
    except Exception:  # noqa: BLE001 - damaged members raise many things; the texts hold their names
        raise Refused(Reason.UNREADABLE) from None
