"""Frequency bands of an image and their energies (method.md equation 5, section 3-H).

Definition (exact): Gaussian filters in cascade, `G_0 = I`, `G_k = gaussian(G_{k-1}, sigma_k)`, kernels cut
at 4 sigma, borders mirrored about the edge pixel ("reflect"). Band k is `G_k - G_{k+1}`; the last band is
the final low-pass. Energy of a band: its standard deviation over the image.

Fast form, for sigmas 1, 2, 4, ...: `G_k` is kept on a grid of 2^(k-1) px. Variances add up in a cascade
(1, 5, 21, 85, 341 px^2), and so do the variances of the binomial steps used here: pyrDown adds 1, [1 2 1]/4
adds .5 and pyrUp .25 px^2 of the coarse grid, which together hit the cascade exactly at every level. What
differs is only the shape of the kernels. Stated error against the exact form, on images of 64 px and more:
every `G_k` within .02 of the intensity range, with an RMS error below 5 % of the energy of the band above
it; energies within 10 % (tests/augment/test_bands.py, on made-up and on real images).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

Image = NDArray[Any]  # f32[H, W]
Window = tuple[int, int, int, int]  # y0, y1, x0, x1

FILE_FORMAT = "medswav-bands"
FILE_VERSION = 1
# Below this energy (a quarter of a uint8 grey level) a band is noise or empty: it is not amplified further.
ENERGY_FLOOR = 1e-3
_BORDER = cv2.BORDER_REFLECT_101
_SHARED = 3  # G_3 and all levels above it lie on its grid, 4 px
_TINY = float(np.finfo(np.float64).tiny)


def gaussian_cascade(image: Image, sigmas: Sequence[float]) -> list[Image]:
    """`G_0 ... G_n` of the definition, each f32[H, W]; sigmas in px."""
    levels = [image]
    for sigma in sigmas:
        levels.append(_gaussian(levels[-1], sigma))
    return levels


def band_split(image: Image, sigmas: Sequence[float]) -> NDArray[np.float32]:
    """Exact bands f32[n + 1, H, W], finest first, the low-pass last; their sum is the image."""
    levels = gaussian_cascade(image, sigmas)
    bands = [fine - coarse for fine, coarse in pairwise(levels)]
    return np.stack([*bands, levels[-1]])


def band_energies(bands: NDArray[np.float32]) -> NDArray[np.float64]:
    """Standard deviation of each band over the image, f64[n + 1]."""
    return np.asarray(bands.std(axis=(1, 2), dtype=np.float64))


def band_gains(energies: NDArray[np.float64], references: NDArray[np.float64]) -> NDArray[np.float64]:
    """lambda_i = e_ref_i / e_i (equation 5), e_i held above ENERGY_FLOOR: a flat image stays flat."""
    return references / np.maximum(energies, ENERGY_FLOOR)


def scale_bands(bands: NDArray[np.float32], gains: NDArray[np.float64]) -> Image:
    """sum_i lambda_i I_i, f32[H, W]; the low band is scaled about its mean, which keeps the DC."""
    mean = float(bands[-1].mean(dtype=np.float64))
    flat = gains.astype(np.float32) @ bands.reshape(len(bands), -1)
    return np.asarray(flat.reshape(bands.shape[1:]) + np.float32((1 - gains[-1]) * mean))


@dataclass(frozen=True)
class Pyramid:
    """`G_0 ... G_n` of one image; level k lies on a grid of steps[k] px, sample 0 on pixel 0.

    energies: f64[n + 1]; mean: DC of the low band; shape: (H, W) of the image in px. Levels reach beyond
    the image at the right and the bottom by a mirrored margin.
    """

    levels: tuple[Image, ...]
    steps: tuple[int, ...]
    energies: NDArray[np.float64]
    mean: float
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels)


@dataclass(frozen=True)
class VolumePyramid:
    """Of a volume [Z, Y, X]: the pyramid of each slice; energies and mean of the whole.

    energies: f64[n + 1], the standard deviation of each band over all slices. mean: DC of the low band.
    """

    slices: tuple[Pyramid, ...]
    energies: NDArray[np.float64]
    mean: float

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.slices)


def of_slices(slices: Sequence[Pyramid]) -> VolumePyramid:
    """Bands of a volume: one gain for each band of all its slices needs energies of all of them."""
    energies = np.array([one.energies for one in slices])
    if not energies.size:
        return VolumePyramid(tuple(slices), np.zeros(0), 0.0)
    squares = (energies**2).mean(axis=0)
    means = np.array([one.mean for one in slices])
    squares[-1] += means.var()  # slices differ in their low band; the means of the others are 0
    return VolumePyramid(tuple(slices), np.sqrt(squares), float(means.mean()))


def plain(image: Image) -> Pyramid:
    """An image without bands: what views without the energy augmentation need."""
    return Pyramid((image,), (1,), np.zeros(0), 0.0, (image.shape[0], image.shape[1]))


def build_pyramid(image: Image, sigmas: Sequence[float]) -> Pyramid:
    """The fast form for sigmas 1, 2, 4, ...; the exact cascade for any other sigmas. image: f32[H, W]."""
    rows, columns = image.shape
    if not _is_octaves(sigmas):
        bands = band_split(image, sigmas)
        levels = tuple(np.ascontiguousarray(bands[k:].sum(axis=0)) for k in range(len(bands)))
        mean = float(bands[-1].mean(dtype=np.float64))
        return Pyramid(levels, (1,) * len(levels), band_energies(bands), mean, (rows, columns))
    first = _gaussian(image, 1.0)
    # Mirroring about the last sample of a coarse grid is right only where that is the last pixel too; the
    # margin of two sigmas keeps the mistake away from the image.
    grid, margin = int(sigmas[-1]), 2 * int(sigmas[-1])
    below, right = (_fill(size + margin, grid) - size for size in image.shape)
    levels_list = [cv2.copyMakeBorder(first, 0, below, 0, right, _BORDER)]
    for _ in sigmas[1:]:
        down = cv2.pyrDown(levels_list[-1], borderType=_BORDER)
        levels_list.append(_three_taps(down, 0.5))
    energies = _pyramid_energies(image, first, levels_list)
    mean = _low_mean(levels_list[-1], 1 << len(sigmas) - 1, rows, columns)
    levels_list[0] = first
    steps = [1, *(1 << k for k in range(len(sigmas)))]
    # Coarser levels are interpolated to the grid of G_3 once an image, not once a view.
    sizes = [(level.shape[1], level.shape[0]) for level in levels_list]
    for k in range(_SHARED, len(sizes)):
        for size in reversed(sizes[_SHARED - 1 : k]):
            levels_list[k] = cv2.pyrUp(levels_list[k], dstsize=size)
        steps[k + 1] = steps[_SHARED]
    return Pyramid((image, *levels_list), tuple(steps), energies, mean, (rows, columns))


def level_weights(pyramid: Pyramid | VolumePyramid, references: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights f64[V, n + 2] that turn e_ref f64[V, n + 1] into sum_i lambda_i I_i = sum_k w_k G_k + w_{n+1}.

    w_k = lambda_k - lambda_{k-1}; the last one keeps the DC: (1 - lambda_n) times the mean.
    """
    gains = band_gains(pyramid.energies, references)
    weights = np.empty((len(gains), gains.shape[1] + 1))
    weights[:, 0] = gains[:, 0]
    weights[:, 1:-1] = gains[:, 1:] - gains[:, :-1]
    weights[:, -1] = (1 - gains[:, -1]) * pyramid.mean
    return weights


def reconstruct(pyramid: Pyramid, weights: Sequence[float], window: Window) -> Image:
    """sum_k w_k G_k + w_{n+1} inside a window of the image, f32[y1 - y0, x1 - x0].

    From coarse to fine, each level only where the window needs it.
    """
    levels, steps = pyramid.levels, pyramid.steps
    windows = [window]
    for k in range(1, len(levels)):
        windows.append(windows[-1] if steps[k] == steps[k - 1] else _coarser(windows[-1], levels[k].shape))
    total: Image | None = None
    for k in range(len(levels) - 1, -1, -1):
        a, b, c, d = windows[k]
        part = levels[k][a:b, c:d]
        if total is None:
            total = cv2.addWeighted(part, weights[k], part, 0.0, weights[-1])
            continue
        if steps[k] != steps[k + 1]:
            total = _finer(total, windows[k + 1], windows[k])
        total = cv2.scaleAdd(part, weights[k], total)
    assert total is not None
    return total


@dataclass(frozen=True)
class BandStatistics:
    """Reference energies of one modality: mean and standard deviation of each band's energy over `count`
    images, in units of the intensity range; sigmas in px of the working resolution."""

    mean: tuple[float, ...]
    sigma: tuple[float, ...]
    count: int
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.sigma) == len(self.sigmas) + 1:
            raise ValueError("band statistics need one mean and one sigma for each of the n + 1 bands")


def fit_statistics(
    images: Iterable[Pyramid | VolumePyramid | Image], sigmas: Sequence[float]
) -> BandStatistics:
    """Mean and standard deviation of the band energies over reference images (R = 1000 in the paper)."""
    energies = np.array(
        [(build_pyramid(x, sigmas) if isinstance(x, np.ndarray) else x).energies for x in images]
    )
    if not len(energies):
        raise UserError("band statistics need at least one reference image")
    return BandStatistics(
        tuple(energies.mean(axis=0).tolist()),
        tuple(energies.std(axis=0).tolist()),
        len(energies),
        tuple(float(s) for s in sigmas),
    )


def draw_references(statistics: BandStatistics, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """e_ref f64[..., n + 1] from uniform numbers of the same shape: a Gaussian per band, truncated to
    mean +- sigma and to > 0, by its inverse distribution function."""
    mean, sigma, p_low, p_range = _truncated(statistics)
    return np.asarray(np.maximum(mean + sigma * _normal_quantile(p_low + uniform * p_range), _TINY))


def save_statistics(path: str | Path, statistics: Mapping[str, BandStatistics]) -> None:
    """Write {modality: BandStatistics} as versioned JSON."""
    body = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "modalities": {
            name: {"sigmas": s.sigmas, "mean": s.mean, "sigma": s.sigma, "count": s.count}
            for name, s in sorted(statistics.items())
        },
    }
    Path(path).write_text(json.dumps(body, indent=1) + "\n")


def load_statistics(path: str | Path) -> dict[str, BandStatistics]:
    """Read what `save_statistics` wrote. Raises UserError."""
    try:
        body = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError("the band statistics file does not exist: write it with medswav fit-energy") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        body = None
    if not isinstance(body, dict) or body.get("format") != FILE_FORMAT:
        raise UserError("this is no band statistics file: write one with medswav fit-energy")
    if body.get("version") != FILE_VERSION:
        raise UserError(
            f"band statistics of version {body.get('version')}, this release reads {FILE_VERSION}: "
            "write the file anew with medswav fit-energy"
        )
    try:
        return {
            name: BandStatistics(tuple(s["mean"]), tuple(s["sigma"]), int(s["count"]), tuple(s["sigmas"]))
            for name, s in body["modalities"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            "the band statistics file is damaged: write it anew with medswav fit-energy"
        ) from None


def _gaussian(image: Image, sigma: float) -> Image:
    kernel = cv2.getGaussianKernel(2 * math.ceil(4 * sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, cv2.CV_32F, kernel, kernel, borderType=_BORDER)


def _three_taps(image: Image, variance: float) -> Image:
    kernel = np.array([variance / 2, 1 - variance, variance / 2], np.float32)
    return cv2.sepFilter2D(image, cv2.CV_32F, kernel, kernel, borderType=_BORDER)


def _is_octaves(sigmas: Sequence[float]) -> bool:
    return len(sigmas) > 0 and all(sigma == 2.0**k for k, sigma in enumerate(sigmas))


def _fill(size: int, grid: int) -> int:
    """The smallest grid * m + 1 that is not below size."""
    return -(-(size - 1) // grid) * grid + 1


def _pyramid_energies(image: Image, first: Image, levels: Sequence[Image]) -> NDArray[np.float64]:
    """Energies of the bands. Band 1 is looked at in every other row and column (of G_1; its blur makes
    neighbours alike), the coarser ones on their own grid, all with the blur that pyrUp would add.
    """
    rows, columns = image.shape
    # The mean of I - G_1 is left out: only pixels at the edge make it differ from 0.
    energies = [math.sqrt(cv2.norm(image, first, cv2.NORM_L2SQR) / image.size)]
    for k, level in enumerate(levels):  # level of G_{k+1}, grid 2^k px
        grid, up = k, None
        if k == 0 and len(levels) > 1:
            grid, level, up = 1, np.ascontiguousarray(first[::2, ::2]), _three_taps(levels[1], 0.25)
        elif k + 1 < len(levels):
            up = cv2.pyrUp(levels[k + 1], dstsize=(level.shape[1], level.shape[0]))
        inside = (slice(-(-rows >> grid)), slice(-(-columns >> grid)))
        if k:
            level = _three_taps(level if up is None else cv2.subtract(level, up), (4**k - 1) / (3 * 4**k))
            up = None
        energies.append(_std(level[inside], None if up is None else up[inside]))
    return np.array(energies)


def _low_mean(low: Image, step: int, rows: int, columns: int) -> float:
    """Mean, over the image, of a level interpolated linearly from its grid."""
    return float(_share(rows, step, low.shape[0]) @ low @ _share(columns, step, low.shape[1])) / (
        rows * columns
    )


@lru_cache(maxsize=256)
def _share(length: int, step: int, samples: int) -> NDArray[np.float32]:
    """How many pixels each grid sample stands for, f32[samples]."""
    position = np.arange(length) / step
    below = position.astype(np.int64)
    above = position - below
    return np.asarray(
        np.bincount(below, 1 - above, samples + 1)[:samples]
        + np.bincount(below + 1, above, samples + 1)[:samples],
        np.float32,
    )


def _std(values: Image, less: Image | None = None) -> float:
    """Standard deviation of values - less; the sums are in double precision, and no difference is stored."""
    mean = cv2.mean(values)[0]
    if less is None:
        square = cv2.norm(values, cv2.NORM_L2SQR)
    else:
        square = cv2.norm(values, less, cv2.NORM_L2SQR)
        mean -= cv2.mean(less)[0]
    return math.sqrt(max(square / values.size - mean * mean, 0.0))


def _coarser(window: Window, shape: tuple[int, ...]) -> Window:
    """The samples of the next grid (twice the step) that interpolation into the window touches."""
    y0, y1, x0, x1 = window
    return (
        max(y0 // 2 - 1, 0),
        min(y1 // 2 + 2, shape[0]),
        max(x0 // 2 - 1, 0),
        min(x1 // 2 + 2, shape[1]),
    )


def _finer(coarse: Image, source: Window, target: Window) -> Image:
    """Interpolate the samples of `source` (on the coarser grid) to those of `target`."""
    up = cv2.pyrUp(coarse)
    y, x = target[0] - 2 * source[0], target[2] - 2 * source[2]
    return up[y : y + target[1] - target[0], x : x + target[3] - target[2]]


@lru_cache(maxsize=64)
def _truncated(statistics: BandStatistics) -> tuple[NDArray[np.float64], ...]:
    """mean, sigma and the probabilities between which a band's Gaussian is kept: lower end, width."""
    mean, sigma = np.array(statistics.mean), np.array(statistics.sigma)
    low = [max(-1.0, -m / s) if s > 0 else -1.0 for m, s in zip(mean, sigma, strict=True)]
    p_low = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in low])
    return mean, sigma, p_low, 0.5 * math.erfc(-1 / math.sqrt(2)) - p_low


def _normal_quantile(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse normal distribution for p in [.025, .975]: Acklam's rational form, relative error 1.2e-9."""
    q = p - 0.5
    r = q * q
    top, bottom = r * _QUANTILE_TOP[0], r * _QUANTILE_BOTTOM[0]
    for a, b in zip(_QUANTILE_TOP[1:-1], _QUANTILE_BOTTOM[1:-1], strict=True):
        top, bottom = (top + a) * r, (bottom + b) * r
    return np.asarray(q * (top + _QUANTILE_TOP[-1]) / (bottom + _QUANTILE_BOTTOM[-1]))


_QUANTILE_TOP = (
    -3.969683028665376e01,
    2.209460984245205e02,
    -2.759285104469687e02,
    1.383577518672690e02,
    -3.066479806614716e01,
    2.506628277459239e00,
)
_QUANTILE_BOTTOM = (
    -5.447609879822406e01,
    1.615858368580409e02,
    -1.556989798598866e02,
    6.680131188771972e01,
    -1.328068155288572e01,
    1.0,
)
