"""Images and small datasets for the benchmarks: CT-like, so that codecs and filters do honest work."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.codec import get_codec
from shards.commit import EncodedSample, commit_unit
from shards.dataset import DatasetInfo, open_or_create
from shards.ids import digest
from shards.schema import Row
from shards.stats import pixel_digest, pixel_statistics
from shards.store import Store

AIR_HU = -1000


def ct_slice(seed: int, side: int = 512) -> NDArray[np.int16]:
    """A body-like CT slice in HU, int16 [side, side]: tissue with texture at several scales, bone, noise."""
    rng = np.random.default_rng([7, seed])
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    angle = np.arctan2(y, x)
    radius = np.hypot(x / rng.uniform(0.75, 0.9), y / rng.uniform(0.55, 0.75)) + 0.04 * np.sin(3 * angle)
    image = np.full((side, side), AIR_HU, np.float32)
    tissue = 40 + sum(30 / (1 + i) * _smooth(rng, side, 4 * 2**i) for i in range(4))
    image = np.where(radius < 1, tissue, image)
    image = np.where((radius > 0.86) & (radius < 0.92), 600 + 80 * _smooth(rng, side, 32), image)
    image += rng.normal(0, 12, image.shape) * (radius < 1.02)
    return np.clip(np.rint(image), AIR_HU - 24, 3071).astype(np.int16)


def _smooth(rng: np.random.Generator, side: int, cells: int) -> NDArray[np.float32]:
    """A random field [side, side] with structures of side / cells pixels, about N(0, 1)."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def write_dataset(root: Path, scratch: Path, count: int, side: int = 512, shards: int = 4) -> None:
    """A dataset of `count` CT-like samples in `shards` shards, all in the training split, codec htj2k."""
    store = Store(root)
    open_or_create(store, DatasetInfo("htj2k", digest("bench"), "bench", modalities=("ct",)))
    for shard in range(shards):
        unit = digest("bench-unit", str(shard))
        samples = [_sample(unit, i, side) for i in range(shard, count, shards)]
        commit_unit(store, unit, samples, [], scratch, len(samples))


def _sample(unit: str, index: int, side: int) -> EncodedSample:
    pixels = ct_slice(index, side)
    key = digest("bench-sample", str(index))
    row: Row = {
        "key": key,
        "source": key,
        "unit": unit,
        "kind": "dicom",
        "modality": "ct",
        "split": "train",
        "patient": digest("bench-patient", str(index // 8)),
        "frame": 0,
        "codec": "htj2k",
        "rows": side,
        "columns": side,
        "dtype": "int16",
        "original_rows": side,
        "original_columns": side,
        "pixel_digest": pixel_digest(pixels),
        "inverted": False,
        "was_color": False,
        "lossy_source": False,
        "window_center": 40.0,
        "window_width": 400.0,
        "window_function": "LINEAR",
        **pixel_statistics(pixels),
    }
    return EncodedSample(row, get_codec("htj2k").encode(pixels))
