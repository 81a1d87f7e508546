"""The views of a volume: those of views.py, in the plane of its slices (Table I, column 3D). No torch.

A crop is cut in the plane and keeps all slices. All slices of a crop share its parameters: one rescaling, one
place, one gain for each band, one gamma, one line. Bands are filtered in the plane (the sigmas are px of the
box), their energies are those of the whole volume. `naive_volume_views` is that, literally; the fast form has
the error of the filters that bands.py states. Outside of the box is air: black before the intensities.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.augment import bands as band
from trainer.augment.bands import BandStatistics, VolumePyramid
from trainer.augment.crops import Placement
from trainer.augment.intensity import apply_intensity
from trainer.augment.views import Draws, Prepared, draw, render, rescale
from trainer.config import ViewConfig

Volume = NDArray[np.float32]  # [Z, Y, X]


@dataclass(frozen=True)
class PreparedVolume:
    """What all views of a box share. shape: (Y, X)."""

    pyramid: VolumePyramid
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.pyramid.nbytes


def make_volume_views(
    box: Volume, views: ViewConfig, bands: BandStatistics | None, key: tuple[int, ...]
) -> list[NDArray[np.uint8]]:
    """Views of a box f32[Z, Y, X] in [0, 1]: uint8 [count, Z, rows, columns] for each group of crops.

    bands: reference energies; None only with energy_probability 0 (ValueError otherwise). key: (seed, sample,
    pass).
    """
    with_bands = bands is not None and views.energy_probability > 0
    return volume_views_of(prepare_volume(box, views, with_bands), views, bands, key)


def prepare_volume(box: Volume, views: ViewConfig, with_bands: bool = True) -> PreparedVolume:
    """Split a box into bands, slice by slice; the box is the working resolution."""
    slices = [band.build_pyramid(image, views.sigmas) if with_bands else band.plain(image) for image in box]
    return PreparedVolume(band.of_slices(slices), (box.shape[1], box.shape[2]))


def volume_views_of(
    prepared: PreparedVolume, views: ViewConfig, bands: BandStatistics | None, key: tuple[int, ...]
) -> list[NDArray[np.uint8]]:
    """`make_volume_views` from a prepared box."""
    draws = draw(prepared.shape, views, bands, key)
    weights: list[list[float]] = []
    if draws.references is not None:
        weights = band.level_weights(prepared.pyramid, draws.references).tolist()
    slices = [Prepared(one, prepared.shape) for one in prepared.pyramid.slices]
    groups, v = [], 0
    for group in views.crops:
        found = []
        for _ in range(group.count):
            own = weights[v] if weights and draws.energy_on[v] else None
            stack = np.zeros((len(slices), *group.plane), np.float32)
            for one, out in zip(slices, stack, strict=True):
                render(one, own, draws.placements[v], out)
                _blacken(out, draws.placements[v])
            found.append(_with_intensity(stack, draws, v))
            v += 1
        groups.append(np.stack(found))
    return groups


def naive_volume_views(
    box: Volume, views: ViewConfig, bands: BandStatistics | None, key: tuple[int, ...]
) -> list[NDArray[np.uint8]]:
    """The definition: bands of the box by exact filters, gains from the energies of the whole volume; then of
    every slice rescale, crop, gamma, linear, clip."""
    draws = draw((box.shape[1], box.shape[2]), views, bands, key)
    groups, v = [], 0
    for group in views.crops:
        found = []
        for _ in range(group.count):
            place, whole = draws.placements[v], box
            if draws.references is not None and draws.energy_on[v]:
                split = np.stack([band.band_split(image, views.sigmas) for image in box], axis=1)
                energies = split.std(axis=(1, 2, 3), dtype=np.float64)
                gains = band.band_gains(energies, draws.references[v])
                mean = float(split[-1].mean(dtype=np.float64))
                whole = np.tensordot(gains, split, 1) + (1 - gains[-1]) * mean
            stack = np.stack(
                [_cut(rescale(image.astype(np.float32), place.rows, place.columns), place) for image in whole]
            )
            found.append(_with_intensity(stack, draws, v))
            v += 1
        groups.append(np.stack(found))
    return groups


def _with_intensity(stack: Volume, draws: Draws, v: int) -> NDArray[np.uint8]:
    """gamma, linear and the clip of crop v on its slices f32[Z, rows, columns], which are scratch."""
    gamma, gain, offset = (np.full(len(stack), p[v]) for p in (draws.gamma, draws.gain, draws.offset))
    return apply_intensity(stack, gamma, gain, offset)


def _blacken(out: Volume, place: Placement) -> None:
    """What of a crop lies outside of the rescaled slice."""
    out[: max(-place.y, 0)] = 0
    out[max(place.rows - place.y, 0) :] = 0
    out[:, : max(-place.x, 0)] = 0
    out[:, max(place.columns - place.x, 0) :] = 0


def _cut(image: Volume, place: Placement) -> Volume:
    """The crop, black outside of the image."""
    padded = np.pad(image, ((place.height, place.height), (place.width, place.width)))
    y, x = place.y + place.height, place.x + place.width
    return padded[y : y + place.height, x : x + place.width]
