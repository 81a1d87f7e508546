"""The views of one image: rescale, energy, gamma, linear, crop; one clip at the end (method.md 3-A, 3-B).

`naive_views` is that order, literally, with everything redone for every view: the definition, the oracle of
the tests and the baseline of `medswav bench augment`. `make_views` gives the same crops from one pyramid per
image; every view is rebuilt inside its own crop and resampled straight to its size.

Reading: the bands belong to the image at ONE working resolution, the image itself, or less where no view
can use more (`crops.finest_scale`). The naive order takes the bands of each rescaled image, so at a
rescaling by f its bands lie f times higher in frequency. Without the energy augmentation both forms give the
same pixels within 2 grey levels; with it they do where views are as fine as the working resolution, within
the error stated in bands.py (tests/augment/test_views.py).

Resampling, in both forms: a Gaussian of variance (f^2 - 1)/6 px^2 against aliasing when shrinking by f (the
variance of a triangle filter stretched by f, less that of linear interpolation), then linear interpolation,
pixel centres at half-integers, mirrored at the image's edges.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.augment import bands as band
from trainer.augment import crops as crop
from trainer.augment.bands import BandStatistics, Image, Pyramid
from trainer.augment.crops import Placement
from trainer.augment.intensity import apply_intensity
from trainer.config import Range, ViewConfig

_BORDER = cv2.BORDER_REFLECT
_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
_TRIANGLE = 1 / 6  # variance of a triangle filter, px² of the pixels that it makes


@dataclass(frozen=True)
class Prepared:
    """What all views of an image share: its pyramid at the working resolution. shape: (H, W) given, px.

    blur: variance, in px² of the working resolution, by which it was smoothed when it was shrunk to that.
    """

    pyramid: Pyramid
    shape: tuple[int, int]
    blur: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.pyramid.nbytes


@dataclass(frozen=True)
class Draws:
    """The parameters of V crops: e_ref f64[V, n + 1] or None; gamma, gain, offset f64[V]."""

    placements: tuple[Placement, ...]
    references: NDArray[np.float64] | None
    energy_on: NDArray[np.bool_]
    gamma: NDArray[np.float64]
    gain: NDArray[np.float64]
    offset: NDArray[np.float64]


def make_views(
    image: Image,
    views: ViewConfig,
    bands: BandStatistics | None,
    key: tuple[int, ...],
    size_range: Range | None = None,
) -> list[NDArray[np.uint8]]:
    """Views of an image f32[H, W] in [0, 1]: a uint8 array [count, size, size] for each group of crops.

    bands: reference energies; None only with energy_probability 0 (ValueError otherwise). key: (seed, sample,
    pass). size_range: px, geometry `paper`; default `views.default_size_range`.
    """
    with_bands = bands is not None and views.energy_probability > 0
    return views_of(prepare(image, views, with_bands, size_range), views, bands, key, size_range)


def prepare(
    image: Image, views: ViewConfig, with_bands: bool = True, size_range: Range | None = None
) -> Prepared:
    """Bring an image f32[H, W] to its working resolution and split it into bands."""
    shape = (image.shape[0], image.shape[1])
    scale = crop.finest_scale(shape, views, size_range or views.default_size_range)
    blur = 0.0
    if scale < 1:
        blur = _TRIANGLE
        rows, columns = max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1)
        image = _shrink(image, rows, columns)
    return Prepared(band.build_pyramid(image, views.sigmas) if with_bands else band.plain(image), shape, blur)


def views_of(
    prepared: Prepared,
    views: ViewConfig,
    bands: BandStatistics | None,
    key: tuple[int, ...],
    size_range: Range | None = None,
) -> list[NDArray[np.uint8]]:
    """`make_views` from a prepared image."""
    draws = draw(prepared.shape, views, bands, key, size_range)
    weights: list[list[float]] = []
    if draws.references is not None:
        weights = band.level_weights(prepared.pyramid, draws.references).tolist()
    groups: list[NDArray[np.uint8]] = []
    v = 0
    for group in views.crops:
        stack = np.empty((group.count, *group.plane), np.float32)
        for out in stack:
            own = weights[v] if weights and draws.energy_on[v] else None
            render(prepared, own, draws.placements[v], out)
            v += 1
        part = slice(v - group.count, v)
        groups.append(apply_intensity(stack, draws.gamma[part], draws.gain[part], draws.offset[part]))
    return groups


def naive_views(
    image: Image,
    views: ViewConfig,
    bands: BandStatistics | None,
    key: tuple[int, ...],
    size_range: Range | None = None,
) -> list[NDArray[np.uint8]]:
    """The definition: per view rescale the image, exact bands of it, energy, gamma, linear, crop, clip."""
    draws = draw((image.shape[0], image.shape[1]), views, bands, key, size_range)
    groups: list[NDArray[np.uint8]] = []
    v = 0
    for group in views.crops:
        crops = []
        for _ in range(group.count):
            place = draws.placements[v]
            whole = rescale(image, place.rows, place.columns)
            if draws.references is not None and draws.energy_on[v]:
                split = band.band_split(whole, views.sigmas)
                gains = band.band_gains(band.band_energies(split), draws.references[v])
                whole = band.scale_bands(split, gains)
            part = slice(v, v + 1)
            done = apply_intensity(whole[None], draws.gamma[part], draws.gain[part], draws.offset[part])
            crops.append(_cut(done[0], place))
            v += 1
        groups.append(np.stack(crops))
    return groups


def draw(
    shape: tuple[int, int],
    views: ViewConfig,
    bands: BandStatistics | None,
    key: tuple[int, ...],
    size_range: Range | None = None,
) -> Draws:
    """All parameters of all crops of one image of `shape` = (H, W) px."""
    if bands is None and views.energy_probability > 0:
        raise ValueError("views.energy_probability > 0 needs band statistics")
    u = crop.uniforms(key, views.n_crops)
    size_range = size_range or views.default_size_range
    groups = [c for c in views.crops for _ in range(c.count)]
    placements = tuple(crop.place(shape, c, views, size_range, row) for c, row in zip(groups, u, strict=True))
    references = None
    if bands is not None and views.energy_probability > 0:
        n_bands = len(bands.mean)
        if bands.sigmas != views.sigmas or n_bands > crop.MAX_BANDS:
            raise ValueError("the band statistics were fitted with other sigmas than views.sigmas")
        references = band.draw_references(bands, u[:, crop.BANDS : crop.BANDS + n_bands])
    gamma_on = u[:, crop.GAMMA_ON] < views.gamma_probability
    linear_on = u[:, crop.LINEAR_ON] < views.linear_probability
    return Draws(
        placements,
        references,
        u[:, crop.ENERGY_ON] < views.energy_probability,
        np.where(gamma_on, _between(views.gamma, u[:, crop.GAMMA]), 1.0),
        np.where(linear_on, _between(views.linear_gain, u[:, crop.GAIN]), 1.0),
        np.where(linear_on, _between(views.linear_offset, u[:, crop.OFFSET]), 0.0),
    )


def _shrink(image: Image, rows: int, columns: int) -> Image:
    """To the working resolution. Views resample it once more, so this step must neither blur more than
    `rescale` (which the views then leave out) nor alias: the whole triangle, then a cubic that adds none."""
    factor = (image.shape[0] / rows + image.shape[1] / columns) / 2
    kernel = _kernel(factor * factor * _TRIANGLE)
    image = cv2.sepFilter2D(image, cv2.CV_32F, kernel, kernel, borderType=_BORDER)
    return cv2.resize(image, (columns, rows), interpolation=cv2.INTER_CUBIC)


def rescale(image: Image, rows: int, columns: int) -> Image:
    """Resample a whole image f32[H, W] to f32[rows, columns]."""
    fy, fx = image.shape[0] / rows, image.shape[1] / columns
    kernel = _antialias_kernel((fy + fx) / 2)
    if kernel is not None:
        image = cv2.sepFilter2D(image, cv2.CV_32F, kernel, kernel, borderType=_BORDER)
    return cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)


def render(prepared: Prepared, weights: list[float] | None, place: Placement, out: Image) -> None:
    """One crop into out f32[height, width], before gamma and linear: only its own window is touched."""
    pyramid = prepared.pyramid
    height, width = pyramid.shape
    fy, fx = height / place.rows, width / place.columns
    kernel = _antialias_kernel((fy + fx) / 2, prepared.blur)
    margin = 2 + (0 if kernel is None else len(kernel) // 2)
    top, left = (place.y + 0.5) * fy - 0.5, (place.x + 0.5) * fx - 0.5  # source position of output pixel 0
    y0, y1 = _span(top, fy, place.height, margin, height)
    x0, x1 = _span(left, fx, place.width, margin, width)
    if weights is None:
        part = pyramid.levels[0][y0:y1, x0:x1]
    else:
        part = band.reconstruct(pyramid, weights, (y0, y1, x0, x1))
    if kernel is not None:
        part = cv2.sepFilter2D(part, cv2.CV_32F, kernel, kernel, borderType=_BORDER | cv2.BORDER_ISOLATED)
    matrix = np.array([[fx, 0, left - x0], [0, fy, top - y0]])
    cv2.warpAffine(part, matrix, (place.width, place.height), dst=out, flags=_WARP, borderMode=_BORDER)


def _span(start: float, step: float, count: int, margin: int, length: int) -> tuple[int, int]:
    """Source pixels [low, high) for `count` samples; outside of the image its mirrored edge is needed."""
    first, last = start, start + step * (count - 1)
    outside = max(-first, last - (length - 1), 0.0)
    margin += int(outside) + 1 if outside else 0
    return max(int(first) - margin, 0), min(int(last) + 1 + margin, length)


def _antialias_kernel(factor: float, done: float = 0.0) -> Image | None:
    """Taps against aliasing when shrinking by `factor`; done: px² of smoothing that the image has had."""
    variance = (factor * factor - 1) * _TRIANGLE - done
    return _kernel(variance) if variance > 0.01 else None


def _kernel(variance: float) -> Image:
    if variance <= 0.5:
        return np.array([variance / 2, 1 - variance, variance / 2], np.float32)
    sigma = variance**0.5
    return cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma, cv2.CV_32F).ravel()


def _cut(image: NDArray[np.uint8], place: Placement) -> NDArray[np.uint8]:
    """The crop, mirrored about the edge outside of the image."""
    before = max(-place.y, -place.x, 0)
    after = max(place.y + place.height - place.rows, place.x + place.width - place.columns, 0)
    if before or after:
        image = np.pad(image, ((before, after), (before, after)), mode="symmetric")
    y, x = place.y + before, place.x + before
    return image[y : y + place.height, x : x + place.width]


def _between(limits: Range, u: NDArray[np.float64]) -> NDArray[np.float64]:
    return limits[0] + (limits[1] - limits[0]) * u
