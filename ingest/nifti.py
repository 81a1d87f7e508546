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
from ingest.frames import Frame, Item, Refusal, Refused
from ingest.values import AIR_HU, HIGHEST_HU, spread
from shards.schema import Reason, Row

_PLAIN_INTENTS = frozenset({1001, 1011, 2001})  # estimate, dimensionless, time series; below 1001: statistics
_FIRST_SPECIAL_INTENT = 1001  # label, vector, matrix, mesh, RGB ...
_MOST_LABELS = 16  # an image of an organ has more grey levels than this; a mask or a coarse atlas has not
_MILLIMETRES = {1: 1e3, 3: 1e-3}  # of xyzt_units: metre, micron; else (2: mm, 0: unknown) mm are meant
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class _Volume:
    """One file in canonical axes: data [x, y, z, t] as stored, x to the right, y forward, z up."""

    data: NDArray
    affine: NDArray | None  # voxel to RAS mm; None where the header gives no orientation
    slope: float
    intercept: float
    spacing: tuple[float, ...]  # mm, of x, y, z
    slice_axis: int  # the axis of slices as acquired


@dataclass(frozen=True)
class _Mapping:
    """stored = (value - offset) / step, of dtype; the same for all slices of a volume."""

    dtype: str
    step: float = 1.0
    offset: float = 0.0


def read_nifti(path: str, modality: str, rules: ReadRules) -> Iterator[Item]:
    """Slices of one volume as they were acquired. Raises Refused for the whole file.

    Rows and columns run as in DICOM pictures (axial: from front to back, from the patient's right to left).
    frame = slice + slices * time point (at most `frames_per_cine` time points, evenly spread).
    """
    try:
        volume = _canonical(*_load(path, rules))
    except (MemoryError, Refused):
        raise
    except Exception:  # noqa: BLE001 - the parser raises anything on damaged files; its texts may hold PHI
        raise Refused(Reason.UNREADABLE, modality) from None
    axis = volume.slice_axis
    plane = [n for a, n in enumerate(volume.data.shape[:3]) if a != axis]
    # The grid of a volume is cut at will: only one without any usable in-plane side is too small.
    if max(plane) < rules.min_side or min(plane) < 2:
        raise Refused(Reason.TOO_SMALL, modality)
    if math.prod(plane) > rules.max_frame_pixels:
        raise Refused(Reason.TOO_LARGE, modality)
    if _is_label_map(volume.data):
        raise Refused(Reason.LABEL_MAP, modality)
    mapping = None if modality == "ct" else _mapping(volume.data)
    slices, times = volume.data.shape[axis], volume.data.shape[3]
    for t in spread(times, rules.frames_per_cine):
        for k in range(slices):
            index = k + slices * t
            plane_values = np.moveaxis(volume.data[..., t], axis, 0)[k]
            stored, values = _stored(plane_values, volume, mapping)
            image = np.ascontiguousarray(stored.T[::-1, ::-1])
            if image.min() == image.max():
                yield Refusal(Reason.CONSTANT, index, modality)
            else:
                yield Frame(index, modality, image, _describe(image, volume, axis, k) | values)


def _load(path: str, rules: ReadRules) -> tuple[Nifti1Header, NDArray]:
    """Header and array [x, y, z, t] of a single-file NIfTI-1 or -2, gzipped or not, without extensions."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            block = file.read(540)
            kind = (
                Nifti2Header
                if 540 in struct.unpack("<i", block[:4]) + struct.unpack(">i", block[:4])
                else Nifti1Header
            )
            header = kind(block[: kind.template_dtype.itemsize], check=False)
            shape, dtype = _checked_shape(header, rules)
            offset = int(header["vox_offset"]) or kind.template_dtype.itemsize + 4
            file.seek(offset)
            data = file.read(math.prod(shape) * dtype.itemsize)
        except (OSError, EOFError, zlib.error):
            raise Refused(Reason.UNREADABLE) from None
    if len(data) < math.prod(shape) * dtype.itemsize:
        raise Refused(Reason.UNREADABLE)
    return header, np.frombuffer(data, dtype).reshape(shape, order="F")


def _checked_shape(header: Nifti1Header, rules: ReadRules) -> tuple[tuple[int, int, int, int], np.dtype]:
    """Shape [x, y, z, t] and dtype, before anything is read. Raises Refused."""
    intent, dtype = int(header["intent_code"]), header.get_data_dtype()
    if intent >= _FIRST_SPECIAL_INTENT and intent not in _PLAIN_INTENTS:
        raise Refused(Reason.LABEL_MAP)
    if dtype.names or dtype.kind not in "iuf" or dtype.itemsize > 8:  # RGB, complex, long double
        raise Refused(Reason.LABEL_MAP)
    if header["magic"].item()[:2] == b"ni":  # the pixels lie in another file
        raise Refused(Reason.UNREADABLE)
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION)
    if math.prod(shape[4:]) != 1:  # vectors and tensors
        raise Refused(Reason.LABEL_MAP)
    x, y, z, t = (*shape, 1, 1)[:4]
    if x * y * z * t > rules.max_pixels:
        raise Refused(Reason.TOO_LARGE)
    return (x, y, z, t), dtype


def _canonical(header: Nifti1Header, data: NDArray) -> _Volume:
    """Axes permuted and flipped to right, anterior, superior, lengths in mm; nothing is resampled."""
    slope, intercept = _slope(header)
    # The slice axis: as the header says, else the third one stored.
    declared = header.get_dim_info()[2]
    stored_axis = 2 if declared is None else int(declared)
    millimetres = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    affine = header.get_best_affine()
    affine[:3] *= millimetres
    orientation = io_orientation(affine) if np.isfinite(affine).all() else np.array([[np.nan, np.nan]])
    oriented = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    if not oriented or np.isnan(orientation).any():
        zooms = [millimetres * float(z) for z in header.get_zooms()[:3]]
        return _Volume(data, None, slope, intercept, (*zooms, *[0.0] * (3 - len(zooms))), stored_axis)
    turned = affine @ inv_ornt_aff(orientation, data.shape[:3])
    spacing = np.linalg.norm(turned[:3, :3], axis=0)
    return _Volume(
        apply_orientation(data, orientation),
        turned,
        slope,
        intercept,
        (*(float(s) for s in spacing),),
        int(orientation[stored_axis, 0]),
    )


def _slope(header: Nifti1Header) -> tuple[float, float]:
    """scl_slope and scl_inter; 0 or NaN mean none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or slope == 0:
        return 1.0, 0.0
    return slope, intercept if math.isfinite(intercept) else 0.0


def _is_label_map(data: NDArray) -> bool:
    """Few distinct whole numbers: a mask or an atlas, which no header field tells of reliably."""
    flat = data.ravel(order="K")
    probe = np.unique(flat[:: max(1, flat.size // 65536)])
    if len(probe) > _MOST_LABELS:
        return False
    values = np.unique(flat)
    return 1 < len(values) <= _MOST_LABELS and bool(np.all(values == np.rint(values)))


def _mapping(data: NDArray) -> _Mapping:
    """How the values of a volume are stored: integers as they are where 16 bits hold them, else scaled."""
    if data.dtype.kind == "f":
        finite = data[np.isfinite(data)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        whole = bool(np.all(finite == np.rint(finite)))
    else:
        low, high, whole = float(data.min()), float(data.max()), True
    if whole and data.dtype.kind != "f" and data.dtype.itemsize == 1 and low >= 0:
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
        units = np.rint(np.nan_to_num(plane.astype(np.float64), nan=AIR_HU) * volume.slope + volume.intercept)
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
