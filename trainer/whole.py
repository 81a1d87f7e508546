"""Whole samples for evaluation: an image with its aspect, or the box of a volume. No torch."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards import catalog, reads
from shards.codec import MAXIMUM_REDUCE, Codec, get_codec
from shards.tar import ShardReader
from trainer.augment.intensity import to_unit
from trainer.config import IntensityConfig, VolumeConfig
from trainer.reading import encoded
from trainer.rows import Modality
from trainer.volumes import whole_box


def eval_images(
    root: str,
    modality: str,
    size: int,
    intensity: IntensityConfig | Mapping[str, IntensityConfig],
    split: str | None = None,
) -> tuple[tuple[str, ...], NDArray[np.float32], pa.Table]:
    """Whole images for probes, sorted by key: keys, f32[n, 1, size, size] in [0, 1], catalogue rows.

    intensity: of the modality, or data.intensity. See whole_image.
    """
    own = intensity if isinstance(intensity, IntensityConfig) else intensity.get(modality, IntensityConfig())
    table = catalog.load(root, modality, split=split)
    rows = Modality(modality, table)
    images = np.zeros((len(rows), 1, size, size), np.float32)
    reader = reads.BatchReader(root)
    try:
        for index, data in encoded(reader, rows, range(len(rows))):
            images[index, 0] = squared(data, rows.row(index), size, own)
    finally:
        reader.close()
    return tuple(table["key"].to_pylist()), images, table


def whole_shape(size: int | tuple[int, int, int]) -> tuple[int, ...]:
    """Of a whole image of that side, or of a box."""
    return (size, size) if isinstance(size, int) else size


def whole_sample(
    reader: ShardReader,
    modality: str,
    row: Mapping[str, Any],
    size: int | tuple[int, int, int],
    intensity: IntensityConfig,
    volume: VolumeConfig | None = None,
) -> NDArray[np.float32]:
    """A whole image, or the box of a volume with `volume`: f32 of whole_shape(size) in [0, 1]."""
    if volume is not None:
        return whole_box(reader, row, volume, intensity)
    assert isinstance(size, int)
    return whole_image(reader, modality, row, size, intensity)


def whole_image(
    reader: ShardReader, modality: str, row: Mapping[str, Any], size: int, intensity: IntensityConfig
) -> NDArray[np.float32]:
    """One image (`row` of Modality.row) as f32[size, size] in [0, 1]; see `squared`."""
    return squared(_read(reader, modality, row), row, size, intensity)


def squared(
    data: bytes, row: Mapping[str, Any], size: int, intensity: IntensityConfig
) -> NDArray[np.float32]:
    """An encoded image as f32[size, size] in [0, 1].

    It is shrunk by area averaging (or enlarged linearly) until its longer side is `size`, and centred on
    black: the aspect is kept and nothing is cut off.
    """
    longer, reduce = max(row["rows"], row["columns"]), 0
    while reduce < MAXIMUM_REDUCE and longer >> (reduce + 1) >= size:
        reduce += 1
    image = to_unit(decode(data, row, reduce), row, intensity)
    scale = size / max(image.shape)
    height, width = (min(max(round(s * scale), 1), size) for s in image.shape)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    y, x = (size - height) // 2, (size - width) // 2
    whole = np.zeros((size, size), np.float32)
    whole[y : y + height, x : x + width] = cv2.resize(image, (width, height), interpolation=method)
    return whole


def _read(reader: ShardReader, modality: str, row: Mapping[str, Any]) -> bytes:
    place = reads.Place(modality, row["shard"], row["offset"], row["size"], row.get("crc32"))
    return reads.read_one(reader, place)


def decode(data: bytes, row: Mapping[str, Any], reduce: int) -> NDArray:
    codec: Codec = get_codec(row["codec"])
    try:
        return codec.decode(data, reduce)
    except ValueError:  # of a sample without a CRC-32: the others are refused when they are read
        raise reads.damaged_shard(row["shard"], row["offset"]) from None
