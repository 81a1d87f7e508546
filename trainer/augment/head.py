"""Where the head lies in a CT volume, from its pixels alone: in place of the paper's landmarks. No torch.

    1. On a grid of about 4 mm: denser than THRESHOLD_HU (skin and all inside of it, not air nor foam).
    2. An opening in the plane by a disc of OPENING_MM: what is thinner goes (table top, head rest, cables).
    3. The largest connected component in 3D: the head, with neck and shoulders if they were scanned.
    4. From its top (first slice of at least TOP_CM2) down HEIGHT_MM: the neck and what is below stay out.
    5. In the plane the bounding box of what lies in the upper BRAIN_MM: no chin and no shoulders.

What it does not do: it turns nothing (a head that lies askew stays so), it cannot know what was not scanned
(where the vertex is missing, the first slice is the top), and it takes what is largest: arms that touch the
head and solid blocks thicker than the opening make the box too large; of another body part the upper
HEIGHT_MM are taken. Below LEAST_CM3 nothing is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

GRID_MM = 4.0
THRESHOLD_HU = -200.0
OPENING_MM = 8.0  # radius
TOP_CM2, LEAST_CM3 = 10.0, 50.0
HEIGHT_MM, BRAIN_MM = 160.0, 120.0
LEAST_HEIGHT_MM = 100.0  # of the box: a volume of fewer slices is not stretched over all of it
MARGIN_MM = 2.0


@dataclass(frozen=True)
class Extent:
    """Edges in voxels along (z, y, x) of an axial volume; they may lie outside of it."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]


def find_head(
    volume: NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    shear: tuple[float, float] = (0.0, 0.0),
    threshold: float = THRESHOLD_HU,
) -> Extent | None:
    """The head in an axial volume f32[Z, Y, X], slices from the feet to the head; None where there is none.

    shear: voxels (y, x) by which a slice lies further than the one below it (tilted gantry); the extent is
    that of the volume straightened about its middle slice.
    """
    stride = max(1, round(GRID_MM / spacing_mm[0]))
    rows, columns = (
        max(1, min(n, round(n * mm / GRID_MM)))
        for n, mm in zip(volume.shape[1:], spacing_mm[1:], strict=True)
    )
    cell = (volume.shape[1] / rows, volume.shape[2] / columns)  # voxels of a cell of the grid
    cell_mm = (cell[0] * spacing_mm[1], cell[1] * spacing_mm[2])
    masks = []
    for z in range(0, len(volume), stride):
        image = np.ascontiguousarray(volume[z])
        coarse = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
        dy, dx = (s * (z - (len(volume) - 1) / 2) / c for s, c in zip(shear, cell, strict=True))
        if max(abs(dy), abs(dx)) > 0.25:
            moved = np.array([[1, 0, dx], [0, 1, dy]])
            coarse = cv2.warpAffine(coarse, moved, (columns, rows), borderValue=(threshold - 1,))
        masks.append(_opened(coarse > threshold, cell_mm))
    body = largest_component(np.stack(masks))
    cm2 = body.sum(axis=(1, 2)) * cell_mm[0] * cell_mm[1] / 100
    if float(cm2.sum()) * stride * spacing_mm[0] / 10 < LEAST_CM3:
        return None
    return _extent(body, cm2, stride, cell, spacing_mm, len(volume))


def _extent(
    body: NDArray[np.bool_],
    cm2: NDArray[np.float64],
    stride: int,
    cell: tuple[float, float],
    spacing_mm: tuple[float, float, float],
    slices: int,
) -> Extent:
    large = np.flatnonzero(cm2 >= min(TOP_CM2, float(cm2.max())))
    top = min((int(large[-1]) + 1) * stride + GRID_MM / spacing_mm[0], slices)  # the opening takes the tip
    bottom = max(float(np.flatnonzero(cm2)[0] * stride), top - HEIGHT_MM / spacing_mm[0])
    bottom = min(bottom, top - LEAST_HEIGHT_MM / spacing_mm[0])
    first = max(0, int((top - BRAIN_MM / spacing_mm[0]) / stride))
    brain = np.any(body[first : int(large[-1]) + 1], axis=0)
    low, high = [float(bottom)], [float(top)]
    there = [np.flatnonzero(np.any(brain, axis=axis)) for axis in (1, 0)]
    for own, step, mm in zip(there, cell, spacing_mm[1:], strict=True):
        low.append(float(own[0] * step - MARGIN_MM / mm))
        high.append(float((own[-1] + 1) * step + MARGIN_MM / mm))
    return Extent((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def _opened(mask: NDArray[np.bool_], cell_mm: tuple[float, float]) -> NDArray[np.bool_]:
    rows, columns = (2 * round(OPENING_MM / mm) + 1 for mm in cell_mm)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (columns, rows))
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, disc).astype(bool)


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of a mask [Z, Y, X], what is connected through sides; empty where the mask is."""
    labels = np.zeros(mask.shape, np.int64)
    parent, sizes = [0], [0]
    for z, plane in enumerate(mask):
        count, found, stats, _ = cv2.connectedComponentsWithStats(plane.astype(np.uint8), connectivity=4)
        labels[z] = np.where(found > 0, found + len(parent) - 1, 0)
        parent += range(len(parent), len(parent) + count - 1)
        sizes += stats[1:, cv2.CC_STAT_AREA].tolist()
        if z:
            both = (labels[z - 1] > 0) & (labels[z] > 0)
            for a, b in np.unique(np.stack([labels[z - 1][both], labels[z][both]]), axis=1).T.tolist():
                low, high = sorted((_root(parent, a), _root(parent, b)))
                parent[high] = low
    roots = np.array([_root(parent, n) for n in range(len(parent))])
    totals = np.bincount(roots, weights=sizes, minlength=len(parent))
    return np.asarray((roots[labels] == int(totals.argmax())) & mask)


def _root(parent: Sequence[int], label: int) -> int:
    while parent[label] != label:
        label = parent[label]
    return label
