"""Where the pixel data of an open file lie: frames are read one by one, never the whole element."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np

from ingest.frames import Refused
from shards.schema import Reason

Span = tuple[int, int]  # absolute offset and bytes
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"  # PS3.5 annex A.4: items are little endian
_UNDEFINED = 0xFFFFFFFF
_PIXEL_DATA = 0x7FE00010
_LONG = frozenset((b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN"))


@dataclass(frozen=True)
class PixelElement:
    """The pixel element of a file that stays open; `file` may be an inflated data set in memory.

    start, length: of its value in bytes; length None: undefined, as of items. size: of the file. extended:
    value of ExtendedOffsetTable, b"" without one. big_words: big endian with VR OW.
    """

    file: BinaryIO
    keyword: str
    start: int
    length: int | None
    size: int
    big_endian: bool = False
    big_words: bool = False
    extended: bytes = b""

    def native(self, index: int, size: int, samples_of_a_byte: bool) -> bytes:
        """The `size` bytes of uncompressed frame `index`. Raises Refused (UNREADABLE): cut off."""
        self.check_native(index, size)
        begin, end = index * size, (index + 1) * size
        if not (self.big_words and samples_of_a_byte):
            return self._read((self.start + begin, size))
        # Two samples of a byte lie in each big endian word: they are swapped, over the ends of frames too.
        first = begin & ~1
        words = self._read((self.start + first, end + (end & 1) - first))
        swapped = (
            np.frombuffer(words.ljust(len(words) + len(words) % 2, b"\0"), ">u2").astype("<u2").tobytes()
        )
        return swapped[begin - first :][:size]

    def check_native(self, index: int, size: int) -> None:
        """Raise Refused (UNREADABLE) where uncompressed frame `index` of `size` bytes is cut off."""
        if self.length is None or (index + 1) * size > min(self.length, self.size - self.start):
            raise Refused(Reason.UNREADABLE)

    def joined(self, spans: list[Span], limit: int) -> bytes:
        """The bytes of fragments; at most `limit`. Raises Refused."""
        if sum(size for _, size in spans) > limit:
            raise Refused(Reason.TOO_LARGE)
        return b"".join(self._read(span) for span in spans)

    def _read(self, span: Span) -> bytes:
        self.file.seek(span[0])
        data = self.file.read(span[1])
        if len(data) < span[1] and span[0] + len(data) < self.size:
            raise Refused(Reason.UNREADABLE)
        return data

    def grouped(self, frames: int) -> list[list[Span]]:
        """The fragments of each frame: by an offset table, one each, or by the end marks of JPEG.

        Raises Refused: UNREADABLE for a file that is cut off, BAD_PIXEL_DESCRIPTION for another count.
        """
        fragments = self._fragments
        offsets = self._offsets
        if len(offsets) >= frames:
            return _by_offset(fragments, offsets)
        if frames == 1:
            return [fragments]
        if len(fragments) == frames:
            return [[span] for span in fragments]
        groups: list[list[Span]] = [[]]
        for start, size in fragments:
            groups[-1].append((start, size))
            tail = min(size, 10)
            if b"\xff\xd9" in self._read((start + size - tail, tail)):
                groups.append([])
        groups = [group for group in groups if group]
        if len(groups) != frames:
            raise Refused(Reason.BAD_PIXEL_DESCRIPTION)
        return groups

    @cached_property
    def _items(self) -> list[Span]:
        """Values of all items, of the basic offset table first (PS3.5 annex A.4). Raises Refused."""
        items: list[Span] = []
        at = self.start
        end = self.size if self.length is None else min(self.size, self.start + self.length)
        while at + 8 <= end:
            self.file.seek(at)
            head = self.file.read(8)
            length = int.from_bytes(head[4:], "little")
            if head[:4] == _END:
                return self._with_content(items)
            if head[:4] != _ITEM or length == _UNDEFINED or at + 8 + length > end:
                raise Refused(Reason.UNREADABLE)
            items.append((at + 8, length))
            at += 8 + length
        if self.length is None or at != end:  # cut off
            raise Refused(Reason.UNREADABLE)
        return self._with_content(items)

    @staticmethod
    def _with_content(items: list[Span]) -> list[Span]:
        if len(items) < 2:
            raise Refused(Reason.UNREADABLE)
        return items

    @cached_property
    def _fragments(self) -> list[Span]:
        return self._items[1:]

    @cached_property
    def _offsets(self) -> list[int]:
        """Offsets of the frames in the file, by the extended or the basic table; [] without a usable one."""
        table = self._read(self._items[0])
        base = self._fragments[0][0] - 8
        for data, dtype in ((self.extended, "<u8"), (table, "<u4")):
            if data and len(data) % int(dtype[2]) == 0:
                offsets = [base + 8 + int(offset) for offset in np.frombuffer(data, dtype)]
                starts = {start for start, _ in self._fragments}
                if offsets == sorted(set(offsets)) and offsets[0] == base + 8 and starts.issuperset(offsets):
                    return offsets
        return []


def _by_offset(fragments: list[Span], offsets: list[int]) -> list[list[Span]]:
    groups: list[list[Span]] = []
    starts = set(offsets)
    for span in fragments:
        if span[0] in starts:
            groups.append([])
        groups[-1].append(span)
    return groups


def locate(
    file: BinaryIO, size: int, explicit: bool, little: bool, extended: Callable[[], bytes]
) -> PixelElement | None:
    """The pixel element whose tag begins at the position of `file`; None where there is none."""
    order = "little" if little else "big"
    head = file.read(12)
    if len(head) < 8:
        return None
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)  # type: ignore[arg-type]
    names = {_PIXEL_DATA: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
    if tag not in names:
        return None
    start, representation = file.tell() - len(head), head[4:6]
    if explicit and representation in _LONG:
        if len(head) < 12:
            return None
        start, raw = start + 12, head[8:12]
    elif explicit and representation.isalpha() and representation.isupper():
        start, raw = start + 8, head[6:8]
    else:
        start, raw = start + 8, head[4:8]
    length = int.from_bytes(raw, order)  # type: ignore[arg-type]
    return PixelElement(
        file,
        names[tag],
        start,
        None if length == _UNDEFINED and len(raw) == 4 else length,
        size,
        big_endian=not little,
        big_words=not little and representation == b"OW",
        extended=extended(),
    )
