"""Made-up head CTs in HU: a skull with a brain and two ventricles, a neck, a table; everything in mm."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Head:
    """spacing: of slices, rows, columns. centre: of the skull, from the first voxel. height: scanned, up to
    20 mm above the vertex; `top` mm are missing at the top. turn: of the table, degrees."""

    spacing: tuple[float, float, float] = (5.0, 1.6, 1.6)
    size: tuple[int, int] = (160, 160)  # rows, columns
    centre: tuple[float, float] = (120.0, 128.0)  # y, x
    height: float = 240.0
    top: float = 0.0
    turn: float = 0.0
    table: bool = True
    tilt: float = 0.0  # gantry, degrees
    radii: tuple[float, float, float] = (100.0, 92.0, 74.0)  # of the skull, z, y, x


def make(head: Head, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Volume f32 [slices, rows, columns] from the feet up, and its affine [3, 4] in LPS."""
    slices = round((head.height - head.top) / head.spacing[0])
    z, y, x = np.meshgrid(
        *((np.arange(n) * mm for n, mm in zip((slices, *head.size), head.spacing, strict=True))),
        indexing="ij",
        sparse=True,
    )
    shear = np.tan(np.radians(head.tilt))
    middle = (slices - 1) / 2 * head.spacing[0]
    y = y + shear * (z - middle)
    up = z - (head.height - 20 - head.radii[0])  # of the centre of the skull
    back, left = y - head.centre[0], x - head.centre[1]

    def ball(scale: float, dz: float = 0.0, dx: float = 0.0) -> NDArray[np.bool_]:
        rz, ry, rx = (r * scale for r in head.radii)
        return (up - dz) ** 2 / rz**2 + back**2 / ry**2 + (left - dx) ** 2 / rx**2 < 1

    volume = np.full((slices, *head.size), -1000, np.float32)
    neck = (back - 10) ** 2 + left**2 < 55**2
    volume[(neck & (up < -60)) & np.ones_like(volume, bool)] = 50
    volume[ball(1.0)] = 40
    volume[ball(0.96)] = 1100
    volume[ball(0.88)] = 34
    volume[ball(0.25, dx=14)] = 8
    volume[ball(0.25, dx=-14)] = 8
    if head.table:
        angle = np.radians(head.turn)
        below = np.cos(angle) * back + np.sin(angle) * left - (head.radii[1] + 6)
        shell = (np.abs(below - 3) < 3) | (np.abs(below - 45) < 3)
        volume[shell & np.ones_like(volume, bool)] = 150
    volume += np.random.default_rng(seed).normal(0, 4, volume.shape).astype(np.float32)
    step = np.array([0, shear * head.spacing[0], head.spacing[0]])  # of a slice, mm
    affine = np.stack([step, [0, head.spacing[1], 0], [head.spacing[2], 0, 0], [-90.0, -70.0, 10.0]], axis=1)
    return volume, affine
