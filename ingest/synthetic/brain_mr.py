"""A contrast-enhanced T1-like brain, slice by slice, with metastases among what looks like them.

Lesions are spheres of a few mm, as bright as the enhanced vessels, sinuses and choroid plexus beside them. In
one slice a vessel that runs through it looks like a small lesion; in the slices above and below the vessel
goes on and the lesion ends.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import Image, Random, coordinates, ellipse, noise, ramp

FINE = 3  # layers of a slice: thin things fill a slice in part only
COVERED = 0.4  # the share of a voxel from which it belongs to a lesion
LEAST_PIXELS = 4  # of a lesion in a slice; less of it is not seen, and not in the mask
_LESION_MM = (6.0, 15.0)  # diameter
_VESSEL_MM = (0.9, 2.0)  # radius

Points = NDArray[np.float32]  # [n, 4]: layer, row, column (px) and radius (mm)


@dataclass(frozen=True)
class BrainSeries:
    """signal: f32 [slices, H, W], arbitrary units, >= 0. lesions: uint8 [slices, H, W], the number of the
    lesion (from 1 on), 0 where there is none."""

    signal: NDArray[np.float32]
    lesions: NDArray[np.uint8]
    spacing_mm: float
    step_mm: float


def brain(rng: Random, lesions: int, slices: int, side: int) -> BrainSeries:
    """One patient with so many lesions. side: px of the longer side of a slice."""
    shape = (side, int(side * rng.uniform(0.86, 1.0)))
    spacing, step = float(rng.uniform(205, 225) / side), float(rng.choice([3.5, 4.0, 4.5]))
    head = _Head(rng, shape, slices)
    size = (slices * FINE, *shape)
    scale = (step / FINE, spacing, spacing)
    vessels = _cover(size, _vessels(rng, head, scale), scale)
    seeds = _lesions(rng, head, lesions, scale)
    signal = head.tissue(rng) + 0.0
    bright = rng.uniform(0.85, 1.15)  # of the contrast agent
    signal += _slabs(vessels, slices) * (bright - signal)
    truth = np.zeros(signal.shape, np.uint8)
    for number, seed in enumerate(seeds, start=1):
        contrast = bright * rng.uniform(0.8, 1.1)
        whole = _slabs(_cover(size, seed[None], scale), slices)
        core = seed * np.array([1, 1, 1, 0.55], np.float32)
        hollow = rng.uniform(0.3, 0.6) if rng.random() < 0.3 and seed[3] > 3.5 else 0.0
        inner = _slabs(_cover(size, core[None], scale), slices) if hollow else 0.0
        halo = seed * np.array([1, 1, 1, rng.uniform(1.3, 2.0)], np.float32)
        swelling = _slabs(_cover(size, halo[None], scale), slices) * (1 - whole) * rng.uniform(0, 0.12)
        signal *= 1 - swelling
        signal += whole * (contrast * (1 - hollow * inner) - signal)
        covered = whole >= COVERED
        covered &= covered.sum((1, 2), keepdims=True) >= LEAST_PIXELS
        truth[covered] = number
    return BrainSeries(_measured(rng, signal), truth, round(spacing, 4), step)


class _Head:
    """The outline and the tissues of one patient, [slices, H, W] each."""

    def __init__(self, rng: Random, shape: tuple[int, int], slices: int) -> None:
        u = rng.uniform
        self.shape, self.slices = shape, slices
        turn, seed = u(-0.2, 0.2), int(rng.integers(2**31))
        y, x = coordinates(np.random.default_rng(seed), shape, turn, 0.04, u(0.92, 1.04), 0.015)
        level = np.linspace(u(-0.7, -0.55), u(0.8, 0.9), slices)
        high, wide = u(0.86, 0.94), u(0.7, 0.8)
        folds, ventricle = u(0.05, 0.08), u(0.7, 1.5)
        self.scalp, self.bone, self.inside, self.radius = (
            np.zeros((slices, *shape), np.float32) for _ in range(4)
        )
        self.brain, self.white, self.fluid, self.plexus = (np.zeros_like(self.scalp) for _ in range(4))
        pattern = _along(np.stack([noise(rng, shape, 0.028 * shape[0]) for _ in range(slices)]), 0.7)
        for i, z in enumerate(level):
            part = float(np.sqrt(1 - z**2))
            h, w = high * part, wide * part
            self.scalp[i] = ellipse(y, x, (0, 0), (h, w))
            self.bone[i] = ellipse(y, x, (0, 0), (h - 0.06, w - 0.06))
            self.inside[i] = ellipse(y, x, (0, 0), (h - 0.12, w - 0.12))
            inner = np.sqrt((y / (h - 0.13)) ** 2 + (x / (w - 0.13)) ** 2)
            self.radius[i] = inner
            self.brain[i] = self.inside[i] * ramp((0.99 - inner + 0.5 * folds * pattern[i]) / 0.06)
            middle = 1 - ellipse(y, x, (0, 0), (h, 0.012))
            self.white[i] = ramp((0.8 - inner + 1.5 * folds * pattern[i]) / 0.06) * middle
            grow = ventricle * max(0.0, 1 - (z / 0.55) ** 2) * part
            if grow > 0.1:
                self._ventricles(i, y, x, grow)
        self.brain = np.clip(self.brain - self.fluid, 0, 1)

    def _ventricles(self, i: int, y: Image, x: Image, grow: float) -> None:
        for side in (-1, 1):
            for cy, turn in ((-0.17, 0.35), (0.2, -0.45)):
                horn = ellipse(y, x, (cy, side * 0.09), (0.2 * grow, 0.055 * grow), side * turn)
                self.fluid[i] = np.maximum(self.fluid[i], horn)
            knot = ellipse(y, x, (0.26, side * 0.13), (0.06 * grow, 0.035 * grow), -side * 0.45)
            self.plexus[i] = np.maximum(self.plexus[i], knot)

    def tissue(self, rng: Random) -> NDArray[np.float32]:
        """The signal without vessels and lesions."""
        u = rng.uniform
        fat, skull, csf, grey, pale, knot = (
            u(0.75, 0.95), u(0.06, 0.14), u(0.16, 0.24), u(0.40, 0.48), u(0.54, 0.62), u(0.75, 1.0)
        )  # fmt: skip
        image = self.scalp * fat + self.bone * (skull - fat) + self.inside * (csf - skull)
        image = image * (1 - self.brain) + self.brain * (grey + (pale - grey) * self.white)
        return np.asarray(image + self.plexus * (knot - image), np.float32)


def _vessels(rng: Random, head: _Head, scale: tuple[float, float, float]) -> Points:
    """Random walks that keep their direction, most of them near the surface, and the sagittal sinus."""
    rows = []
    for _ in range(int(rng.integers(26, 44))):
        place = _inside(rng, head, rng.uniform(0.35, 0.85), 1.02, scale)
        direction = rng.standard_normal(3) * (1.5, 1, 1)
        width, taper = rng.uniform(*_VESSEL_MM), rng.uniform(0.4, 1.0)
        n = int(rng.integers(18, 50))
        for k in range(n):
            direction += 0.35 * rng.standard_normal(3)
            direction /= np.linalg.norm(direction)
            place = place + direction
            layer, row, column = place / scale
            if not _within(head, layer, row, column):
                break
            rows.append((layer, row, column, width * (1 - (1 - taper) * k / n)))
    for i in range(head.slices):  # the sinus, behind, between the halves of the brain
        column = head.radius[i].min(0).argmin()
        behind = np.flatnonzero(head.radius[i, :, column] < 1.0)
        if behind.size:
            rows += [(i * FINE + k, behind[-1], column, rng.uniform(2.2, 3.2)) for k in range(FINE)]
    return np.array(rows, np.float32).reshape(-1, 4)


def _lesions(rng: Random, head: _Head, count: int, scale: tuple[float, float, float]) -> Points:
    """Half of the centres lie near the cortex; diameters are even in their logarithm."""
    low, high = np.log(_LESION_MM)
    rows = []
    for _ in range(count):
        place = _inside(rng, head, rng.choice([0.0, 0.55]), 0.93, scale) / scale
        rows.append((*place, np.exp(rng.uniform(low, high)) / 2))
    return np.array(rows, np.float32).reshape(-1, 4)


def _inside(rng: Random, head: _Head, low: float, high: float, scale: tuple[float, float, float]) -> NDArray:
    """A place, mm, in the brain at a relative radius in [low, high], not in the two outer slices."""
    region = (head.radius >= low) & (head.radius <= high) & (head.inside > 0.5) & (head.fluid < 0.2)
    region[:2], region[-2:] = False, False
    found = np.argwhere(region)
    place = found[int(rng.integers(len(found)))] + rng.uniform(-0.5, 0.5, 3)
    return np.asarray((place * (FINE, 1, 1) + (FINE // 2, 0, 0)) * scale)


def _within(head: _Head, layer: float, row: float, column: float) -> bool:
    z, y, x = int(layer // FINE), round(row), round(column)
    sides = (head.slices, *head.shape)
    return all(0 <= v < side for v, side in zip((z, y, x), sides, strict=True)) and head.inside[z, y, x] > 0.4


def _cover(size: tuple[int, int, int], points: Points, scale: tuple[float, float, float]) -> Image:
    """How much of each fine voxel lies in one of the spheres, [layers, H, W]; the border is a pixel wide."""
    out = np.zeros(size, np.float32)
    for layer, row, column, radius in points.tolist():
        spans, parts = [], []
        for centre, length, unit in zip((layer, row, column), size, scale, strict=True):
            reach = radius / unit + 1
            first, last = max(int(centre - reach), 0), min(int(centre + reach) + 2, length)
            spans.append(slice(first, last))
            parts.append(((np.arange(first, last, dtype=np.float32) - centre) * unit) ** 2)
        distance = np.sqrt(parts[0][:, None, None] + parts[1][:, None] + parts[2])
        here = out[tuple(spans)]
        np.maximum(here, np.clip((radius - distance) / scale[1] + 0.5, 0, 1), out=here)
    return out


def _slabs(fine: Image, slices: int) -> Image:
    return np.asarray(fine.reshape(slices, FINE, *fine.shape[1:]).mean(1), np.float32)


def _along(stack: Image, share: float) -> Image:
    """Each slice with a share of its neighbours, of variance 1 again."""
    padded = np.concatenate([stack[:1], stack, stack[-1:]])
    mixed = stack + share * (padded[:-2] + padded[2:])
    return np.asarray(mixed / np.sqrt(1 + 2 * share**2), np.float32)


def _measured(rng: Random, signal: NDArray[np.float32]) -> NDArray[np.float32]:
    """Through a coil of uneven sensitivity, with the Rician noise of a magnitude image."""
    shape = (signal.shape[1], signal.shape[2])
    field, other = (noise(rng, shape, 0.45 * min(shape)) for _ in range(2))
    strength, level = rng.uniform(0.08, 0.2), rng.uniform(0.025, 0.055)
    out = np.empty_like(signal)
    for i, image in enumerate(signal):
        part = i / max(len(signal) - 1, 1)
        image = image * np.exp(strength * ((1 - part) * field + part * other))
        real = image + level * noise(rng, shape, 0.4)
        out[i] = np.hypot(np.maximum(real, 0), level * noise(rng, shape, 0.4))
    return out * np.float32(rng.uniform(300, 1200))
