"""Open a DICOM file and take values out of its header without trusting it."""

import logging
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag

from ingest.dicom.element import PixelElement, locate
from ingest.frames import Refused
from ingest.sniff import has_preamble
from ingest.sources import open_source
from shards.schema import Reason

DEFLATED = "1.2.840.10008.1.2.1.99"
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_PIECE_BYTES = 1 << 20
_META_BYTES = 1 << 16  # a file meta group is a few hundred bytes


@contextmanager
def quiet() -> Iterator[None]:
    """Parsers put header values into warnings and log lines: those are PHI and go nowhere."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel", "nibabel.global", "PIL")]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def open_dataset(
    path: str | Path,
    limit: int,
    tags: Iterable[str] | None = None,
    pixels: bool = False,
) -> tuple[Dataset, str]:
    """Data set and transfer syntax UID of a Part 10 file; pixels: with the whole pixel element.

    limit: bytes that a deflated data set may inflate to. tags: keywords to read, None for all.
    Raises Refused: NO_PART10_HEADER, UNREADABLE, TOO_LARGE.
    """
    with open_source(str(path)) as file:
        dataset, syntax, _ = _parse(file, limit, tags, pixels)
    return dataset, syntax


def open_image(file: BinaryIO, limit: int) -> tuple[Dataset, str, PixelElement | None]:
    """Data set without pixels, transfer syntax UID, and where the pixels lie in `file`, which stays open.

    Raises Refused as open_dataset.
    """
    dataset, syntax, source = _parse(file, limit, None, False)
    implicit, little = dataset.original_encoding
    size = len(source.getbuffer()) if isinstance(source, BytesIO) else os.fstat(file.fileno()).st_size

    def extended() -> bytes:
        found = value(dataset, "ExtendedOffsetTable")
        return found if isinstance(found, bytes) else b""

    return dataset, syntax, locate(source, size, not implicit, little is not False, extended)


def _parse(
    file: BinaryIO, limit: int, tags: Iterable[str] | None, pixels: bool
) -> tuple[Dataset, str, BinaryIO]:
    """Data set, syntax and the stream it was read from, which stands before the pixel element."""
    head = file.read(_META_BYTES)
    if not has_preamble(head):
        raise Refused(Reason.NO_PART10_HEADER)
    file.seek(0)
    deflated = b"\x16\x00" + DEFLATED.encode() in head  # 22 bytes: a value length of two bytes, then the UID
    source: BinaryIO = _inflated(file.read(), limit) if deflated else file
    try:
        dataset = pydicom.dcmread(
            source, stop_before_pixels=not pixels, specific_tags=list(tags) if tags else None
        )
    except (MemoryError, KeyboardInterrupt):
        raise
    except InvalidDicomError:
        raise Refused(Reason.UNREADABLE) from None
    except Exception:  # noqa: BLE001 - a hostile header can raise anything out of the parser
        raise Refused(Reason.UNREADABLE) from None
    syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "") or "")
    if not syntax:
        raise Refused(Reason.NO_PART10_HEADER)
    return dataset, DEFLATED if deflated else syntax, source


def _inflated(data: bytes, limit: int) -> BytesIO:
    """A deflated file (PS3.5 annex A.5) as an explicit little endian one, at most `limit` bytes of it.

    pydicom would inflate all of it whatever is asked for: 230 kB can become 400 MB.
    """
    try:
        # (0002,0000) UL, 4 bytes: the length of the file meta group (PS3.10 section 7.1).
        start = 144 + int.from_bytes(data[140:144], "little")
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        plain = _EXPLICIT_LITTLE.encode().ljust(len(DEFLATED), b"\0")
        found = BytesIO()
        left = limit + found.write(data[:start].replace(DEFLATED.encode(), plain))
        rest = data[start:]
        while rest and found.tell() < left:  # piece by piece: one copy of the whole is enough
            found.write(stream.decompress(rest, min(_PIECE_BYTES, left - found.tell())))
            rest = stream.unconsumed_tail
    except Exception:  # noqa: BLE001 - as above
        raise Refused(Reason.UNREADABLE) from None
    if rest:
        raise Refused(Reason.TOO_LARGE)
    found.seek(0)
    return found


@lru_cache(maxsize=1024)
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)


def value(dataset: Dataset, keyword: str) -> Any:
    """The value of an element; None where it is missing, empty or does not parse."""
    tag = _tag(keyword)
    if tag not in dataset.keys():  # noqa: SIM118 - `in dataset` makes a tag of the tag once more
        return None  # most of what is asked for: Dataset.get is ten times slower
    try:
        found = dataset[tag].value
    except Exception:  # noqa: BLE001 - the parser converts lazily: a bad optional value is a missing one
        return None
    if found is None or (isinstance(found, str | bytes | MultiValue) and len(found) == 0):
        return None
    return found


def text(dataset: Dataset, keyword: str) -> str:
    """The value as stripped text, of several values the first; "" where there is none. Private."""
    found = first(value(dataset, keyword))
    try:
        return "" if found is None else str(found).replace("\0", "").strip()
    except Exception:  # noqa: BLE001 - a person name or a text of an unknown character set
        return ""


def texts(dataset: Dataset, keyword: str) -> list[str]:
    """All values of an element as upper-case text."""
    found = value(dataset, keyword)
    if found is None:
        return []
    return [str(v).strip().upper() for v in (found if isinstance(found, MultiValue | list) else [found])]


def number(dataset: Dataset, keyword: str) -> float | None:
    """The (first) value as a finite float, else None."""
    return to_float(first(value(dataset, keyword)))


def integer(dataset: Dataset, keyword: str) -> int | None:
    found = number(dataset, keyword)
    return int(found) if found is not None and found == int(found) and abs(found) < 2**31 else None


def numbers(dataset: Dataset, keyword: str, count: int) -> list[float] | None:
    """Exactly `count` finite floats, else None."""
    found = value(dataset, keyword)
    if not isinstance(found, MultiValue | list) or len(found) != count:
        return None
    converted = [to_float(v) for v in found]
    return [v for v in converted if v is not None] if None not in converted else None


def first(found: Any) -> Any:
    return found[0] if isinstance(found, MultiValue | list) and len(found) else found


def to_float(found: Any) -> float | None:
    try:
        converted = float(found)
    except (TypeError, ValueError, OverflowError):
        return None
    return converted if math.isfinite(converted) else None


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; [] where there is none."""
    found = value(dataset, keyword)
    if found is None or isinstance(found, str | bytes):
        return []
    try:
        return [item for item in found if isinstance(item, Dataset)]
    except TypeError:
        return []


def item(dataset: Dataset, keyword: str, index: int = 0) -> Dataset | None:
    """One item of a sequence; None where there is none. Does not look at the others."""
    found = value(dataset, keyword)
    if found is None or isinstance(found, str | bytes):
        return None
    try:
        return found[index] if isinstance(found[index], Dataset) else None
    except (TypeError, IndexError, KeyError):
        return None
