"""The voxels of a NIfTI file, slab by slab: in memory when small, else read as the file is read."""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ingest.frames import Refused
from shards.schema import Reason

Shape = tuple[int, int, int, int]  # x, y, z, t as stored; x varies fastest
IN_MEMORY_BYTES = 128 << 20  # of voxels; a larger volume is read slab by slab
_BLOCK_BYTES = 8 << 20


class Voxels(Protocol):
    """Voxels as stored, shape [x, y, z, t]."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...

    def blocks(self) -> Iterator[NDArray]:
        """All voxels in flat pieces."""
        ...

    def slabs(self, axis: int, times: list[int], backwards: bool) -> Iterator[tuple[int, int, NDArray]]:
        """(slice along the stored `axis`, time point, [x, y, z] of which `axis` is 1 long), time by time.

        backwards: the last slice first, where that costs nothing.
        """
        ...


@dataclass(frozen=True)
class LoadedVoxels:
    """All in memory."""

    data: NDArray  # [x, y, z, t]

    @property
    def shape(self) -> Shape:
        x, y, z, t = self.data.shape
        return x, y, z, t

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def blocks(self) -> Iterator[NDArray]:
        yield self.data.ravel(order="K")

    def slabs(self, axis: int, times: list[int], backwards: bool) -> Iterator[tuple[int, int, NDArray]]:
        for t in times:
            for k in range(self.data.shape[axis])[:: -1 if backwards else 1]:
                yield k, t, np.take(self.data[..., t], [k], axis)


@dataclass(frozen=True)
class StreamedVoxels:
    """Read from the start for every pass, skipping what is not asked for; at most a slab is in memory.

    Slices run along z (the last stored axis of space).
    """

    path: str
    packed: bool  # gzip
    offset: int  # bytes before the voxels
    shape: Shape
    dtype: np.dtype

    def blocks(self) -> Iterator[NDArray]:
        left = math.prod(self.shape) * self.dtype.itemsize
        with open(self.path, "rb") as raw:
            file = _unpacked(raw, self.packed)
            _skip(file, self.offset, self.packed)
            while left:
                count = min(left, _BLOCK_BYTES)
                yield np.frombuffer(_exactly(file, count), self.dtype)
                left -= count
            _check_sum(file, self.packed)

    def slabs(self, axis: int, times: list[int], backwards: bool) -> Iterator[tuple[int, int, NDArray]]:
        assert axis == 2
        x, y, z, _ = self.shape
        size = x * y * self.dtype.itemsize
        with open(self.path, "rb") as raw:
            file = _unpacked(raw, self.packed)
            at = 0
            for t in times:
                for k in range(z):
                    wanted = self.offset + (k + z * t) * size
                    _skip(file, wanted - at, self.packed)
                    data = _exactly(file, size)
                    at = wanted + size
                    yield k, t, np.frombuffer(data, self.dtype).reshape((x, y, 1), order="F")


def open_voxels(path: str, packed: bool, offset: int, shape: Shape, dtype: np.dtype, axis: int) -> Voxels:
    """Voxels of a file whose header was checked. axis: along which slabs will be asked for.

    Raises Refused: UNREADABLE for a file that ends early, TOO_LARGE for more than IN_MEMORY_BYTES of which
    the slices lie across the file.
    """
    size = math.prod(shape) * dtype.itemsize
    if not packed and os.stat(path).st_size < offset + size:  # noqa: PTH116 - of what is opened next
        raise Refused(Reason.UNREADABLE)
    if size > IN_MEMORY_BYTES:
        if axis != 2:
            raise Refused(Reason.TOO_LARGE)
        return StreamedVoxels(path, packed, offset, shape, dtype)
    with open(path, "rb") as raw:
        file = _unpacked(raw, packed)
        _skip(file, offset, packed)
        data = _exactly(file, size)
        _check_sum(file, packed)
    return LoadedVoxels(np.frombuffer(data, dtype).reshape(shape, order="F"))


def _unpacked(raw: BinaryIO, packed: bool) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[return-value]


def _skip(file: BinaryIO, count: int, packed: bool) -> None:
    if not packed:
        file.seek(count, os.SEEK_CUR)
        return
    while count > 0:
        count -= len(_exactly(file, min(count, _BLOCK_BYTES)))


def _check_sum(file: BinaryIO, packed: bool) -> None:
    """Behind the voxels: read on to the end of a gzip stream, where its CRC is compared (RFC 1952, 2.3.1).

    Not beyond a block: then something else follows the voxels, however long.
    """
    if not packed:
        return
    try:
        file.read(_BLOCK_BYTES)
    except (OSError, EOFError, zlib.error):
        raise Refused(Reason.UNREADABLE) from None


def _exactly(file: BinaryIO, count: int) -> bytes:
    try:
        data = file.read(count)
    except (OSError, EOFError, zlib.error):
        raise Refused(Reason.UNREADABLE) from None
    if len(data) < count:
        raise Refused(Reason.UNREADABLE)
    return data
