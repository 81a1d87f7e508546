"""A small dataset of three modalities and a configuration that reads it."""

from pathlib import Path

import numpy as np

from shards.codec import get_codec
from shards.commit import EncodedSample, commit_unit
from shards.dataset import open_or_create
from shards.ids import digest
from shards.stats import pixel_digest, pixel_statistics
from shards.store import Store
from tests.augment.images import phantom
from tests.shards.make import PSEUDONYMS, info
from trainer.config import CropConfig, DataConfig, TrainConfig, ViewConfig

MODALITIES = ("ct", "us", "xr")
COUNTS = {"ct": 11, "us": 7, "xr": 9}


def image(modality: str, number: int) -> np.ndarray:
    """Pixels [rows, columns] as stored: int16 HU, uint8 or uint16; sizes differ between samples."""
    rows, columns = 60 + 5 * (number % 4), 72 - 3 * (number % 3)
    unit = phantom(rows, columns, seed=number, noise=0.02 + 0.01 * (number % 3))
    if modality == "ct":
        return (unit * 2000 - 1000).astype(np.int16)
    return (unit * 255).astype(np.uint8) if modality == "us" else (unit * 4095).astype(np.uint16)


def sample(
    unit: str, modality: str, number: int, pixels: np.ndarray, split: str, codec: str
) -> EncodedSample:
    row = {
        "key": PSEUDONYMS.id("sample", f"{modality}{number}"),
        "source": PSEUDONYMS.id("source", f"{modality}{number}"),
        "unit": unit,
        "kind": "dicom",
        "modality": modality,
        "split": split,
        "patient": PSEUDONYMS.id("patient", f"P{number}"),
        "frame": 0,
        "codec": codec,
        "rows": pixels.shape[0],
        "columns": pixels.shape[1],
        "dtype": pixels.dtype.name,
        "original_rows": pixels.shape[0],
        "original_columns": pixels.shape[1],
        "pixel_digest": pixel_digest(pixels),
        "inverted": False,
        "was_color": False,
        "lossy_source": False,
    } | pixel_statistics(pixels)
    if modality == "ct":
        row |= {"window_center": 40.0, "window_width": 1200.0, "window_function": "LINEAR"}
    return EncodedSample(row, get_codec(codec).encode(pixels))


def dataset(root: Path, scratch: Path, codec: str = "htj2k", held_out: int = 2) -> str:
    """A committed dataset: COUNTS training images a modality and `held_out` test images more."""
    store = Store(root)
    open_or_create(store, info(codec=codec, modalities=MODALITIES))
    for modality, count in COUNTS.items():
        unit = digest("unit", modality)
        samples = [
            sample(unit, modality, n, image(modality, n), "train" if n < count else "test", codec)
            for n in range(count + held_out)
        ]
        commit_unit(store, unit, samples, [], scratch, len(samples))
    return str(root)


def config(root: str, batch_size: int = 12, cache_bytes: int = 0, **views) -> TrainConfig:
    small = {
        "crops": (
            CropConfig(count=2, size=40, share=(0.3, 1.0)),
            CropConfig(count=3, size=24, share=(0.05, 0.3)),
        )
    }
    return TrainConfig(
        seed=5,
        data=DataConfig(dataset=root, modalities=MODALITIES, batch_size=batch_size, cache_bytes=cache_bytes),
        views=ViewConfig(**small | views),
        swav={"queue_length": 0},
    )
