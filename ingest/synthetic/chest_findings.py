"""Chest radiographs with nodules and pneumothorax, and what does not count although it looks alike.

Lengths are pixels of the exposure unless they are called `share` (of its width). Boxes are x0, y0, x1, y1 in
continuous pixel coordinates: (0, 0) is the upper left corner of the upper left pixel and pixel i covers
[i, i + 1), so x0, y0 are inclusive and x1, y1 exclusive.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import Image, Random, blur, ramp
from ingest.synthetic.xr import Chest, anatomy, film

NODULE, PNEUMOTHORAX = "nodule", "pneumothorax"
LABELS = (NODULE, PNEUMOTHORAX)
NODULE_SHARE, PNEUMOTHORAX_SHARE = 0.5, 0.2  # of the exposures
_CONTRAST = (0.08, 0.16)  # of a nodule; lung against soft tissue is .34, a rib .02 to .05
_RADIUS = (0.03, 0.052)  # share

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Finding:
    """visibility: 0 (hardly to be seen) to 1."""

    label: str
    box: Box
    visibility: float


@dataclass(frozen=True)
class Exposure:
    """image: f32 [H, W] in [0, 1], larger = more attenuation. mimics: places that a reader may take for a
    nodule."""

    image: Image
    findings: tuple[Finding, ...]
    mimics: tuple[Box, ...]


def exposures(rng: Random, images: int) -> list[Exposure]:
    """Exposures of one patient; each has its own position and findings."""
    chest = Chest.draw(rng)
    seed = int(rng.integers(2**31))
    return [_exposure(np.random.default_rng([seed, i]), chest) for i in range(images)]


def _exposure(rng: Random, chest: Chest) -> Exposure:
    width = int(rng.integers(150, 209))
    shape = (int(width * rng.uniform(0.95, 1.1)), width)
    image, lungs = anatomy(rng, chest, shape)
    findings: list[Finding] = []
    if rng.random() < PNEUMOTHORAX_SHARE:
        image, found = _pneumothorax(rng, image, lungs)
        findings += found
    elif rng.random() < 0.4:
        image = image + _skin_fold(rng, lungs)
    free = _eroded(lungs, _RADIUS[1] * width)
    if rng.random() < NODULE_SHARE:
        for row, column in _spread(rng, free, int(rng.integers(1, 4)), 4 * _RADIUS[1] * width):
            blob, box, visibility = _nodule(rng, shape, (row, column))
            image = image + blob
            findings.append(Finding(NODULE, box, visibility))
            free = free & ~_near(shape, (row, column), 4 * _RADIUS[1] * width)
    mimics = []
    for row, column in _spread(rng, free, int(rng.integers(1, 4)), 3 * _RADIUS[1] * width):
        blob, box = _strand(rng, shape, (row, column))
        image = image + blob
        mimics.append(box)
    image = image + _dots(rng, lungs, int(rng.integers(3, 8)))
    image = image + _outside(rng, lungs, int(rng.integers(1, 4)))
    return Exposure(film(rng, np.asarray(image, np.float32), shape), tuple(findings), tuple(mimics))


def _nodule(rng: Random, shape: tuple[int, int], centre: tuple[float, float]) -> tuple[Image, Box, float]:
    """A round opacity with a lumpy outline."""
    radius = rng.uniform(*_RADIUS) * shape[1]
    contrast = rng.uniform(*_CONTRAST)
    distance, angle = _polar(shape, centre)
    waves = sum(rng.normal(0, 0.06) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    mask = ramp((1 + waves - distance / radius) * 2.5)
    visibility = (contrast - _CONTRAST[0]) / (_CONTRAST[1] - _CONTRAST[0])
    return np.asarray(contrast * mask, np.float32), _bounds(mask > 0.5), float(visibility)


def _strand(rng: Random, shape: tuple[int, int], centre: tuple[float, float]) -> tuple[Image, Box]:
    """An elongated opacity of the area and the contrast of a nodule: a scar or a vessel across the beam."""
    radius, stretch, turn = rng.uniform(*_RADIUS) * shape[1], rng.uniform(1.7, 2.2), rng.uniform(0, np.pi)
    rows, columns = _grid(shape, centre)
    along = rows * np.sin(turn) + columns * np.cos(turn)
    across = rows * np.cos(turn) - columns * np.sin(turn)
    distance = np.hypot(along / (radius * stretch), across * stretch / radius)
    mask = ramp((1 - distance) * 2.5 / stretch)
    return np.asarray(rng.uniform(*_CONTRAST) * mask, np.float32), _bounds(mask > 0.5)


def _dots(rng: Random, lungs: Image, count: int) -> Image:
    """Vessels along the beam: denser than a nodule, and a third of its size."""
    total = np.zeros(lungs.shape, np.float32)
    for row, column in _spread(rng, lungs > 0.5, count, 4):
        distance, _ = _polar(lungs.shape, (row, column))
        radius = rng.uniform(0.009, 0.014) * lungs.shape[1]
        total += rng.uniform(0.08, 0.15) * ramp((1 - distance / radius) * 1.5)
    return total


def _outside(rng: Random, lungs: Image, count: int) -> Image:
    """Round shadows of the size of nodules beside the lungs: no finding of the lung."""
    width = lungs.shape[1]
    body = np.zeros(lungs.shape, bool)
    body[int(0.15 * lungs.shape[0]) :, int(0.08 * width) : int(0.92 * width)] = True
    beside = body & (cv2.dilate((lungs > 0.2).astype(np.uint8), _disc(2 * _RADIUS[1] * width)) == 0)
    total = np.zeros(lungs.shape, np.float32)
    for centre in _spread(rng, beside, count, 3 * _RADIUS[1] * width):
        total += _nodule(rng, lungs.shape, centre)[0]
    return total


def _pneumothorax(rng: Random, image: Image, lungs: Image) -> tuple[Image, list[Finding]]:
    """Air between chest wall and lung: a darker crescent at apex and side, with the thin line of the pleura.

    The lung of one side is moved towards midline and diaphragm; what it leaves is the crescent.
    """
    side, sign = _one_lung(rng, lungs)
    depth = rng.uniform(0.045, 0.09) * lungs.shape[1]
    shift = np.array([[1, 0, -sign * depth], [0, 1, rng.uniform(0.8, 1.6) * depth]], np.float32)
    moved = cv2.warpAffine(side, shift, side.shape[::-1])
    rows = np.arange(side.shape[0], dtype=np.float32)[:, None]
    top = float(np.flatnonzero((side > 0.5).any(1))[0])
    reach = rng.uniform(0.3, 0.55) * float((side > 0.5).any(1).sum())
    upper = ramp((top + reach - rows) / (0.15 * reach))
    air = np.asarray(side * (1 - moved) * upper, np.float32)
    mask = air > 0.5
    if mask.sum() < 12:
        return image, []
    darker, line = rng.uniform(0.05, 0.1), rng.uniform(0.03, 0.07)
    edge = blur(np.asarray(4 * moved * (1 - moved) * side * upper, np.float32), 0.5)
    found = Finding(PNEUMOTHORAX, _bounds(mask), float((darker - 0.05) / 0.05))
    return np.asarray(image - darker * air + line * edge, np.float32), [found]


def _skin_fold(rng: Random, lungs: Image) -> Image:
    """A line like that of the pleura, with the same grey on both sides."""
    side, sign = _one_lung(rng, lungs)
    depth = rng.uniform(0.06, 0.14) * lungs.shape[1]
    shift = np.array([[1, 0, -sign * depth], [0, 1, rng.uniform(0, 0.5) * depth]], np.float32)
    moved = cv2.warpAffine(side, shift, side.shape[::-1])
    return rng.uniform(0.03, 0.07) * blur(np.asarray(4 * moved * (1 - moved) * side, np.float32), 0.5)


def _one_lung(rng: Random, lungs: Image) -> tuple[Image, int]:
    """One of the two, and on which side of the image it lies (-1 left, 1 right)."""
    columns = np.arange(lungs.shape[1], dtype=np.float32)
    middle = float((lungs.sum(0) * columns).sum() / lungs.sum())
    sign = int(rng.choice([-1, 1]))
    return np.asarray(lungs * ((columns - middle) * sign > 0), np.float32), sign


def _spread(rng: Random, region: NDArray[np.bool_], count: int, apart: float) -> list[tuple[float, float]]:
    """Up to `count` points (row, column) of a region, no two nearer than `apart` px."""
    inside = np.argwhere(region)
    points: list[tuple[float, float]] = []
    for row, column in inside[rng.permutation(len(inside))[:200]].tolist():
        if len(points) == count:
            break
        if all(np.hypot(row - r, column - c) >= apart for r, c in points):
            points.append((float(row), float(column)))
    return points


def _grid(shape: tuple[int, ...], centre: tuple[float, float]) -> tuple[Image, Image]:
    rows = np.arange(shape[0], dtype=np.float32)[:, None] - centre[0]
    columns = np.arange(shape[1], dtype=np.float32)[None] - centre[1]
    return rows, columns


def _polar(shape: tuple[int, ...], centre: tuple[float, float]) -> tuple[Image, Image]:
    rows, columns = _grid(shape, centre)
    return np.hypot(rows, columns), np.arctan2(rows, columns)


def _near(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> NDArray[np.bool_]:
    return np.asarray(_polar(shape, centre)[0] < radius)


def _eroded(lungs: Image, radius: float) -> NDArray[np.bool_]:
    return np.asarray(cv2.erode((lungs > 0.5).astype(np.uint8), _disc(radius)) > 0)


def _disc(radius: float) -> NDArray[np.uint8]:
    side = 2 * round(radius) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)


def _bounds(mask: NDArray[np.bool_]) -> Box:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
