"""A NIfTI mask, cut at the slices of the images it belongs to, by geometry alone: no names, no order.

The grids must agree: each row and column of an image is a line of voxels of the mask, and its pixels are
their centres, to within a tenth of a pixel. Nothing is resampled.
"""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from shards.schema import Row

GEOMETRY_COLUMNS = ("position_mm", "orientation", "spacing_row_mm", "spacing_column_mm")
SUFFIXES = (".nii", ".nii.gz")
_MOST_VOXELS = 1 << 30
_TOLERANCE = 0.1  # of a voxel, over the whole slice
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class NiftiMask:
    """voxels: uint8 [i, j, k], 1: in the mask. to_voxel: [4, 4], mm in LPS to indices."""

    voxels: NDArray[np.uint8]
    to_voxel: NDArray[np.float64]


def read(path: Path) -> NiftiMask | None:
    """None where it is no NIfTI volume of labels, is too large, or says nothing of its place."""
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image) or len(image.shape) != 3:
            return None
        placed = image.header["qform_code"] or image.header["sform_code"]
        if int(np.prod(image.shape)) > _MOST_VOXELS or not placed:
            return None
        voxels = np.asarray(image.dataobj) != 0
        inverse = np.linalg.inv(_RAS_TO_LPS @ image.affine)
    except (OSError, EOFError, ImageFileError, ValueError, np.linalg.LinAlgError):
        return None
    return NiftiMask(voxels.astype(np.uint8), inverse)


def plane(mask: NiftiMask, sample: Row) -> NDArray[np.uint8] | None:
    """The mask in the stored pixels of a slice, [rows, columns]; None where the grids do not agree or the
    slice lies outside. sample: a catalogue row with its geometry, neither cropped nor reduced."""
    shape = sample["rows"], sample["columns"]
    if shape != (sample["original_rows"], sample["original_columns"]) or sample["crop_top"] is not None:
        return None
    if any(sample[name] is None for name in GEOMETRY_COLUMNS):
        return None
    across, down = np.reshape(sample["orientation"], (2, 3))
    turn = mask.to_voxel[:3, :3]
    origin = turn @ np.array(sample["position_mm"]) + mask.to_voxel[:3, 3]
    steps = np.stack([turn @ down * sample["spacing_row_mm"], turn @ across * sample["spacing_column_mm"]])
    whole = np.rint(steps)
    drift = np.abs(steps - whole).max(1) * (np.array(shape) - 1)
    if (np.abs(whole).sum(1) != 1).any() or np.abs(whole).sum(0).max() > 1:
        return None
    if np.abs(origin - np.rint(origin)).max() > _TOLERANCE or drift.max() > _TOLERANCE:
        return None
    first, axes = np.rint(origin).astype(int), whole.astype(int)
    last = first + axes[0] * (shape[0] - 1) + axes[1] * (shape[1] - 1)
    if (np.minimum(first, last) < 0).any() or (np.maximum(first, last) >= mask.voxels.shape).any():
        return None
    row, column = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    i, j, k = (first[n] + axes[0, n] * row + axes[1, n] * column for n in range(3))
    found: NDArray[np.uint8] = mask.voxels[i, j, k]
    return found
