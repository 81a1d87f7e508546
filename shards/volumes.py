"""Pixels of volumes, slab by slab: only the slices asked for are read and decoded."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.codec import get_codec
from shards.schema import Row, members_of
from shards.tar import ShardReader

# What of a row (catalog.load of a partition like ct_volumes) read_slab needs.
SLAB_COLUMNS = ("modality", "shard", "codec", "slices", "offsets", "sizes")


def read_slab(
    reader: ShardReader, row: Row, start: int = 0, stop: int | None = None, reduce: int = 0
) -> NDArray[Any]:
    """Slices [start, stop) of a volume: [slices, rows, columns], in the order along their normal.

    stop None: to the last. reduce: rows and columns at 1/2**reduce of their size (shards.codec). One read of
    the store. Raises IndexError for a slab that is empty or outside, FileNotFoundError or ValueError where
    the dataset is damaged.
    """
    stop = row["slices"] if stop is None else stop
    if not 0 <= start < stop <= row["slices"]:
        raise IndexError(f"a slab lies inside the {row['slices']} slices, not [{start}, {stop})")
    places = members_of(row)[start:stop]
    first, last = places[0][0], sum(places[-1])
    if any(a >= b for (a, _), (b, _) in pairwise(places)):
        raise ValueError("the slices of the volume are out of order: run ingest verify")
    encoded = memoryview(reader.read(row["modality"], row["shard"], first, last - first))
    codec = get_codec(row["codec"])
    slab: NDArray[Any] | None = None
    for number, (offset, size) in enumerate(places):
        pixels = codec.decode(bytes(encoded[offset - first : offset - first + size]), reduce)
        if slab is None:
            slab = np.empty((len(places), *pixels.shape), pixels.dtype)
        if pixels.shape != slab.shape[1:] or pixels.dtype != slab.dtype:
            raise ValueError("the slices of the volume differ in size or type: run ingest verify --deep")
        slab[number] = pixels
    assert slab is not None
    return slab
