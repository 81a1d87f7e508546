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
    """Rescale the image to (rows, columns) px, then take the square of `size` px at (y, x).

    Where the crop is larger than the rescaled image, y or x is negative and the outside is the image
    mirrored at its edge.
    """

    rows: int
    columns: int
    y: int
    x: int
    size: int


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

    paper: the longer side becomes U[size_range] px. recommended: a square that covers U[share] of the area
    left after the border becomes `size` px; it is never larger than the shorter side of that area. Both:
    `border` is cut off at each side, then the position is uniform; a crop that does not fit into what is
    left is centred on it.
    """
    height, width = shape
    if views.geometry == "paper":
        low, high = size_range
        scale = (low + (high - low) * u[SCALE]) / max(height, width)
    else:
        low, high = crop.share
        scale = crop.size / _side(shape, low + (high - low) * u[SCALE], views.border)
    rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    y = _position(rows, crop.size, views.border[0], u[Y])
    x = _position(columns, crop.size, views.border[1], u[X])
    return Placement(rows, columns, y, x, crop.size)


def finest_scale(shape: tuple[int, int], views: ViewConfig, size_range: Range) -> float:
    """The largest rescaling factor that any view of an image of `shape` may draw: more pixels than
    shape * factor are of no use to any view."""
    if views.geometry == "paper":
        return size_range[1] / max(shape)
    return max(c.size / _side(shape, c.share[0], views.border) for c in views.crops)


def _side(shape: tuple[int, int], share: float, border: Range) -> float:
    """Side, in px, of the square covering `share` of the image without its border."""
    height, width = shape[0] * (1 - 2 * border[0]), shape[1] * (1 - 2 * border[1])
    return min(math.sqrt(share * height * width), height, width)


def _position(length: int, size: int, border: float, u: float) -> int:
    low = math.ceil(border * length)
    high = length - low - size
    if high < low:
        return (low + high) // 2
    return low + min(int(u * (high - low + 1)), high - low)
