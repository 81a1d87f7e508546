"""What a row of a label table says of an image: classes, several labels, boxes, a mask."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest import nifti_masks, run_lengths
from shards.errors import UserError
from shards.schema import Row

KINDS = ("classes", "multi", "boxes", "masks")
BOX_COLUMNS = ("x0", "y0", "x1", "y1")
# What the place of a label in the stored image depends on.
PLACE_COLUMNS = ("rows", "columns", "original_rows", "original_columns", "crop_top", "crop_left")
_BOX = pa.struct([*((n, pa.float64()) for n in BOX_COLUMNS), ("label", pa.string())])
FIELDS = {
    "classes": ("label", pa.string()),
    "multi": ("labels", pa.list_(pa.string())),
    "boxes": ("boxes", pa.list_(_BOX)),
    "masks": ("mask", pa.binary()),  # a PNG of the size of the stored image
}
_TRUE = frozenset({"1", "1.0", "true", "yes"})
_PNG, _MOST_MASK_BYTES, _MOST_CLASSES = b"\x89PNG\r\n\x1a\n", 64 << 20, 256
_ROUNDING = 1.0  # px
_BAD_BOX = "a box of the table {} is not four numbers x0 < x1, y0 < y1: correct it"

Parse = Callable[[dict[str, str]], Any]


def parser(
    kind: str, path: Path, there: Sequence[str], columns: Sequence[str], label_column: str | None
) -> Parse:
    """A function of a table's row: its value, None where it says nothing. Raises UserError for columns.

    classes: text. multi: list of text. boxes: list of (x0, y0, x1, y1, label), in pixels of the source image;
    empty where all four cells are: the image was read and has no finding. masks: name of the file (PNG,
    NIfTI), or run lengths.
    """
    if kind not in KINDS:
        raise UserError(f"labels are of kind {', '.join(KINDS)}, not {kind!r}")
    defaults = {"boxes": BOX_COLUMNS, "masks": ("mask",)}
    chosen = tuple(columns) or defaults.get(kind, (label_column or "label",))
    missing = next((column for column in chosen if column not in there), None)
    if missing is not None:
        raise UserError(f"the table {path.name} has no column {missing!r}: set the label column")
    if kind == "boxes":
        label = label_column if label_column in there else None
        if len(chosen) not in (1, 4):
            raise UserError("boxes are four columns (x0, y0, x1, y1) or one of a JSON list: correct columns")
        return lambda row: _boxes(row, chosen, row[label] if label else "", path.name)
    if kind != "multi" and len(chosen) != 1:
        raise UserError(f"labels of kind {kind} are one column: correct columns, or use kind multi")
    if kind == "multi" and len(chosen) > 1:
        # An empty cell says nothing; a row of zeros says that the image has none of them.
        return lambda row: (
            [c for c in chosen if row[c].lower() in _TRUE] if any(row[c] for c in chosen) else None
        )
    if kind == "multi":
        return lambda row: [v.strip() for v in row[chosen[0]].split("|") if v.strip()] or None
    return lambda row: row[chosen[0]] or None


def _boxes(row: dict[str, str], columns: Sequence[str], label: str, name: str) -> list[tuple] | None:
    cells = [row[column] for column in columns]
    if not any(cells):
        return [] if len(cells) == 4 else None
    try:
        found = json.loads(cells[0]) if len(cells) == 1 else [cells]
        boxes = [tuple(float(n) for n in box) for box in found]
    except (ValueError, TypeError):
        raise UserError(_BAD_BOX.format(name)) from None
    for box in boxes:
        if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
            raise UserError(_BAD_BOX.format(name))
    return [(*box, label) for box in boxes]


def check_box(box: tuple, sample: Row, where: str) -> None:
    """A box must lie in the source image; a pixel beyond its border is rounding. Raises UserError."""
    x0, y0, x1, y1 = box[:4]
    width, height = sample["original_columns"], sample["original_rows"]
    if min(x0, y0) < -_ROUNDING or x1 > width + _ROUNDING or y1 > height + _ROUNDING:
        raise UserError(
            f"{where}: the box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) does not lie in its image of {width} x "
            f"{height} px: give boxes in px of the source image"
        )


def placed_box(box: tuple, sample: Row) -> dict[str, Any] | None:
    """The box in pixels of the stored image: moved by the crop, or scaled as it was; None where outside."""
    x0, y0, x1, y1, label = box
    if sample["crop_top"] is not None:
        xs, ys = [x - sample["crop_left"] for x in (x0, x1)], [y - sample["crop_top"] for y in (y0, y1)]
    else:
        across = sample["columns"] / sample["original_columns"]
        down = sample["rows"] / sample["original_rows"]
        xs, ys = [x * across for x in (x0, x1)], [y * down for y in (y0, y1)]
    xs = [min(max(x, 0.0), float(sample["columns"])) for x in xs]
    ys = [min(max(y, 0.0), float(sample["rows"])) for y in ys]
    if xs[0] >= xs[1] or ys[0] >= ys[1]:
        return None
    return {"x0": xs[0], "y0": ys[0], "x1": xs[1], "y1": ys[1], "label": label or None}


class Masks:
    """The masks of a table, whose files lie below `folder`; the last NIfTI volume is kept, since it has the
    planes of many images."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._volume: tuple[str, nifti_masks.NiftiMask | None] = ("", None)

    def placed(self, cell: str, sample: Row) -> bytes | None:
        """A PNG of the size of the stored image; None where the cell is no mask of the source image."""
        if cell.lower().endswith(nifti_masks.SUFFIXES):
            if self._volume[0] != cell:
                self._volume = (cell, nifti_masks.read(self._folder / cell))
            volume = self._volume[1]
            cut = None if volume is None else nifti_masks.plane(volume, sample)
            return None if cut is None else _png(cut)
        if sample["kind"] == "nifti":  # its slices are turned: only geometry can tell how
            return None
        mask = run_lengths.decode(cell)
        if mask is None:
            mask = read_mask(self._folder / cell)
        return None if mask is None else placed_mask(mask, sample)


def read_mask(path: Path) -> NDArray | None:
    """[rows, columns] of uint8 or uint16 of a grey PNG, its size checked first; None where it is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_MASK_BYTES + 1)
    except OSError:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:8] != _PNG or len(data) > _MOST_MASK_BYTES or not 0 < width * height <= _MOST_MASK_BYTES:
        return None
    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.ndim != 2 or len(np.unique(mask)) > _MOST_CLASSES:
        return None
    return mask


def placed_mask(mask: NDArray, sample: Row) -> bytes | None:
    """A PNG of the size of the stored image, cut or reduced as it was (nearest); None for another size."""
    stored = sample["rows"], sample["columns"]
    if mask.shape != (sample["original_rows"], sample["original_columns"]):
        return None
    if sample["crop_top"] is not None:
        top, left = sample["crop_top"], sample["crop_left"]
        mask = mask[top : top + stored[0], left : left + stored[1]]
    elif mask.shape != stored:
        mask = cv2.resize(mask, stored[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    if mask.shape != stored:
        return None
    return _png(mask)


def _png(mask: NDArray) -> bytes:
    return bytes(cv2.imencode(".png", np.ascontiguousarray(mask))[1])
