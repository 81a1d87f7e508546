"""NIfTI to 2D slices: canonical axes by flips, no resampling, values as stored. In the decoder process."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from ingest.config import ReadRules
from ingest.frames import Frame, Item, Refusal, Refused, Stack
from ingest.nifti_file import Voxels, open_voxels
from ingest.values import AIR_HU, HIGHEST_HU, spread
from shards.schema import Reason, Row

_PLAIN_INTENTS = frozenset({1001, 1011, 2001})  # estimate, dimensionless, time series; below 1001: statistics
_FIRST_SPECIAL_INTENT = 1001  # label, vector, matrix, mesh, RGB ...
_MOST_LABELS = 16  # an image of an organ has more grey levels than this; a mask or a coarse atlas has not
_MILLIMETRES = {1: 1e3, 3: 1e-3}  # of xyzt_units: metre, micron; else (2: mm, 0: unknown) mm are meant
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class _Volume:
    """One file in canonical axes: x to the right, y forward, z up; its voxels are turned slab by slab."""

    voxels: Voxels
    turn: NDArray | None  # nibabel orientation of the stored axes; None: as they are
    shape: tuple[int, int, int]  # in canonical axes
    affine: NDArray | None  # voxel to RAS mm; None where the header gives no orientation
    slope: float
    intercept: float
    spacing: tuple[float, ...]  # mm, of x, y, z
    slice_axis: int  # the canonical axis of slices as acquired
    stored_axis: int  # the same axis in the file


@dataclass(frozen=True)
class _Mapping:
    """stored = (value - offset) / step, of dtype; the same for all slices of a volume."""

    dtype: str
    step: float = 1.0
    offset: float = 0.0


def read_nifti(path: str, modality: str, rules: ReadRules, image_file: str = "") -> Iterator[Item]:
    """Slices of one volume as they were acquired. Raises Refused for the whole file.

    image_file: where the voxels lie, of a pair.

    Rows and columns run as in DICOM pictures (axial: from front to back, from the patient's right to left).
    frame = slice + slices * time point (at most `frames_per_cine` time points, evenly spread).
    """
    try:
        volume = _canonical(*_load(path, rules, image_file))
    except (MemoryError, Refused):
        raise
    except Exception:  # noqa: BLE001 - the parser raises anything on damaged files; its texts may hold PHI
        raise Refused(Reason.UNREADABLE, modality) from None
    axis = volume.slice_axis
    plane = [n for a, n in enumerate(volume.shape) if a != axis]
    # The grid of a volume is cut at will: only one without any usable in-plane side is too small.
    if max(plane) < rules.min_side or min(plane) < 2:
        raise Refused(Reason.TOO_SMALL, modality)
    if math.prod(plane) > rules.max_frame_pixels:
        raise Refused(Reason.TOO_LARGE, modality)
    values = _survey(volume.voxels)
    if values.labels:
        raise Refused(Reason.LABEL_MAP, modality)
    mapping = None if modality == "ct" else _mapping(values, volume.voxels.dtype)
    for index, pixels in _planes(volume, list(spread(volume.voxels.shape[3], rules.frames_per_cine))):
        stored, columns = _stored(pixels, volume, mapping)
        image = np.ascontiguousarray(stored.T[::-1, ::-1])
        if image.min() == image.max():
            yield Refusal(Reason.CONSTANT, index, modality)
        else:
            time, k = divmod(index, volume.shape[axis])
            located = "volumes" in rules.outputs and volume.affine is not None
            stack = Stack((str(time),)) if located else None
            yield Frame(index, modality, image, _describe(image, volume, axis, k) | columns, stack=stack)


def _planes(volume: _Volume, times: list[int]) -> Iterator[tuple[int, NDArray]]:
    """(frame, plane of two canonical axes) in canonical order, of a large file in its own."""
    slices = volume.shape[volume.slice_axis]
    flipped = volume.turn is not None and bool(volume.turn[volume.stored_axis, 1] < 0)
    for stored, t, slab in volume.voxels.slabs(volume.stored_axis, times, flipped):
        turned = slab if volume.turn is None else apply_orientation(slab, volume.turn)
        k = slices - 1 - stored if flipped else stored
        yield k + slices * t, np.take(turned, 0, volume.slice_axis)


def _load(path: str, rules: ReadRules, image_file: str) -> tuple[Nifti1Header, Voxels]:
    """Header and voxels of a NIfTI-1 or -2, a file or a pair, each gzipped or not, without extensions."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            block = file.read(540)
        except (OSError, EOFError, zlib.error):
            raise Refused(Reason.UNREADABLE) from None
    kind = (
        Nifti2Header
        if 540 in struct.unpack("<i", block[:4]) + struct.unpack(">i", block[:4])
        else Nifti1Header
    )
    header = kind(block[: kind.template_dtype.itemsize], check=False)
    shape, dtype = _checked_shape(header, rules)
    offset = int(header["vox_offset"])
    if header["magic"].item()[:2] == b"ni":
        if not image_file:
            raise Refused(Reason.PARTNER_MISSING)
        path, packed = image_file, _is_packed(image_file)
    else:
        offset = offset or kind.template_dtype.itemsize + 4
    return header, open_voxels(path, packed, offset, shape, dtype, _stored_slice_axis(header))


def _is_packed(path: str) -> bool:
    with open(path, "rb") as raw:
        return raw.read(2) == b"\x1f\x8b"


def _stored_slice_axis(header: Nifti1Header) -> int:
    """As the header says, else the third one stored."""
    declared = header.get_dim_info()[2]
    return 2 if declared is None else int(declared)


def _checked_shape(header: Nifti1Header, rules: ReadRules) -> tuple[tuple[int, int, int, int], np.dtype]:
    """Shape [x, y, z, t] and dtype, before anything is read. Raises Refused."""
    intent, dtype = int(header["intent_code"]), header.get_data_dtype()
    if intent >= _FIRST_SPECIAL_INTENT and intent not in _PLAIN_INTENTS:
        raise Refused(Reason.LABEL_MAP)
    if dtype.names or dtype.kind not in "iuf" or dtype.itemsize > 8:  # RGB, complex, long double
        raise Refused(Reason.LABEL_MAP)
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION)
    if math.prod(shape[4:]) != 1:  # vectors and tensors
        raise Refused(Reason.LABEL_MAP)
    x, y, z, t = (*shape, 1, 1)[:4]
    if x * y * z * t > rules.max_pixels:
        raise Refused(Reason.TOO_LARGE)
    return (x, y, z, t), dtype


def _canonical(header: Nifti1Header, voxels: Voxels) -> _Volume:
    """Axes permuted and flipped to right, anterior, superior, lengths in mm; nothing is resampled."""
    slope, intercept = _slope(header)
    stored_axis, stored_shape = _stored_slice_axis(header), voxels.shape[:3]
    millimetres = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    affine = header.get_best_affine()
    affine[:3] *= millimetres
    orientation = io_orientation(affine) if np.isfinite(affine).all() else np.array([[np.nan, np.nan]])
    oriented = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    if not oriented or np.isnan(orientation).any():
        zooms = [millimetres * float(z) for z in header.get_zooms()[:3]]
        spacing = (*zooms, *[0.0] * (3 - len(zooms)))
        return _Volume(voxels, None, stored_shape, None, slope, intercept, spacing, stored_axis, stored_axis)
    turned = affine @ inv_ornt_aff(orientation, stored_shape)
    shape = [0, 0, 0]
    for stored, canonical in enumerate(orientation[:, 0].astype(int)):
        shape[canonical] = stored_shape[stored]
    return _Volume(
        voxels,
        orientation,
        (shape[0], shape[1], shape[2]),
        turned,
        slope,
        intercept,
        (*(float(s) for s in np.linalg.norm(turned[:3, :3], axis=0)),),
        int(orientation[stored_axis, 0]),
        stored_axis,
    )


def _slope(header: Nifti1Header) -> tuple[float, float]:
    """scl_slope and scl_inter; 0 or NaN mean none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or slope == 0:
        return 1.0, 0.0
    return slope, intercept if math.isfinite(intercept) else 0.0


@dataclass(frozen=True)
class _Values:
    """What the finite voxels of a volume are."""

    low: float
    high: float
    whole: bool  # integers all
    labels: bool  # few distinct whole numbers: a mask or an atlas, which no header field tells of reliably


def _survey(voxels: Voxels) -> _Values:
    low, high, whole, finite_everywhere = math.inf, -math.inf, True, True
    distinct: NDArray | None = np.empty(0, voxels.dtype)
    for block in voxels.blocks():
        if voxels.dtype.kind == "f":
            finite = block[np.isfinite(block)]
            finite_everywhere &= finite.size == block.size
            whole = whole and bool(np.all(finite == np.rint(finite)))
        else:
            finite = block
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        distinct = _distinct(distinct, block)
    if low > high:
        low = high = 0.0
    labels = distinct is not None and 1 < len(distinct) <= _MOST_LABELS and whole and finite_everywhere
    return _Values(low, high, whole, labels)


def _distinct(known: NDArray | None, block: NDArray) -> NDArray | None:
    """The distinct values so far; None once they are more than labels are. A probe decides mostly."""
    if known is None:
        return None
    for values in (block[:: max(1, block.size // 65536)], block):
        found = np.unique(np.concatenate([known, np.unique(values)]))
        if len(found) > _MOST_LABELS:
            return None
    return found


def _mapping(values: _Values, dtype: np.dtype) -> _Mapping:
    """How the values of a volume are stored: integers as they are where 16 bits hold them, else scaled."""
    low, high, whole = values.low, values.high, values.whole
    if whole and dtype.kind != "f" and dtype.itemsize == 1 and low >= 0:
        return _Mapping("uint8")
    if whole and low >= 0 and high <= 0xFFFF:
        return _Mapping("uint16")
    if whole and low >= -0x8000 and high <= 0x7FFF:
        return _Mapping("int16")
    if not math.isfinite(high - low):  # 16 bits of such a range would show nothing
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION)
    return _Mapping("uint16", (high - low) / 0xFFFF or 1.0, low)


def _stored(plane: NDArray, volume: _Volume, mapping: _Mapping | None) -> tuple[NDArray, Row]:
    """Stored pixels of one plane and its slope and intercept columns. mapping None: int16 HU."""
    if mapping is None:
        units = plane.astype(np.float64) * volume.slope + volume.intercept
        units = np.rint(np.nan_to_num(units, nan=AIR_HU))  # outside of the body, whatever the slope
        slope = {"rescale_slope": volume.slope, "rescale_intercept": volume.intercept}
        return np.clip(units, AIR_HU, HIGHEST_HU).astype(np.int16), slope
    columns = {
        "rescale_slope": volume.slope * mapping.step,
        "rescale_intercept": volume.slope * mapping.offset + volume.intercept,
    }
    if mapping.step == 1.0 and mapping.offset == 0.0 and plane.dtype.kind != "f":
        return plane.astype(mapping.dtype), columns
    values = np.nan_to_num(
        plane.astype(np.float64),
        nan=mapping.offset,
        posinf=mapping.offset + mapping.step * 0xFFFF,
        neginf=mapping.offset,
    )
    info = np.iinfo(mapping.dtype)
    scaled = np.rint((values - mapping.offset) / mapping.step)
    return np.clip(scaled, info.min, info.max).astype(mapping.dtype), columns


def _describe(image: NDArray, volume: _Volume, axis: int, k: int) -> Row:
    """Columns of a slice; geometry (mm, LPS) only where the header has an orientation."""
    first, second = (a for a in range(3) if a != axis)
    row: Row = {
        "original_rows": image.shape[0],
        "original_columns": image.shape[1],
        "inverted": False,
        "was_color": False,
        "lossy_source": False,
        "spacing_row_mm": _length(volume.spacing[second]),
        "spacing_column_mm": _length(volume.spacing[first]),
        "slice_thickness_mm": _length(volume.spacing[axis]),
    }
    if volume.affine is None:
        return row
    corner = np.zeros(4)
    corner[[first, second, axis, 3]] = image.shape[1] - 1, image.shape[0] - 1, k, 1
    along_row = -volume.affine[:3, first] / volume.spacing[first] * _RAS_TO_LPS
    down_column = -volume.affine[:3, second] / volume.spacing[second] * _RAS_TO_LPS
    position = (volume.affine @ corner)[:3] * _RAS_TO_LPS
    return row | {
        "position_mm": [float(v) for v in position],
        "orientation": [float(v) for v in (*along_row, *down_column)],
    }


def _length(value: float) -> float | None:
    return value if math.isfinite(value) and value > 0 else None
