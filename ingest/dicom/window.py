"""The window of an image (PS3.3 C.11.2) in the units of its stored pixels: recorded, never applied."""

import numpy as np
from pydicom.dataset import Dataset

from ingest.dicom import header
from ingest.dicom.geometry import group_item
from ingest.dicom.pixels import Stored, Values, has_modality_lut, mirrored
from shards.schema import Row

_FUNCTIONS = frozenset({"LINEAR", "LINEAR_EXACT", "SIGMOID"})


def window(dataset: Dataset, index: int, code: str, stored: Stored, values: Values) -> Row:
    """The first window of frame `index`; without one, that of its first VOI LUT; {} without either.

    Of a VOI LUT the window is the range of inputs between which its output rises from its lowest to its
    highest value, with the function LINEAR: the shape of the curve is not kept.
    """
    if stored.was_color:
        return {}
    holder = group_item(dataset, index, "FrameVOILUTSequence") or dataset
    center, width = header.number(holder, "WindowCenter"), header.number(holder, "WindowWidth")
    function = header.text(holder, "VOILUTFunction").upper()
    if center is None or width is None or width <= 0:
        lut = header.item(holder, "VOILUTSequence")
        found = None if lut is None else lut_range(lut, bool(header.integer(dataset, "PixelRepresentation")))
        if found is None:
            return {}
        low, high = found
        # LINEAR maps from center - 0.5 - (width - 1) / 2 to center - 0.5 + (width - 1) / 2.
        center, width, function = (low + high + 1) / 2, float(high - low + 1), "LINEAR"
    if code != "CT" and not has_modality_lut(dataset):
        slope = values.slope or 1.0
        center, width = (center - (values.intercept or 0.0)) / slope, abs(width / slope)
    if stored.inverted:
        center = mirrored(center, stored.bits, stored.pixels.dtype == np.int16)
    return {
        "window_center": center,
        "window_width": width,
        "window_function": function if function in _FUNCTIONS else "LINEAR",
    }


def lut_range(lut: Dataset, signed: bool) -> tuple[int, int] | None:
    """First and last input between which a VOI LUT (PS3.3 C.11.2.1.1) rises; None for one that does not."""
    descriptor, data = header.value(lut, "LUTDescriptor"), header.value(lut, "LUTData")
    try:
        entries, first = int(descriptor[0]) or 1 << 16, int(descriptor[1])
        if isinstance(data, bytes):
            table = np.frombuffer(data, "<u1" if len(data) < 2 * entries else "<u2")[:entries]
        else:
            table = np.array(data, np.int64) & 0xFFFF
    except (TypeError, ValueError, IndexError, KeyError):
        return None
    if len(table) != entries or entries < 2 or table[-1] <= table[0]:
        return None
    if signed and first > 0x7FFF:
        first -= 1 << 16
    low = int(np.flatnonzero(table == table.min())[-1])
    high = int(np.flatnonzero(table == table.max())[0])
    return (first + low, first + high) if low < high else None
