"""Labelled slices of volumes, with their neighbours and masks: what tasks on slices read.

The labelled volumes are held in memory as uint8 of one size: slices * size^2 bytes each (a volume of 150
slices of 224 px: 7.5 MB; with masks twice that).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from shards import catalog
from shards.errors import UserError
from shards.schema import volumes_of
from shards.tar import ShardReader
from trainer.augment.intensity import to_unit
from trainer.config import IntensityConfig
from trainer.config_data import Range, Strict
from trainer.labels import UNKNOWN
from trainer.volumes import VOLUME_COLUMNS, read_volume

SPLITS = ("train", "val", "test")
Stack = NDArray[np.float32]


class SliceAugment(Strict):
    """Of training slices only, drawn anew in each epoch, the same for the slices of a stack and its mask.
    flip: probability of a mirrored image (left and right); turn: up to so many degrees; scale; shift: up to
    this share of the side; gain, offset: of the intensities in [0, 1]."""

    flip: float = Field(default=0.5, ge=0, le=1)
    turn_degrees: float = Field(default=10.0, ge=0, le=180)
    scale: Range = (0.9, 1.1)
    shift: float = Field(default=0.05, ge=0, lt=0.5)
    gain: Range = (0.9, 1.1)
    offset: Range = (-0.05, 0.05)


@dataclass(frozen=True)
class SliceVolume:
    """pixels: uint8 [Z, S, S]. labels: int8 [Z], 1, 0 or UNKNOWN. masks: uint8 [Z, S, S] of 0 and 1, where
    asked for; masked: bool [Z], slices whose mask is known."""

    key: str
    patient: str
    split: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int8]
    masks: NDArray[np.uint8] | None
    masked: NDArray[np.bool_]


def read_slices(
    dataset: str,
    modality: str,
    size: int,
    *,
    labels: Mapping[str, int] | None = None,
    masks: Mapping[str, bytes] | None = None,
    splits: Mapping[str, str] | None = None,
    intensity: IntensityConfig | None = None,
) -> list[SliceVolume]:
    """The volumes of a modality that hold a slice of these labels (key to 1 or 0), or masks (key to PNG).

    splits: of slices by key, in place of the catalogue's. Intensities are those of the whole volume. Slices
    are padded to squares, then resampled to `size` px; of a mask the pixels that are half or more lesion, and
    where it has none of them the fullest, so that no lesion is lost. Raises UserError for a dataset without
    volumes or with none that is labelled, for a mask of another size than its slice, and a volume in two
    splits.
    """
    needed = dict.fromkeys([*VOLUME_COLUMNS, "patient", "split", "slice_keys", "minimum", "maximum"])
    rows = catalog.load(dataset, volumes_of(modality), list(needed)).to_pylist()
    if not rows:
        raise UserError(
            f"the dataset has no volumes of {modality}: make it with ingest run --as slices,volumes"
        )
    known = (labels or {}).keys() | (masks or {}).keys()
    rows = [row for row in rows if not known.isdisjoint(row["slice_keys"])]
    if not rows:
        raise UserError(
            f"no labelled image is a slice of the {modality} volumes: labels are those of images, by key"
        )
    reader = ShardReader(dataset)
    chosen = intensity or IntensityConfig()
    for row in rows:
        row["split"] = _split(row, splits or {})
    return [_volume(reader, row, size, labels or {}, masks, chosen) for row in rows]


def table_splits(table: pa.Table) -> dict[str, str]:
    """The splits that a table gives, by key. Raises UserError for a word that is none."""
    if "split" not in table.column_names:
        return {}
    pairs = zip(table["key"].to_pylist(), table["split"].to_pylist(), strict=True)
    found = {str(key): str(split) for key, split in pairs if split}
    wrong = sorted(set(found.values()) - set(SPLITS))
    if wrong:
        raise UserError(f"the label table has a split {wrong[0]!r}: it is train, val, test or empty")
    return found


def slice_labels(table: pa.Table, positive: str) -> dict[str, int]:
    """Of a table with `label`: key to 1 (the label `positive`) or 0. Raises UserError where none has it."""
    pairs = zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)
    found = {str(key): int(str(label) == positive) for key, label in pairs if label is not None}
    if not any(found.values()):
        there = sorted({str(label) for label in table["label"].to_pylist() if label is not None})
        raise UserError(
            f"no slice has the label {positive!r} (there are: {', '.join(there[:5]) or 'none'}): set "
            "positive to the label of slices with a lesion"
        )
    return found


Places = list[tuple[SliceVolume, tuple[int, ...]]]  # a volume, and the slices of which one is taken


def places_of(volumes: Sequence[SliceVolume], kept: float, masks: bool) -> Places:
    """What the samples of a split are: each slice with a lesion, and the share `kept` of those without, which
    are drawn anew in every epoch, of the same volume. masks: of the slices whose mask is known, else of those
    with a label."""
    found: Places = []
    for volume in volumes:
        if masks:
            assert volume.masks is not None
            known, lesion = volume.masked, volume.masks.any((1, 2))
        else:
            known, lesion = volume.labels != UNKNOWN, volume.labels == 1
        with_one, without = (np.flatnonzero(known & where).tolist() for where in (lesion, ~lesion))
        found += [(volume, (z,)) for z in with_one]
        if kept == 1:
            found += [(volume, (z,)) for z in without]
        elif without:
            found += [(volume, tuple(without))] * round(kept * len(without))
    return found


def drawn(places: Places, index: int, random: np.random.Generator | None) -> tuple[SliceVolume, int]:
    """The volume and the slice of a sample."""
    volume, slices = places[index]
    return volume, slices[0 if random is None else int(random.integers(len(slices)))]


def stack(pixels: NDArray[np.uint8], index: int, slices: int) -> Stack:
    """A slice in the middle of its neighbours, f32 [slices, S, S] in [0, 1]; the outermost is repeated."""
    reach = slices // 2
    near = np.clip(np.arange(index - reach, index + reach + 1), 0, len(pixels) - 1)
    return np.asarray(pixels[near], np.float32) * np.float32(1 / 255)


def augmented(images: Stack, config: SliceAugment, random: np.random.Generator, grey: int) -> Stack:
    """[C, S, S] to the same, moved as one (bilinear, 0 outside); the first `grey` ones are of intensities."""
    u = random.random(7)
    side = images.shape[-1]
    turn = np.deg2rad(config.turn_degrees) * (2 * u[0] - 1)
    scale = config.scale[0] + (config.scale[1] - config.scale[0]) * u[1]
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / scale
    turned[:, 0] *= -1 if u[2] < config.flip else 1
    centre = np.full(2, (side - 1) / 2)
    moved = np.rint(config.shift * side * (2 * u[3:5] - 1))  # whole pixels: small lesions stay sharp
    matrix = np.column_stack([turned, centre + moved - turned @ centre])  # from the new image to the old
    out = np.empty_like(images)
    for image, place in zip(images, out, strict=True):
        cv2.warpAffine(image, matrix, (side, side), dst=place, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    gain = config.gain[0] + (config.gain[1] - config.gain[0]) * u[5]
    offset = config.offset[0] + (config.offset[1] - config.offset[0]) * u[6]
    out[:grey] = np.clip(out[:grey] * np.float32(gain) + np.float32(offset), 0, 1)
    return out


def _split(row: Mapping[str, Any], splits: Mapping[str, str]) -> str:
    given = {splits[key] for key in row["slice_keys"] if key in splits}
    if len(given) > 1:
        raise UserError(
            f"slices of one volume are in the splits {' and '.join(sorted(given))}: give all slices of a "
            "patient one split"
        )
    return given.pop() if given else str(row["split"])


def _volume(
    reader: ShardReader,
    row: Mapping[str, Any],
    size: int,
    labels: Mapping[str, int],
    masks: Mapping[str, bytes] | None,
    intensity: IntensityConfig,
) -> SliceVolume:
    volume = read_volume(reader, row)
    low, high = np.percentile(volume, (0.5, 99.5))
    unit = to_unit(volume, {**row, "p005": float(low), "p995": float(high)}, intensity)
    pixels = np.stack([_square(image, size) for image in unit])
    keys: Sequence[str] = row["slice_keys"]
    truth, masked = None, np.zeros(len(keys), np.bool_)
    if masks is not None:
        masked = np.array([key in masks for key in keys])
        truth = np.zeros(pixels.shape, np.uint8)
        for i in np.flatnonzero(masked).tolist():
            mask = _mask(masks[keys[i]], (volume.shape[1], volume.shape[2]))
            share = _square(mask, size)
            truth[i] = share >= min(0.5, float(share.max())) if mask.any() else 0
    return SliceVolume(
        str(row["key"]),
        str(row["patient"]),
        str(row["split"]),
        np.rint(pixels * 255).astype(np.uint8),
        np.array([labels.get(key, UNKNOWN) for key in keys], np.int8),
        truth,
        masked,
    )


def _mask(png: bytes, shape: tuple[int, int]) -> Stack:
    mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.shape != shape:
        found = "no picture" if mask is None else "x".join(map(str, mask.shape))
        raise UserError(
            f"a mask is {found}, its slice {shape[0]}x{shape[1]}: join masks with ingest label --kind masks"
        )
    return (mask != 0).astype(np.float32)


def _square(image: Stack, size: int) -> Stack:
    """[H, W] to [size, size]: padded with 0 to a square, then resampled, by area where it shrinks."""
    side = max(image.shape)
    top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    square = np.zeros((side, side), np.float32)
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(square, (size, size), interpolation=how), np.float32)
