"""Volumes of a dataset: their slices in stored units, and the box that a 3D network takes. No torch.

    row = catalog.load(DATASET, "ct_volumes", split="train").slice(0, 1).to_pylist()[0]
    volume = read_volume(DATASET, row)                      # f32 [slices, rows, columns], HU
    box = to_box(volume, affine_of(row))                    # f32 [40, 224, 192] in [0, 1]

The box (method.md section 6) is axial: slices from the feet to the head, rows from the front to the back,
columns from the patient's right to the left. The head (trainer.augment.head) is scaled to it: one scale in
the plane, so that its shape is kept, and one along the slices; what lies outside of the volume is black. A
tilted gantry is straightened by the affine; an oblique volume keeps the angle to its nearest axes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shards import reads
from shards.codec import get_codec
from shards.schema import members_of
from shards.stats import pixel_digest, stack_digest
from shards.tar import ShardReader
from trainer.augment.head import THRESHOLD_HU, Extent, find_head
from trainer.augment.intensity import to_unit
from trainer.config import IntensityConfig, VolumeConfig

BOX = (40, 224, 192)  # slices, rows, columns
HEAD_WINDOW = (55.0, 200.0)  # centre and width, HU: x = clip((HU + 45) / 200, 0, 1)
# What of a catalogue row is needed to read a volume and to place it.
VOLUME_COLUMNS = (
    *("key", "modality", "shard", "codec", "rows", "columns", "slices", "offsets", "sizes", "affine"),
    *("rescale_slopes", "rescale_intercepts", "window_center", "window_width", "window_function"),
    "pixel_digest",
)
_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

Volume = NDArray[np.float32]
Bounds = tuple[float, float, float]


def places_of(row: Mapping[str, Any], slices: Sequence[int] | None = None) -> list[reads.Place]:
    """Where the slices asked for (None: all) lie. Raises IndexError for one that is not there."""
    members = members_of(dict(row))
    numbers = range(len(members)) if slices is None else slices
    if any(not 0 <= number < len(members) for number in numbers):
        raise IndexError(f"the volume has {len(members)} slices, not {list(numbers)}")
    return [reads.Place(row["modality"], row["shard"], *members[number]) for number in numbers]


def read_volume(
    dataset: str | Path | ShardReader,
    row: Mapping[str, Any],
    slices: Sequence[int] | None = None,
    reduce: int = 0,
) -> Volume:
    """Slices of a volume, f32 [Z, Y, X] in stored units (CT: HU), in the order asked for; None: all.

    row: of the catalogue of a partition like ct_volumes, with VOLUME_COLUMNS. Only these slices are read,
    near ones in one request, and decoded at 1/2**reduce of their rows and columns. Where slices of another
    modality than CT were each scaled in their own way, they are in units of the rescaling. Raises UserError
    where the dataset is damaged, IndexError for slices that are not there.
    """
    own = not isinstance(dataset, ShardReader)
    reader = dataset if isinstance(dataset, ShardReader) else ShardReader(dataset)
    try:
        encoded = read_places(reader, places_of(row, slices))
    finally:
        if own:
            reader.close()
    return decode_slices(encoded, row, slices, reduce)


def read_places(reader: ShardReader, places: Sequence[reads.Place]) -> list[bytes]:
    """The bytes of slices of one volume, near ones in one request each."""
    found: dict[int, bytes] = {}
    gap = reads.GAP_BYTES if reader.remote else reads.LOCAL_GAP_BYTES
    for span in reads.coalesce(places, gap, reads.LARGEST_BYTES):
        data = reads.read_one(reader, reads.Place(span.modality, span.shard, span.start, span.size))
        for n in span.members:
            found[n] = data[places[n].offset - span.start : places[n].end - span.start]
    return [found[n] for n in range(len(places))]


def slices_in(data: bytes, row: Mapping[str, Any]) -> list[bytes]:
    """The slices of a volume in the bytes of a shard from its first slice to the end of its last."""
    places = places_of(row)
    return [data[p.offset - places[0].offset : p.end - places[0].offset] for p in places]


def decode_slices(
    encoded: Sequence[bytes], row: Mapping[str, Any], slices: Sequence[int] | None = None, reduce: int = 0
) -> Volume:
    """`read_volume` from the bytes of the slices. A whole volume is held to its digest, so that a flipped bit
    is never a wrong voxel. Raises UserError for damaged slices."""
    codec, places = get_codec(row["codec"]), places_of(row, slices)
    volume: Volume | None = None
    digests = []
    for number, (data, place) in enumerate(zip(encoded, places, strict=True)):
        try:
            pixels = codec.decode(data, reduce)
        except ValueError:
            raise reads.damaged_shard(place.shard, place.offset) from None
        if volume is None:
            volume = np.empty((len(places), *pixels.shape), np.float32)
        if pixels.shape != volume.shape[1:]:
            raise reads.damaged_shard(place.shard, place.offset)
        volume[number] = pixels
        if slices is None and reduce == 0:
            digests.append(pixel_digest(pixels))
    if volume is None:
        raise IndexError("no slice was asked for")
    if digests and stack_digest(digests) != row["pixel_digest"]:
        raise reads.damaged_shard(places[0].shard, places[0].offset)
    pairs = _own_scales(row)
    for image, number in zip(volume if pairs else (), slices or range(len(places)), strict=False):
        image *= np.float32(pairs[number][0])
        image += np.float32(pairs[number][1])
    return volume


def _own_scales(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Slope and intercept of each slice where slices were scaled each in its own way, so that they need them
    to be in one unit; else none. CT is in HU as it is stored."""
    slopes, intercepts = row.get("rescale_slopes"), row.get("rescale_intercepts")
    if row["modality"].startswith("ct") or not slopes or not intercepts:
        return []
    pairs = list(zip(slopes, intercepts, strict=True))
    return [] if len(set(pairs)) == 1 or any(None in pair for pair in pairs) else pairs


def affine_of(row: Mapping[str, Any], reduce: int = 0) -> NDArray[np.float64]:
    """[3, 4], (slice, row, column, 1) to mm in LPS; reduce: of slices that were decoded so."""
    affine = np.reshape(np.array(row["affine"], np.float64), (3, 4))
    scale = 2.0**reduce
    affine[:, 3] += (affine[:, 1] + affine[:, 2]) * (scale - 1) / 2  # the centre of the first pixel moves
    affine[:, 1:3] *= scale
    return affine


@dataclass(frozen=True)
class Placement:
    """How a box lies in a volume. axes, flips: of the volume's axes, that make it axial (z, y, x).

    Then, in voxels of the axial volume: low, the lower edge of the box along (z, y, x); step, voxels to a
    voxel of the box; shear, (y, x) by which a slice lies further than the one below it. found: whether a head
    was found; else the whole volume is in the box.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    low: Bounds
    step: Bounds
    shear: tuple[float, float]
    box: tuple[int, int, int]
    found: bool

    def axial(self, volume: Volume) -> Volume:
        """A view of the volume with slices from the feet up, rows to the back, columns to the left."""
        turned = volume.transpose(self.axes)
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]

    def weights(self, slices: int) -> NDArray[np.float32]:
        """How much of each slice of the axial volume is in each slice of the box, f32 [box, slices]: a
        triangle as wide as a step. Rows sum to 1, to 0 where they lie outside of the volume."""
        centres = self.low[0] + (np.arange(self.box[0]) + 0.5) * self.step[0] - 0.5
        width = max(1.0, self.step[0])
        reach = int(np.ceil(width)) + 1
        near = np.clip(np.rint(centres), -1, slices).astype(int)[:, None] + np.arange(-reach, reach + 1)
        share = np.clip(1 - np.abs(near - np.clip(centres, 0, slices - 1)[:, None]) / width, 0, None)
        share[(centres < -0.5) | (centres > slices - 0.5)] = 0
        found = np.zeros((self.box[0], slices))
        np.add.at(found, (np.arange(self.box[0])[:, None], np.clip(near, 0, slices - 1)), share)
        return (found / np.maximum(found.sum(axis=1, keepdims=True), 1e-9)).astype(np.float32)

    def source_weights(self, slices: int) -> NDArray[np.float32]:
        """`weights` for the slices in the order of the catalogue: what carries labels of slices to the box.
        Raises ValueError for a volume whose slices are not axial."""
        if self.axes[0] != 0:
            raise ValueError(
                "the slices of the volume are not axial: their labels cannot be those of the box"
            )
        return self.weights(slices)[:, ::-1] if self.flips[0] else self.weights(slices)


def place_box(
    volume: Volume,
    affine: NDArray[np.float64],
    box: tuple[int, int, int] = BOX,
    *,
    crop: bool = True,
    threshold: float = THRESHOLD_HU,
) -> Placement:
    """Where the box lies in a volume [slices, rows, columns] in HU. crop False: around the whole volume.

    threshold: what is denser is patient (of another modality than CT, in its units).
    """
    axes, flips = _axial_axes(affine)
    columns = affine[:, :3][:, list(axes)] * np.where(flips, -1.0, 1.0)
    plane = columns[:, 1:] / (columns[:, 1:] ** 2).sum(axis=0)
    shear = columns[:, 0] @ plane  # (y, x), voxels of a slice
    across = columns[:, 0] - columns[:, 1:] @ shear
    mm = [float(np.linalg.norm(v)) for v in (across, columns[:, 1], columns[:, 2])]
    spacing_mm = (mm[0], mm[1], mm[2])
    rounded = (float(shear[0]), float(shear[1]))
    placement = Placement(axes, flips, (0, 0, 0), (1, 1, 1), rounded, box, False)
    axial = placement.axial(volume)
    head = find_head(axial, spacing_mm, rounded, threshold) if crop else None
    extent = head or _whole(axial.shape, rounded)
    low, step = _fitted(extent, spacing_mm, box)
    return replace(placement, low=low, step=step, found=head is not None)


def to_box(
    volume: Volume,
    affine: NDArray[np.float64],
    box: tuple[int, int, int] = BOX,
    *,
    window: tuple[float, float] = HEAD_WINDOW,
    crop: bool = True,
    threshold: float = THRESHOLD_HU,
) -> Volume:
    """A head CT [slices, rows, columns] in HU to the box, f32 in [0, 1]: window, head crop, resampling.

    affine: see affine_of. Where no head is found (trainer.augment.head), the whole volume is in the box; a
    volume of air alone gives 0.
    """
    placement = place_box(volume, affine, box, crop=crop, threshold=threshold)
    low = window[0] - window[1] / 2
    unit = np.clip((volume - np.float32(low)) / np.float32(window[1]), 0, 1)
    return np.minimum(resample(unit, placement), 1)  # sums of weights may be 1 and a bit


def resample(volume: Volume, placement: Placement) -> Volume:
    """A volume [slices, rows, columns], 0 outside of it, to the box: linear, smoothed where it shrinks."""
    axial = placement.axial(volume)
    weights = placement.weights(len(axial))
    _, rows, columns = placement.box
    (_, y, x), (_, fy, fx) = placement.low, placement.step
    kernels = [_antialias(f) for f in (fx, fy)]
    done = np.zeros(placement.box, np.float32)
    for z in np.flatnonzero(weights.any(axis=0)).tolist():
        image = np.ascontiguousarray(axial[z])
        if fy > 1 or fx > 1:
            image = cv2.sepFilter2D(
                image, cv2.CV_32F, kernels[0], kernels[1], borderType=cv2.BORDER_REPLICATE
            )
        moved = [s * (z - (len(axial) - 1) / 2) for s in placement.shear]
        matrix = np.array([[fx, 0, x - moved[1] + fx / 2 - 0.5], [0, fy, y - moved[0] + fy / 2 - 0.5]])
        plane = cv2.warpAffine(image, matrix, (columns, rows), flags=_WARP, borderMode=cv2.BORDER_CONSTANT)
        for slot in np.flatnonzero(weights[:, z]):
            done[slot] += weights[slot, z] * plane
    return done


def box_of(
    volume: Volume, row: Mapping[str, Any], config: VolumeConfig, intensity: IntensityConfig
) -> Volume:
    """What a run makes of a volume [slices, rows, columns] in stored units: its box, f32 in [0, 1].

    intensity: `percentile` is of the volume, and so is `recorded` where its slices have no common window.
    """
    affine = affine_of(row)
    placement = place_box(volume, affine, config.box, crop=config.head_crop, threshold=config.threshold)
    known = dict(row)
    if _own_scales(row):
        known["window_center"] = None  # of the stored units, not the volume's
    if intensity.mode != "fixed":
        known["p005"], known["p995"] = (float(p) for p in np.percentile(volume, (0.5, 99.5)))
        known["minimum"], known["maximum"] = float(volume.min()), float(volume.max())
    return np.minimum(resample(to_unit(volume, known, intensity), placement), 1)


def whole_box(
    reader: ShardReader, row: Mapping[str, Any], config: VolumeConfig, intensity: IntensityConfig
) -> Volume:
    """`box_of` a volume of a dataset. Raises UserError."""
    return box_of(read_volume(reader, row), row, config, intensity)


def is_axial(affine: NDArray[np.float64]) -> bool:
    """Whether the slices lie most nearly across the patient's length: only then they are those of a box."""
    return _axial_axes(affine)[0][0] == 0


def _axial_axes(affine: NDArray[np.float64]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which axes of the volume run most along z, y and x of the patient, and which of them backwards."""
    directions = affine[:, :3] / np.linalg.norm(affine[:, :3], axis=0)
    left, axes = np.abs(directions), [0, 0, 0]
    for _ in range(3):
        patient, own = np.unravel_index(int(left.argmax()), left.shape)
        axes[2 - int(patient)] = int(own)
        left[patient], left[:, own] = -1, -1
    flips = [bool(directions[2 - i, axis] < 0) for i, axis in enumerate(axes)]
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])


def _whole(shape: tuple[int, ...], shear: tuple[float, float]) -> Extent:
    """All of a volume, straightened."""
    low, high = [0.0], [float(shape[0])]
    for length, moved in zip(shape[1:], shear, strict=True):
        reach = abs(moved) * (shape[0] - 1) / 2
        low.append(-reach)
        high.append(length + reach)
    return Extent((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def _fitted(extent: Extent, spacing_mm: Bounds, box: tuple[int, int, int]) -> tuple[Bounds, Bounds]:
    """low and step of a box that holds the extent: filled along the slices, centred in the plane."""
    length = [(b - a) * mm for a, b, mm in zip(extent.low, extent.high, spacing_mm, strict=True)]
    mm = max(length[1] / box[1], length[2] / box[2])
    step = (length[0] / spacing_mm[0] / box[0], mm / spacing_mm[1], mm / spacing_mm[2])
    low = [(a + b - s * n) / 2 for a, b, s, n in zip(extent.low, extent.high, step, box, strict=True)]
    return (low[0], low[1], low[2]), step


def _antialias(factor: float) -> NDArray[np.float32]:
    """Taps of the smoothing before shrinking by `factor` (as trainer.augment.views)."""
    variance = max(factor * factor - 1, 0.0) / 6
    if variance <= 0.5:
        return np.array([variance / 2, 1 - variance, variance / 2], np.float32)
    sigma = variance**0.5
    taps = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma, cv2.CV_32F)
    return np.asarray(taps, np.float32).ravel()
