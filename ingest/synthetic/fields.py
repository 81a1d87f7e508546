"""Random fields and shapes that the generated anatomies are made of.

Everything is a pure function of a numpy Generator and works on float32 arrays in pixel coordinates;
lengths called `share` are fractions of the shorter image side, so that a shape does not depend on the size.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating[Any]]  # float32
Random = np.random.Generator


def noise(rng: Random, shape: tuple[int, int], sigma: float) -> Image:
    """Zero-mean, unit-variance Gaussian noise [H, W], correlated over `sigma` px."""
    step = max(1, int(sigma / 1.5))  # coarse noise is drawn on a coarse grid and enlarged: cheap at any sigma
    height, width = (-(-side // step) + 4 for side in shape)
    field: Image = rng.standard_normal((height, width), dtype=np.float32)
    if sigma > 0.2:
        field = _float(cv2.GaussianBlur(field, (0, 0), max(sigma / step, 0.3)))
    if step > 1:
        field = _float(cv2.resize(field, (width * step, height * step), interpolation=cv2.INTER_CUBIC))
    field = field[: shape[0], : shape[1]]
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), dtype=np.float32)


def coordinates(
    rng: Random, shape: tuple[int, int], turn: float, shift: float, scale: float, warp: float
) -> tuple[Image, Image]:
    """Anatomical coordinates y, x [H, W]: [-1, 1] over the image, turned (rad), shifted, scaled and warped.

    The warp is a smooth random displacement, so that no two patients have the same outline.
    """
    height, width = shape
    y, x = np.meshgrid(
        np.linspace(-1, 1, height, dtype=np.float32),
        np.linspace(-1, 1, width, dtype=np.float32),
        indexing="ij",
    )
    dy, dx = rng.uniform(-shift, shift, 2)
    y, x = (y - dy) / scale, (x - dx) / scale
    cos, sin = np.cos(turn), np.sin(turn)
    y, x = cos * y - sin * x, sin * y + cos * x
    sigma = 0.18 * min(shape)
    return (
        np.asarray(y + warp * noise(rng, shape, sigma), np.float32),
        np.asarray(x + warp * noise(rng, shape, sigma), np.float32),
    )


def ellipse(
    y: Image,
    x: Image,
    center: tuple[float, float],
    radii: tuple[float, float],
    turn: float = 0.0,
    edge: float = 0.04,
) -> Image:
    """Soft ellipse in [0, 1] on the coordinates y, x; `edge` is the width of its border in those units."""
    v, u = y - center[0], x - center[1]
    if turn:
        cos, sin = np.cos(turn), np.sin(turn)
        v, u = cos * v - sin * u, sin * v + cos * u
    distance = np.sqrt((v / radii[0]) ** 2 + (u / radii[1]) ** 2)
    return ramp((1 - distance) * (min(radii) / edge))


def ramp(value: Image) -> Image:
    """A smooth step: 0 below -1, 1 above 1."""
    return np.asarray(0.5 + 0.5 * np.tanh(2 * value), dtype=np.float32)


def pick(rng: Random, region: Image, count: int) -> NDArray[np.float32]:
    """`count` points (row, column) inside region > 0.5, spread over it: [count, 2]."""
    inside = np.argwhere(region > 0.5).astype(np.float32)
    if len(inside) == 0:
        return np.zeros((0, 2), np.float32)
    # One point of every stretch of a pseudo-random walk through the region: no large part stays empty.
    order = rng.permutation(len(inside))[: max(4 * count, 1)]
    points = inside[order]
    keep: list[int] = [0]
    nearest = np.hypot(*(points - points[0]).T)
    while len(keep) < min(count, len(points)):
        best = int(nearest.argmax())
        keep.append(best)
        nearest = np.minimum(nearest, np.hypot(*(points - points[best]).T))
    return points[keep] + rng.uniform(-0.5, 0.5, (len(keep), 2)).astype(np.float32)


def spots(shape: tuple[int, int], points: NDArray[np.float32], radii: NDArray[np.float32]) -> Image:
    """Round spots with a flat top, [H, W] in [0, 1]; radii in px.

    A sum of Gaussians is two thin matrices multiplied; 1 - exp(-k g) flattens the tops.
    """
    rows = np.arange(shape[0], dtype=np.float32)[None]
    columns = np.arange(shape[1], dtype=np.float32)[None]
    width = 2 * (radii[:, None] * 0.75) ** 2
    down = np.exp(-((rows - points[:, :1]) ** 2) / width)
    across = np.exp(-((columns - points[:, 1:]) ** 2) / width)
    return np.asarray(1 - np.exp(-2.5 * (down.T @ across)), dtype=np.float32)


def streaks(
    rng: Random,
    shape: tuple[int, int],
    points: NDArray[np.float32],
    length: float,
    width: float,
    turn: float | None = None,
) -> Image:
    """Bent lines through the points, [H, W] in [0, 1]; length, width in px; turn in rad, or any direction."""
    canvas = np.zeros(shape, np.float32)
    for row, column in points:
        angle = rng.uniform(0, np.pi) if turn is None else turn + rng.normal(0, 0.25)
        half = 0.5 * length * rng.uniform(0.6, 1.4)
        bend = rng.normal(0, 0.18) * half
        along, aside = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
        center = np.array([row, column])
        path = [center - half * along, center + bend * aside, center + half * along]
        line = np.round(np.array(path)[:, ::-1] * 16).astype(np.int32)
        cv2.polylines(
            canvas, [line], False, 1.0, max(1, round(width * rng.uniform(0.8, 1.2))), cv2.LINE_AA, 4
        )
    return cv2.GaussianBlur(canvas, (0, 0), max(0.5, 0.35 * width)).astype(np.float32)


def finding(
    rng: Random, region: Image, positive: bool, count: int, radius: float, mix: float = 0.15
) -> Image:
    """The label as a pattern: round foci where `positive`, elongated strands where not; [H, W].

    Both have the same energy inside the region (variance 1) and contrast is the caller's, so that the label
    lies in the shape; `mix` is how much of the other pattern is in it (0 none, 1 as much). The mean is
    higher with foci, but varies more than that from image to image: a hint for a pixel-wise classifier.
    """
    shape = (region.shape[0], region.shape[1])
    points = pick(rng, region, 2 * count)
    points = points[rng.permutation(len(points))]
    size = (radius * rng.uniform(0.6, 1.5, len(points))).astype(np.float32)
    foci = spots(shape, points[:count], size[:count])
    strands = streaks(rng, shape, points[count:], 7.0 * radius, 0.9 * radius)
    main, other = (foci, strands) if positive else (strands, foci)
    pattern = _standard(_standard(main, region) + mix * _standard(other, region), region)
    return pattern + region * float(rng.normal(0.3 if positive else -0.3, 0.5))


def blur(image: Image, sigma: float) -> Image:
    """Gaussian blur; sigma in px."""
    return _float(cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma))


def _float(array: Any) -> Image:
    """OpenCV gives no precise type."""
    return np.asarray(array, dtype=np.float32)


def _standard(field: Image, region: Image) -> Image:
    """Zero mean and unit variance inside the region, nothing outside."""
    weight = region / (region.sum() + 1e-6)
    centered = field - (weight * field).sum()
    spread = np.sqrt((weight * centered**2).sum()) + 1e-6
    return np.asarray(region * centered / spread, dtype=np.float32)
