"""A small dataset of head CT volumes, and a configuration that pretrains on it in seconds."""

from pathlib import Path

import numpy as np

from ingest.frames import Stack
from ingest.stacks import Kept, stacked
from shards.codec import get_codec
from shards.commit import EncodedSample, commit_unit
from shards.dataset import open_or_create
from shards.ids import digest
from shards.stats import pixel_digest, pixel_statistics
from shards.store import Store
from tests.shards.make import PSEUDONYMS, info
from tests.trainer.fake import changed
from tests.volumes.heads import Head, make
from trainer.config import TrainConfig

SPACING = (12.0, 4.0, 4.0)


def dataset(root: Path, scratch: Path, train: int = 6, held_out: int = 2) -> str:
    """Committed volumes of 20 slices of 64 x 64 px, of different shape and noise."""
    store = Store(root)
    open_or_create(store, info(modalities=("ct",)))
    for number in range(train + held_out):
        unit = digest("unit", str(number))
        pixels = head(number)
        rows = [
            _row(unit, number, z, image, "train" if number < train else "val")
            for z, image in enumerate(pixels)
        ]
        found = stacked([Kept(row, Stack((), ())) for row in rows], unit, PSEUDONYMS)
        codec = get_codec("htj2k")
        samples = [
            EncodedSample(row | found.places[row["key"]], codec.encode(image))
            for row, image in zip(rows, pixels, strict=True)
        ]
        commit_unit(store, unit, samples, [], scratch, len(samples), volumes=found.volumes)
    return str(root)


def head(number: int) -> np.ndarray:
    """int16 HU [20, 64, 64]."""
    radii = (100.0, 92.0 - 3 * (number % 4), 74.0 + 3 * (number % 3))
    volume, _ = make(Head(SPACING, (64, 64), (124.0, 128.0), radii=radii), seed=number)
    return np.rint(volume).astype(np.int16)


def _row(unit: str, number: int, z: int, image: np.ndarray, split: str) -> dict:
    name = f"head{number}-{z}"
    return {
        "key": PSEUDONYMS.id("sample", name),
        "source": PSEUDONYMS.id("source", name),
        "unit": unit,
        "kind": "dicom",
        "modality": "ct",
        "split": split,
        "patient": PSEUDONYMS.id("patient", f"P{number}"),
        "series": PSEUDONYMS.id("series", f"S{number}"),
        "frame": 0,
        "codec": "htj2k",
        "rows": image.shape[0],
        "columns": image.shape[1],
        "dtype": image.dtype.name,
        "original_rows": image.shape[0],
        "original_columns": image.shape[1],
        "pixel_digest": pixel_digest(image),
        "inverted": False,
        "was_color": False,
        "lossy_source": False,
        "spacing_row_mm": SPACING[1],
        "spacing_column_mm": SPACING[2],
        "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        "position_mm": [0.0, 0.0, z * SPACING[0]],
    } | pixel_statistics(image)


def config(root: str, **changes) -> TrainConfig:
    """changes: `a__b=value`."""
    tree = {
        "seed": 5,
        "max_steps": 8,
        "log_every_steps": 4,
        "data": {"dataset": root, "modalities": ["ct_volumes"], "batch_size": 4, "read_threads": 0},
        "views": {
            "volume": {"box": [8, 32, 28]},
            "crops": [
                {"count": 1, "size": [24, 20], "share": [0.5, 1.0]},
                {"count": 2, "size": [16, 12], "share": [0.2, 0.5]},
            ],
            "sigmas": [1, 2, 4],
        },
        "model": {"backbone": "densenet3d", "hidden_dim": 16, "feature_dim": 8},
        "swav": {"prototypes": 6, "queue_length": 8, "queue_start_step": 2, "freeze_prototypes_steps": 2},
        "optim": {"optimizer": "adamw", "learning_rate": 0.002},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }
    return changed(tree, changes)
