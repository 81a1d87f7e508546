"""Known places of burned-in text: which boxes apply to an image, and their pixels blanked."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ingest.config import MaskBox
from ingest.values import AIR_HU
from ingest.vocabulary import manufacturer


def matching(
    boxes: Sequence[MaskBox], code: str, manufacturer_text: str, rows: int, columns: int
) -> tuple[MaskBox, ...]:
    """The boxes for frames of this Modality (0008,0060), Manufacturer (0008,0070) and size in pixels."""
    vendor = manufacturer(manufacturer_text)
    return tuple(
        box
        for box in boxes
        if (box.modality.upper(), box.rows, box.columns) == (code, rows, columns)
        and box.manufacturer in (None, vendor)
    )


def covers_text(boxes: Sequence[MaskBox]) -> bool:
    """Whether one of the boxes that apply says that no text is left outside of them."""
    return any(box.covers_text for box in boxes)


def blanked(pixels: NDArray, boxes: Sequence[MaskBox], code: str) -> NDArray:
    """Pixels [rows, columns] with the boxes set to the smallest value of the image, for CT to air.

    A copy where a box applies, else the same array. The boxes fit: `matching` compared the size.
    """
    if not boxes:
        return pixels
    fill = AIR_HU if code == "CT" and pixels.dtype == np.int16 else pixels.min()
    changed = pixels.copy()
    for box in boxes:
        changed[box.top : box.bottom, box.left : box.right] = fill
    return changed
