"""Rules that the readers of all formats share."""

import cv2
from numpy.typing import NDArray

from ingest.frames import Refused
from shards.schema import Reason, Row

AIR_HU, HIGHEST_HU = -1024, 32767  # range of stored CT, Hounsfield units


def spread(count: int, most: int) -> list[int]:
    """All of range(count), or `most` of it, evenly spread."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def limited(pixels: NDArray, geometry: Row, longest: int) -> tuple[NDArray, Row]:
    """Reduce [rows, columns] by area averaging to a long side of at most `longest`; spacing follows."""
    rows, columns = pixels.shape
    scale = longest / max(rows, columns)
    if scale >= 1:
        return pixels, geometry
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    factors = {"spacing_row_mm": rows / size[1], "spacing_column_mm": columns / size[0]}
    scaled = {n: v * factors[n] for n, v in geometry.items() if n in factors and v is not None}
    return small, geometry | scaled


def check_pixels(pixels: NDArray, min_side: int) -> None:
    """Raise Refused for an image that is too small or blank."""
    if min(pixels.shape) < min_side:
        raise Refused(Reason.TOO_SMALL)
    if pixels.min() == pixels.max():
        raise Refused(Reason.CONSTANT)
