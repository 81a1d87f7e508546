"""The slices of a unit to volumes, or why a stack of them is none. Pure functions; slices stay samples.

A stack with one affine is a volume: regular, or tilted (its flags say so). Its pixels are those of its slices
as they are stored. Slices without any position or orientation (X-ray, a cine, NIfTI without form codes) are
stacks of nothing and not refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ingest.dicom.volume import Slice, Volume, volumes
from ingest.frames import Frame, Stack
from shards.commit import QuarantineRow, VolumeSample
from shards.ids import Pseudonymizer
from shards.schema import VOLUME_COLUMNS, Reason, Row, volumes_of
from shards.stats import stack_digest

_DIGITS = 6  # of mm and degrees: the last bits of a float64 differ between machines
_FLAGS = (
    *("single_orientation", "orthogonal_orientation", "unique_slice_positions", "consistent_in_plane"),
    *("consistent_pixel_spacing", "consistent_image_dimensions", "uniform_slice_spacing"),
    "regularly_spaced_3d_volume",
)


@dataclass(frozen=True)
class Kept:
    """A frame that became a sample: its catalogue row without location, what its header says of stacks."""

    row: Row
    stack: Stack


@dataclass(frozen=True)
class Stacks:
    """places: {key of a slice: its columns volume and slice_index}."""

    volumes: list[VolumeSample]
    refusals: list[QuarantineRow]
    places: dict[str, Row]


def in_volumes(frame: Frame) -> bool:
    """Whether a frame may lie in a volume, as far as it alone tells."""
    return frame.stack is not None and frame.columns.get("position_mm") is not None


def stacked(kept: Sequence[Kept], unit: str, names: Pseudonymizer) -> Stacks:
    """The volumes of a unit, and a refusal of each stack that is none, by the source of its first slice."""
    found = Stacks([], [], {})
    with np.errstate(all="ignore"):  # a hostile header may hold 1e300: what is not finite is refused
        measured = volumes(_slice(number, one) for number, one in enumerate(kept))
    for volume in measured:
        rows = [kept[s.ref].row for s in volume.slices]
        reason = _reason(volume)
        if reason is not None:
            refusal = QuarantineRow(rows[0]["source"], -1, "volume", rows[0]["modality"], reason.value)
            found.refusals.append(refusal)
        elif volume.affine is not None:
            row = _volume_row(volume, rows, unit, names)
            found.volumes.append(VolumeSample(row))
            found.places.update(
                {r["key"]: {"volume": row["key"], "slice_index": n} for n, r in enumerate(rows)}
            )
    return found


def _slice(number: int, kept: Kept) -> Slice:
    row, stack = kept.row, kept.stack
    # A series of several patients or splits is none; of NIfTI a file is one.
    series = [row[name] for name in ("kind", "modality", "patient", "split")]
    series += [row.get("study") or "", row.get("series") or row["source"]]
    spacing = row.get("spacing_row_mm"), row.get("spacing_column_mm")
    orientation, position = row.get("orientation"), row.get("position_mm")
    return Slice(
        ref=number,
        series="\0".join(series),
        frame_of_reference=row.get("frame_of_reference") or "",
        orientation=None if orientation is None else tuple(orientation),
        position=None if position is None else _cropped(position, orientation, spacing, row),
        spacing=None if spacing[0] is None or spacing[1] is None else (spacing[0], spacing[1]),
        rows=row["rows"],
        columns=row["columns"],
        phase=(row["dtype"], *stack.phase),
        passes=stack.passes,
    )


def _cropped(
    position: list[float], orientation: list[float] | None, spacing: tuple[float | None, ...], row: Row
) -> tuple[float, ...]:
    """Where the first pixel that was kept lies."""
    top, left = row.get("crop_top") or 0, row.get("crop_left") or 0
    if orientation is None or not (top or left):
        return tuple(position)
    across, down = np.reshape(orientation, (2, 3))
    moved = position + down * top * (spacing[0] or 0.0) + across * left * (spacing[1] or 0.0)
    return tuple(float(v) for v in moved)


def _reason(volume: Volume) -> Reason | None:
    """Why a stack is no volume; None where it is one, or has no geometry at all."""
    slices = volume.slices
    if len(slices) < 2 or all(s.position is None and s.orientation is None for s in slices):
        return None
    known = [s.position is not None and s.orientation is not None and s.spacing is not None for s in slices]
    if not all(known) or volume.obliquity_degrees is None:  # or rows run along columns
        return Reason.VOLUME_WITHOUT_GEOMETRY
    if not volume.unique_slice_positions:
        return Reason.VOLUME_REPEATED_POSITION
    whole = volume.affine is not None and bool(np.isfinite(volume.affine).all())
    return None if whole else Reason.VOLUME_UNEVEN


def _volume_row(volume: Volume, rows: list[Row], unit: str, names: Pseudonymizer) -> Row:
    assert volume.affine is not None and volume.slice_spacing_mm is not None
    keys = [row["key"] for row in rows]
    row: Row = {
        "key": names.id("volume", "/".join(keys)),
        "unit": unit,
        "modality": volumes_of(rows[0]["modality"]),
        "slices": len(rows),
        "slice_keys": keys,
        "pixel_digest": stack_digest([row["pixel_digest"] for row in rows]),
        "rescale_slopes": _listed(rows, "rescale_slope"),
        "rescale_intercepts": _listed(rows, "rescale_intercept"),
        "orientation": rows[0]["orientation"],
        "position_mm": _rounded(volume.affine[:, 3]),
        "spacing_slice_mm": round(volume.slice_spacing_mm, _DIGITS),
        "affine": _rounded(volume.affine.ravel()),
        "obliquity_degrees": _round(volume.obliquity_degrees),
        "gantry_tilt_degrees": _round(volume.gantry_tilt_degrees),
        "lossy_source": any(row["lossy_source"] for row in rows),
    } | _statistics(rows)
    row |= {name: getattr(volume, name) for name in _FLAGS}
    shared = [c.name for c in VOLUME_COLUMNS if c.name not in row and c.name in rows[0]]
    return row | {name: _common(rows, name) for name in shared}


def _common(rows: list[Row], name: str) -> object:
    """What all have; None where they differ."""
    first = rows[0].get(name)
    return first if all(row.get(name) == first for row in rows) else None


def _listed(rows: list[Row], name: str) -> list[float | None] | None:
    values = [row.get(name) for row in rows]
    return None if all(v is None for v in values) else values


def _statistics(rows: list[Row]) -> Row:
    """Of all pixels, from those of slices of one size."""
    mean = math.fsum(row["mean"] for row in rows) / len(rows)
    squares = math.fsum(row["std"] ** 2 + (row["mean"] - mean) ** 2 for row in rows)
    return {
        "mean": mean,
        "std": math.sqrt(squares / len(rows)),
        "minimum": min(row["minimum"] for row in rows),
        "maximum": max(row["maximum"] for row in rows),
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), _DIGITS) for v in values]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
