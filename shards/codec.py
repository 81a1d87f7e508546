"""Lossless image codecs behind one protocol: htj2k (default), png16, blosc2.

All take 2D [rows, columns] arrays of uint8, uint16 or int16 and give the same bytes for the same pixels.
`decode(data, reduce=r)` gives the image at 1/2**r of its size, each side rounded up: HTJ2K by leaving out
resolution levels of the codestream (ISO/IEC 15444-15), the others by area averaging after a full decode.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Protocol

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.stats import PIXEL_DTYPES, check_pixels

MAXIMUM_REDUCE = 2


class Codec(Protocol):
    """A lossless codec.

    decode raises ValueError for damage that the decoder reports; other damage gives wrong pixels, which
    only their digest tells (imagecodecs keeps errors in the middle of an HTJ2K codestream to itself).
    """

    @property
    def name(self) -> str: ...

    @property
    def extension(self) -> str: ...

    def encode(self, pixels: NDArray) -> bytes: ...

    def decode(self, data: bytes, reduce: int = 0) -> NDArray: ...


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises UserError for an unknown name or a codec this build lacks."""
    if name == "htj2k":
        return Htj2k()
    if name == "png16":
        return Png16()
    if name == "blosc2":
        if not imagecodecs.BLOSC2.available:
            raise UserError("codec blosc2 needs an imagecodecs built with blosc2: install it, or use htj2k")
        return Blosc2()
    raise UserError(f"unknown codec {name!r}: use htj2k, png16 or blosc2")


@dataclass(frozen=True)
class Htj2k:
    """High-throughput JPEG 2000, reversible 5/3 wavelet, one tile; signed pixels are native.

    The low pass of the wavelet overshoots at edges, and a decoder that leaves out levels wraps what falls
    outside the 16 bits: black beside white becomes white. So 8-bit pixels are coded in 16 bits (no larger),
    and a comment segment records dtype and extremes, from which `decode` unwraps and clips. Other decoders
    skip the comment.
    """

    name: str = "htj2k"
    extension: str = "j2c"

    def encode(self, pixels: NDArray) -> bytes:
        check_pixels(pixels)
        extremes = (int(pixels.min()), int(pixels.max()))
        comment = _COMMENT.pack(_COMMENT_MAGIC, PIXEL_DTYPES.index(pixels.dtype.name), *extremes)
        wide = pixels.astype(np.uint16) if pixels.dtype == np.uint8 else np.ascontiguousarray(pixels)
        data = bytes(imagecodecs.htj2k_encode(wide, reversible=True))
        place = _after_siz(data)
        # COM marker, its length, registration 0 (binary): ISO/IEC 15444-1 A.9.2
        return data[:place] + struct.pack(">HHH", 0xFF64, 4 + len(comment), 0) + comment + data[place:]

    def decode(self, data: bytes, reduce: int = 0) -> NDArray:
        _check_reduce(reduce)
        try:
            known = _read_comment(data)
            safe = known is not None and (known[2] - known[1]) * _LOW_PASS_GAIN[reduce] < 65000
            skip = reduce if safe else 0
            pixels = _checked(imagecodecs.htj2k_decode(data, skipres=skip or None))
        except (RuntimeError, ValueError, struct.error) as error:
            raise ValueError("damaged HTJ2K codestream") from error
        if known is not None:
            dtype, low, high = known
            pixels = (_unwrap(pixels, low, high) if skip else pixels).astype(dtype, copy=False)
        return area_reduce(pixels, reduce - skip)


_COMMENT = struct.Struct(">4sBii")  # magic, dtype index, minimum, maximum
_COMMENT_MAGIC = b"mwS1"
# How far the low pass of the 5/3 wavelet stretches a range at worst, after 0, 1 and 2 levels: the square of
# the sum of the absolute values of its filter (2D).
_LOW_PASS_GAIN = (1.0, 2.25, 2.640625)


def _after_siz(data: bytes) -> int:
    """Where the first optional marker segment may stand: after SOC and SIZ (ISO/IEC 15444-1 A.3)."""
    (length,) = struct.unpack_from(">H", data, 4)
    return 4 + length


def _read_comment(data: bytes) -> tuple[str, int, int] | None:
    """dtype, minimum and maximum that encode() recorded; None for a codestream of another encoder."""
    place = _after_siz(data) + 6
    if data[place : place + 4] != _COMMENT_MAGIC:
        return None
    _, index, low, high = _COMMENT.unpack_from(data, place)
    if index >= len(PIXEL_DTYPES) or low > high:
        raise ValueError("a damaged comment")
    return PIXEL_DTYPES[index], low, high


def _unwrap(pixels: NDArray, low: int, high: int) -> NDArray:
    """16-bit values modulo 2**16 -> [low, high]: the representative nearest to the middle, clipped."""
    if pixels.min() >= low and pixels.max() <= high:
        return pixels
    start = (low + high) // 2 - 32768
    above = pixels.view(np.uint16) - np.uint16(start % 65536)  # modulo 2**16 by the type
    return np.clip(above.astype(np.int32) + start, low, high)


@dataclass(frozen=True)
class Png16:
    """PNG of 8 or 16 bits. int16 is stored with an offset of 32768 and marked by a private chunk `mwSg`."""

    name: str = "png16"
    extension: str = "png"

    def encode(self, pixels: NDArray) -> bytes:
        check_pixels(pixels)
        signed = pixels.dtype == np.int16
        if signed:
            pixels = (pixels.astype(np.int32) + 32768).astype(np.uint16)
        # Settings of fast PNG: run-length strategy with the Sub filter.
        data = bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels), level=1, strategy=3, filter=16))
        return data[:_AFTER_IHDR] + _SIGNED_CHUNK + data[_AFTER_IHDR:] if signed else data

    def decode(self, data: bytes, reduce: int = 0) -> NDArray:
        _check_reduce(reduce)
        try:
            pixels = _checked(imagecodecs.png_decode(data))
        except (RuntimeError, ValueError) as error:
            raise ValueError("damaged PNG") from error
        if data[_AFTER_IHDR : _AFTER_IHDR + len(_SIGNED_CHUNK)] == _SIGNED_CHUNK:
            pixels = (pixels.astype(np.int32) - 32768).astype(np.int16)
        return area_reduce(pixels, reduce)


@dataclass(frozen=True)
class Blosc2:
    """blosc2 zstd with bit shuffle, behind 16 bytes: magic, dtype index, rows, columns (little endian)."""

    name: str = "blosc2"
    extension: str = "bl2"

    def encode(self, pixels: NDArray) -> bytes:
        check_pixels(pixels)
        header = _BLOSC_HEADER.pack(_BLOSC_MAGIC, PIXEL_DTYPES.index(pixels.dtype.name), *pixels.shape)
        little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
        body = imagecodecs.blosc2_encode(
            little.tobytes(),
            level=5,
            compressor="zstd",
            shuffle="bitshuffle",
            typesize=pixels.dtype.itemsize,
            numthreads=1,
        )
        return header + bytes(body)

    def decode(self, data: bytes, reduce: int = 0) -> NDArray:
        _check_reduce(reduce)
        try:
            magic, index, rows, columns = _BLOSC_HEADER.unpack_from(data)
            if magic != _BLOSC_MAGIC or index >= len(PIXEL_DTYPES):
                raise ValueError("not a blosc2 image of ours")
            body = imagecodecs.blosc2_decode(data[_BLOSC_HEADER.size :], numthreads=1)
            flat = np.frombuffer(body, np.dtype(PIXEL_DTYPES[index]).newbyteorder("<"))
            pixels = flat.reshape(rows, columns).astype(PIXEL_DTYPES[index])
        except (RuntimeError, ValueError, struct.error) as error:
            raise ValueError("damaged blosc2 image") from error
        return area_reduce(pixels, reduce)


_AFTER_IHDR = 8 + 25  # the PNG signature and the IHDR chunk, which is always first
_BLOSC_MAGIC = b"MWB2"
_BLOSC_HEADER = struct.Struct("<4sIII")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


_SIGNED_CHUNK = _png_chunk(b"mwSg", b"int16")


def _check_reduce(reduce: int) -> None:
    if not 0 <= reduce <= MAXIMUM_REDUCE:
        raise ValueError(f"reduce must be 0 to {MAXIMUM_REDUCE}, not {reduce}")


def _checked(pixels: NDArray) -> NDArray:
    check_pixels(pixels)
    return pixels


def area_reduce(pixels: NDArray, reduce: int) -> NDArray:
    """[rows, columns] -> [ceil(rows/2**r), ceil(columns/2**r)]: block means, rounded, dtype kept.

    Blocks at the lower and right edge average the pixels that are there.
    """
    if reduce == 0:
        return pixels
    step = 1 << reduce
    row_starts = np.arange(0, pixels.shape[0], step)
    column_starts = np.arange(0, pixels.shape[1], step)
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.int64), row_starts, 0), column_starts, 1)
    heights = np.diff(np.append(row_starts, pixels.shape[0]))
    widths = np.diff(np.append(column_starts, pixels.shape[1]))
    return np.rint(sums / np.outer(heights, widths)).astype(pixels.dtype)
