"""How much a case's probability moves when its image is transformed: 50 images x 50 random transforms, models
side by side (method.md section 7).

The transforms are a pure function of a key, so two models see the same ones. Ranges of rotation and scaling
are not printed in the paper; those here are ours.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

IMAGES, TRANSFORMS = 50, 50
WHISKER = 1.5  # of the distance of the quartiles (Tukey 1977)

Kind = Literal["gamma", "geometric", "both"]
Image = NDArray[np.float32]


@dataclass(frozen=True)
class Ranges:
    """Uniform. degrees: counter-clockwise; scale: above 1 things become larger."""

    gamma: tuple[float, float] = (1.8, 2.6)
    degrees: tuple[float, float] = (-10.0, 10.0)
    scale: tuple[float, float] = (0.9, 1.1)


@dataclass(frozen=True)
class Transform:
    gamma: float = 1.0
    degrees: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Box:
    """What a box plot shows. n values; undefined: left out, the probability of the image itself was 0; low,
    high: the outermost values within 1.5 quartile distances of the box; outliers: how many lie beyond."""

    n: int
    undefined: int
    mean: float
    median: float
    q1: float
    q3: float
    low: float
    high: float
    outliers: int


def draw_images(available: int, key: Sequence[int | str], count: int = IMAGES) -> NDArray[np.int64]:
    """Which images are looked at: `count` different ones, ascending, or all where there are fewer."""
    chosen = _stream((*key, "images")).permutation(available)[:count]
    return np.sort(chosen)


def draw_transforms(
    key: Sequence[int | str],
    count: int = TRANSFORMS,
    kind: Kind = "both",
    ranges: Ranges = Ranges(),
) -> list[Transform]:
    """The transforms of one image. key: such as (seed, key of the image).

    The i-th is the same whatever `count` is, and the parts that two kinds share are the same in both.
    """
    unit = _stream(key).random((count, 3))
    drawn = [_scaled(unit[:, i], r) for i, r in enumerate((ranges.gamma, ranges.degrees, ranges.scale))]
    if kind == "geometric":
        drawn[0] = np.ones(count)
    if kind == "gamma":
        drawn[1:] = np.zeros(count), np.ones(count)
    return [Transform(*(float(v) for v in one)) for one in zip(*drawn, strict=True)]


def apply(image: Image, transform: Transform) -> Image:
    """f32 [..., H, W] in [0, 1] to the same: rotated and scaled about the centre (bilinear; mirrored at the
    border), then to the power of gamma. Slices of a volume are turned alike. The identity is exact."""
    height, width = image.shape[-2:]
    out: Any = image
    if transform.degrees != 0 or transform.scale != 1:
        centre = ((width - 1) / 2, (height - 1) / 2)
        matrix = cv2.getRotationMatrix2D(centre, transform.degrees, transform.scale)
        planes = np.ascontiguousarray(image, np.float32).reshape(-1, height, width)
        turned = [
            cv2.warpAffine(
                p, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
            )
            for p in planes
        ]
        out = np.stack(turned).reshape(image.shape)
    if transform.gamma != 1:
        out = np.clip(out, 0, 1) ** np.float32(transform.gamma)
    return np.asarray(out, np.float32)


def measure(
    probability: Callable[[NDArray[np.float32]], NDArray[np.float64]],
    images: Sequence[Image],
    keys: Sequence[Sequence[int | str]],
    kind: Kind = "both",
    count: int = TRANSFORMS,
    ranges: Ranges = Ranges(),
) -> NDArray[np.float64]:
    """relative_deviation of a model, f64 [images, count].

    probability: f32 [n, ..., H, W] to the probability of the case, [n]; it is given an image as it is and
    all its transforms in one batch. keys: of each image, for draw_transforms: equal ones for all models.
    """
    found = []
    for image, key in zip(images, keys, strict=True):
        transforms = [Transform(), *draw_transforms(key, count, kind, ranges)]
        found.append(np.asarray(probability(np.stack([apply(image, t) for t in transforms])), np.float64))
    probabilities = np.stack(found)
    return relative_deviation(probabilities[:, 0], probabilities[:, 1:])


def relative_deviation(base: NDArray[np.float64], moved: NDArray[np.float64]) -> NDArray[np.float64]:
    """|p_t - p| / p: f64 [images, transforms]; nan where p is 0.

    base [images]: the probability of each image as it is; moved [images, transforms]: transformed.
    """
    before, after = np.asarray(base, np.float64), np.asarray(moved, np.float64)
    if before.ndim != 1 or after.ndim != 2 or len(before) != len(after):
        raise ValueError(f"base {before.shape} must be [images], moved {after.shape} [images, transforms]")
    if not all(((p >= 0) & (p <= 1)).all() for p in (before, after)):
        raise ValueError("probabilities must lie in [0, 1]")
    whole = np.where(before > 0, before, np.nan)[:, None]
    return np.asarray(np.abs(after - before[:, None]) / whole)


def box(values: NDArray[np.float64]) -> Box:
    """Statistics of all values together; nan are left out and counted. Quartiles are interpolated linearly.

    Raises UserError where no number is left.
    """
    every = np.asarray(values, np.float64).ravel()
    known = every[~np.isnan(every)]
    if not len(known):
        raise UserError(
            "no case has a probability above 0, so that no relative deviation is a number: give runs of a "
            "network that finds some"
        )
    q1, median, q3 = np.quantile(known, [0.25, 0.5, 0.75])
    reach = WHISKER * (q3 - q1)
    inside = known[(known >= q1 - reach) & (known <= q3 + reach)]
    return Box(
        n=len(known),
        undefined=len(every) - len(known),
        mean=float(known.mean()),
        median=float(median),
        q1=float(q1),
        q3=float(q3),
        low=float(inside.min()),
        high=float(inside.max()),
        outliers=len(known) - len(inside),
    )


def compare(deviations: Mapping[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """A row a model: model, box, and steadier: {other model: share of the images whose median deviation is
    smaller than with the other; ties count half}. All [images, transforms], of the same images."""
    medians = {name: np.array([_median(one) for one in d]) for name, d in deviations.items()}
    return [
        {
            "model": name,
            "box": box(d),
            "steadier": {o: _share_below(medians[name], medians[o]) for o in deviations if o != name},
        }
        for name, d in deviations.items()
    ]


def _share_below(ours: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    if ours.shape != others.shape:
        raise ValueError(f"{len(ours)} images against {len(others)}: models are compared on the same ones")
    both = ~(np.isnan(ours) | np.isnan(others))
    wins = (ours[both] < others[both]) + 0.5 * (ours[both] == others[both])
    return float(np.mean(wins)) if both.any() else float("nan")


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values[~np.isnan(values)])) if not np.isnan(values).all() else float("nan")


def _scaled(unit: NDArray[np.float64], limits: tuple[float, float]) -> NDArray[np.float64]:
    return limits[0] + (limits[1] - limits[0]) * unit


def _stream(key: Sequence[int | str]) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(list(key)).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))
