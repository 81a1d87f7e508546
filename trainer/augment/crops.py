"""Where crops lie and what each one draws: pure functions of (key, crop), no state.

Randomness is counter-based (method.md section 4.12): crop c of an image with key (seed, sample, pass) uses
the c-th block of a Philox stream keyed by a digest of the key. So a crop's numbers depend neither on the
order of samples, nor on the process or rank that makes it, nor on how many crops there are.
"""

import hashlib
import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.config import CropConfig, Range, ViewConfig

DRAWS_PER_CROP = 32
# Slots of a crop's draws. Fixed: a switched-off augmentation does not move the others.
SCALE, Y, X, ENERGY_ON, GAMMA_ON, GAMMA, LINEAR_ON, GAIN, OFFSET, BANDS = range(10)
MAX_BANDS = DRAWS_PER_CROP - BANDS


@dataclass(frozen=True)
class Placement:
    """Rescale the image to (rows, columns) px, then take `height` x `width` px at (y, x).

    Where the crop is larger than the rescaled image, y or x is negative and the outside is the image
    mirrored at its edge; of a volume it is black.
    """

    rows: int
    columns: int
    y: int
    x: int
    height: int
    width: int


def uniforms(key: tuple[int, ...], n_crops: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), f64[n_crops, DRAWS_PER_CROP]; key: (seed, sample, pass), 64 bits each."""
    body = struct.pack(f"<{len(key)}Q", *(k & 0xFFFFFFFFFFFFFFFF for k in key))
    digest = hashlib.blake2b(body, digest_size=16).digest()
    philox = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    raw = philox.random_raw(n_crops * DRAWS_PER_CROP)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, np.float64).reshape(n_crops, DRAWS_PER_CROP)


def place(
    shape: tuple[int, int], crop: CropConfig, views: ViewConfig, size_range: Range, u: NDArray[np.float64]
) -> Placement:
    """The rescaling and the position of one crop of an image of `shape` = (H, W) px.

    paper: the longer side becomes U[size_range] px; the plane of a volume becomes a size drawn uniformly
    between the two of views.volume.size_range. recommended: a rectangle of the crop's shape that covers
    U[share] of the area left after the border becomes the crop; it never reaches beyond that area. Both:
    `border` is cut off at each side, then the position is uniform; a crop that does not fit into what is
    left is centred on it.
    """
    height, width = shape
    if views.geometry == "paper" and views.volume is not None:
        smallest, largest = views.volume.size_range
        rows, columns = (round(a + (b - a) * u[SCALE]) for a, b in zip(smallest, largest, strict=True))
    else:
        if views.geometry == "paper":
            low, high = size_range
            scale = (low + (high - low) * u[SCALE]) / max(height, width)
        else:
            low, high = crop.share
            scale = crop.plane[0] / _side(shape, low + (high - low) * u[SCALE], views.border, crop.plane)
        rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    y = _position(rows, crop.plane[0], views.border[0], u[Y])
    x = _position(columns, crop.plane[1], views.border[1], u[X])
    return Placement(rows, columns, y, x, *crop.plane)


def finest_scale(shape: tuple[int, int], views: ViewConfig, size_range: Range) -> float:
    """The largest rescaling factor that any view of an image of `shape` may draw: more pixels than
    shape * factor are of no use to any view."""
    if views.geometry == "paper":
        return size_range[1] / max(shape)
    return max(c.plane[0] / _side(shape, c.share[0], views.border, c.plane) for c in views.crops)


def _side(shape: tuple[int, int], share: float, border: Range, plane: tuple[int, int]) -> float:
    """Height, in px, of the rectangle shaped like `plane` that covers `share` of the image without its
    border."""
    height, width = shape[0] * (1 - 2 * border[0]), shape[1] * (1 - 2 * border[1])
    aspect = plane[0] / plane[1]
    return min(math.sqrt(share * height * width * aspect), height, width * aspect)


def _position(length: int, size: int, border: float, u: float) -> int:
    low = math.ceil(border * length)
    high = length - low - size
    if high < low:
        return (low + high) // 2
    return low + min(int(u * (high - low + 1)), high - low)
