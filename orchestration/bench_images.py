"""Images and small datasets for the benchmarks: like CT or X-ray, to give codecs and filters honest work."""

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


def radiograph(seed: int, side: int = 1200) -> NDArray[np.uint16]:
    """A chest-like radiograph of 12 bits, uint16 [side, side]: lungs, spine, ribs, fine texture and noise.

    About 4 bits a pixel as HTJ2K; real ones of 10 bits, shrunk to 1200 px, have 2 to 2.4.
    """
    rng = np.random.default_rng([8, seed])
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    image = 2600 - 500 * y - 700 * np.hypot(x, y / 1.3) ** 4
    for sign in (-1, 1):  # larger is brighter: lungs are dark
        inside = ((x - sign * rng.uniform(0.38, 0.44)) / 0.27) ** 2 + (
            (y + 0.1) / rng.uniform(0.55, 0.65)
        ) ** 2
        image -= 1300 / (1 + np.exp(np.minimum(12 * (inside - 1), 60)))
    image += 500 * np.exp(-((x / 0.09) ** 2))
    ribs = np.sin(rng.uniform(22, 26) * (y + 0.35 * x**2)) ** 8
    image += 160 * ribs * (np.abs(x) < 0.75)
    image += sum(90 / (1 + i) * _smooth(rng, side, 4 * 3**i) for i in range(5))
    image += rng.normal(0, 1.8, image.shape)
    return np.clip(np.rint(image), 0, 4095).astype(np.uint16)


def _smooth(rng: np.random.Generator, side: int, cells: int) -> NDArray[np.float32]:
    """A random field [side, side] with structures of side / cells pixels, about N(0, 1)."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def write_dataset(
    root: Path, scratch: Path, count: int, side: int = 512, shards: int = 4, modality: str = "ct"
) -> None:
    """A dataset of `count` samples, ct or xr, in `shards` shards, all in the training split, codec htj2k."""
    store = Store(root)
    open_or_create(store, DatasetInfo("htj2k", digest("bench"), "bench", modalities=(modality,)))
    for shard in range(shards):
        unit = digest("bench-unit", str(shard))
        samples = [
            sample_of(unit, i, modality, made_up(modality, i, side)) for i in range(shard, count, shards)
        ]
        commit_unit(store, unit, samples, [], scratch, len(samples))


def made_up(modality: str, index: int, side: int) -> NDArray:
    """The pixels of a sample of `write_dataset`."""
    return ct_slice(index, side) if modality == "ct" else radiograph(index, side)


def sample_of(unit: str, index: int, modality: str, pixels: NDArray) -> EncodedSample:
    """The `index`-th sample of a unit of generated images, in the training split, codec htj2k."""
    rows, columns = pixels.shape
    key = digest("bench-sample", modality, str(index))
    row: Row = {
        "key": key,
        "source": key,
        "unit": unit,
        "kind": "dicom",
        "modality": modality,
        "split": "train",
        "patient": digest("bench-patient", str(index // 8)),
        "frame": 0,
        "codec": "htj2k",
        "rows": rows,
        "columns": columns,
        "dtype": pixels.dtype.name,
        "original_rows": rows,
        "original_columns": columns,
        "pixel_digest": pixel_digest(pixels),
        "inverted": False,
        "was_color": False,
        "lossy_source": False,
        "window_center": 40.0 if modality == "ct" else None,
        "window_width": 400.0 if modality == "ct" else None,
        "window_function": "LINEAR" if modality == "ct" else None,
        **pixel_statistics(pixels),
    }
    return EncodedSample(row, get_codec("htj2k").encode(pixels))
