"""Slices to volumes: which belong together, in which order, and how regular they lie. Pure functions.

The checks are the public volume-geometry columns of the Imaging Data Commons, with a tolerance of 1 % of the
slice spacing. Nothing is repaired: a stack without one affine is no volume (`Volume.affine` is None), and a
tilted one has a sheared affine and is not `regularly_spaced_3d_volume`.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.01  # of the slice spacing
_COSINE = 1e-4  # of direction cosines: writers print 5 digits or more
_PIXEL = 1e-3  # of the pixel spacing, relative


@dataclass(frozen=True)
class Slice:
    """What the header says of one slice; mm, LPS. ref: whatever the caller knows the slice by.

    orientation: 6 direction cosines, along a row and down a column. spacing: distance of rows, of columns.
    phase, passes: as in ingest.frames.Stack; all slices have equally many passes.
    """

    ref: int
    series: str
    frame_of_reference: str
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, float] | None
    rows: int
    columns: int
    phase: tuple[Hashable, ...] = ()
    passes: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class Volume:
    """Slices in order along the normal (row direction x column direction), and their geometry.

    single_orientation, consistent_pixel_spacing and consistent_image_dimensions are of the whole series,
    since slices that differ in them are volumes of their own; the other flags are of these slices.
    affine: float64 [3, 4], (slice, row, column, 1) -> mm in LPS; None where no one affine holds.
    """

    slices: tuple[Slice, ...]
    single_orientation: bool
    orthogonal_orientation: bool
    unique_slice_positions: bool
    consistent_in_plane: bool
    consistent_pixel_spacing: bool
    consistent_image_dimensions: bool
    uniform_slice_spacing: bool
    obliquity_degrees: float | None
    gantry_tilt_degrees: float | None
    slice_spacing_mm: float | None  # along the normal
    affine: NDArray[np.float64] | None

    @property
    def regularly_spaced_3d_volume(self) -> bool:
        """A grid of right angles and equal steps."""
        return self.affine is not None and self.orthogonal_orientation and self.consistent_in_plane


def volumes(slices: Iterable[Slice]) -> list[Volume]:
    """The volumes of any number of series, sound or not; a slice that is alone in its series is none.

    Independent of the order in which the slices come, but for slices at the very same place.
    """
    by_series: dict[tuple[str, str], list[Slice]] = defaultdict(list)
    for one in slices:
        by_series[one.series, one.frame_of_reference].append(one)
    return [
        volume for _, series in sorted(by_series.items()) if len(series) > 1 for volume in _of_series(series)
    ]


def _of_series(series: list[Slice]) -> list[Volume]:
    orientations = _clusters([s.orientation for s in series], _COSINE, relative=False)
    spacings = _clusters([s.spacing for s in series], _PIXEL, relative=True)
    groups: dict[tuple[Hashable, ...], list[Slice]] = defaultdict(list)
    for one, orientation, spacing in zip(series, orientations, spacings, strict=True):
        phase = tuple(str(part) for part in one.phase)
        groups[orientation, spacing, one.rows, one.columns, phase].append(one)
    flags = (
        len(set(orientations)) == 1 and orientations[0] >= 0,
        len(set(spacings)) == 1 and spacings[0] >= 0,
        len({(s.rows, s.columns) for s in series}) == 1,
    )
    return [_measured(stack, *flags) for _, group in sorted(groups.items()) for stack in _by_pass(group)]


def _clusters(vectors: Sequence[tuple[float, ...] | None], tolerance: float, relative: bool) -> list[int]:
    """The number of the cluster of each vector, numbered by value; -1 for None."""
    known = sorted({v for v in vectors if v is not None})
    centres = np.empty((len(known), len(known[0]) if known else 0))
    count, found = 0, {}
    for vector in known:
        distances = np.abs(centres[:count] - vector).max(axis=1)
        limits = tolerance * (np.abs(centres[:count]).max(axis=1) if relative else np.ones(count))
        near = np.flatnonzero(distances <= limits)
        if not near.size:
            centres[count], count = vector, count + 1
        found[vector] = int(near[0]) if near.size else count - 1
    return [-1 if v is None else found[v] for v in vectors]


def _by_pass(group: list[Slice]) -> list[list[Slice]]:
    """Apart by the first of `passes` that alone tells slices at the same places apart, where any are.

    Not by what merely differs: a scanner that stops between slices numbers each as an acquisition of its own.
    """
    places = {s.position for s in group}
    if None in places or len(places) == len(group):
        return [group]
    for number in range(min(len(s.passes) for s in group)):
        parts: dict[Hashable, list[Slice]] = defaultdict(list)
        for one in group:
            parts[one.passes[number]].append(one)
        sound = all(len({s.position for s in part}) == len(part) > 1 for part in parts.values())
        if len(parts) > 1 and sound:
            return [part for _, part in sorted(parts.items(), key=lambda pair: str(pair[0]))]
    return [group]


def normal_of(orientation: Sequence[float]) -> NDArray[np.float64]:
    """Unit normal of a plane: along its rows x down its columns. Zeros where these are parallel."""
    cross = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(cross))
    return cross / length if length > _COSINE else np.zeros(3)


def _measured(group: list[Slice], orientation: bool, spacing: bool, dimensions: bool) -> Volume:
    first = group[0]
    known = first.orientation is not None and all(s.position is not None for s in group)
    normal = normal_of(first.orientation) if known and first.orientation is not None else np.zeros(3)
    if not normal.any():
        return Volume(
            tuple(group), orientation, False, False, False, spacing, dimensions, False, None, None, None, None
        )
    assert first.orientation is not None
    places = np.array([s.position for s in group], np.float64)
    order = np.argsort(places @ normal, kind="stable")
    stack, places = tuple(group[i] for i in order), places[order]
    steps = np.diff(places, axis=0)
    along = steps @ normal  # mm, >= 0
    mean = float(along.mean()) if len(along) else 0.0
    unique = bool(len(along)) and mean > 0 and bool((along > TOLERANCE * mean).all())
    uniform = unique and bool((np.abs(along - mean) <= TOLERANCE * mean).all())
    offsets = places - places[0]
    distances = offsets @ normal
    sideways = np.linalg.norm(offsets - np.outer(distances, normal), axis=1)
    in_plane = bool((sideways <= TOLERANCE * np.maximum(distances, mean)).all())
    across, down = np.reshape(first.orientation, (2, 3))
    return Volume(
        stack,
        orientation,
        bool(
            abs(across @ down) <= _COSINE
            and np.allclose(np.linalg.norm((across, down), axis=1), 1, atol=1e-3)
        ),
        unique,
        in_plane,
        spacing,
        dimensions,
        uniform,
        _obliquity(across, down, normal),
        _tilt(offsets[-1], normal),
        mean if unique else None,
        _affine(stack, places, steps, mean) if uniform else None,
    )


def _obliquity(*axes: NDArray[np.float64]) -> float:
    """Degrees between the axis that lies most oblique and the patient axis nearest to it."""
    nearest = [float(np.abs(axis).max() / np.linalg.norm(axis)) for axis in axes]
    return float(np.degrees(np.arccos(min(1.0, *nearest))))


def _tilt(stacked: NDArray[np.float64], normal: NDArray[np.float64]) -> float | None:
    """Degrees between the direction of stacking and the normal; None where all lie at one place."""
    length = float(np.linalg.norm(stacked))
    if length == 0:
        return None
    sine = float(np.linalg.norm(np.cross(stacked / length, normal)))
    return float(np.degrees(np.arcsin(min(1.0, sine))))


def _affine(
    stack: tuple[Slice, ...], places: NDArray[np.float64], steps: NDArray[np.float64], mean: float
) -> NDArray[np.float64] | None:
    one = stack[0]
    step = steps.mean(axis=0)
    if one.spacing is None or one.orientation is None:
        return None
    if (np.linalg.norm(steps - step, axis=1) > TOLERANCE * mean).any():
        return None
    across, down = np.reshape(one.orientation, (2, 3))
    return np.stack([step, down * one.spacing[0], across * one.spacing[1], places[0]], axis=1)
