"""G12 and the stated error of the fast form."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from shards.errors import UserError
from tests.augment.images import phantom, ramp
from trainer.augment import bands
from trainer.augment.bands import BandStatistics

DATA = Path(os.environ.get("MEDSWAV_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
SIGMAS = (1.0, 2.0, 4.0, 8.0, 16.0)
IMAGES = {
    "512": phantom(512),
    "128": phantom(128),
    "odd": phantom(129, 113),
    "wide": phantom(150, 331),
    "64": phantom(64),
    "ramp": ramp(200, 150),
}
NAMES = pytest.mark.parametrize("name", IMAGES)


def whole(image):
    return (0, image.shape[0], 0, image.shape[1])


def weights_for(pyramid, gains):
    """Level weights that apply the gains themselves, not the ratio of energies."""
    references = np.asarray(gains) * np.maximum(pyramid.energies, bands.ENERGY_FLOOR)
    return bands.level_weights(pyramid, references[None])[0].tolist()


def exact_gaussian(image, sigma):
    """The definition in plain numpy, float64."""
    radius = int(np.ceil(4 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    out = image.astype(np.float64)
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (radius, radius)
        padded = np.pad(out, pad, mode="reflect")
        out = sum(t * np.take(padded, range(i, i + image.shape[axis]), axis) for i, t in enumerate(taps))
    return out


def test_exact_levels_are_gaussian_filters_in_cascade_with_reflected_borders():
    image = phantom(70, 90)
    levels = bands.gaussian_cascade(image, SIGMAS)
    expected = image
    for sigma, level in zip(SIGMAS, levels[1:], strict=True):
        expected = exact_gaussian(expected, sigma)
        assert np.abs(level - expected).max() < 2e-6


@NAMES
def test_bands_sum_to_the_image(name):
    split = bands.band_split(IMAGES[name], SIGMAS)
    assert split.shape == (6, *IMAGES[name].shape) and split.dtype == np.float32
    assert np.abs(split.sum(axis=0) - IMAGES[name]).max() < 1e-6


@NAMES
def test_gains_of_one_are_the_identity(name):
    image = IMAGES[name]
    split = bands.band_split(image, SIGMAS)
    assert np.abs(bands.scale_bands(split, np.ones(6)) - image).max() < 1e-6
    pyramid = bands.build_pyramid(image, SIGMAS)
    assert (
        np.abs(bands.reconstruct(pyramid, weights_for(pyramid, np.ones(6)), whole(image)) - image).max()
        < 1e-6
    )


@NAMES
def test_pyramid_levels_stay_within_the_stated_error_of_the_exact_cascade(name):
    image = IMAGES[name]
    exact = bands.gaussian_cascade(image, SIGMAS)
    pyramid = bands.build_pyramid(image, SIGMAS)
    for k in range(1, 6):
        only = [1.0 if j == k else 0.0 for j in range(7)]
        error = bands.reconstruct(pyramid, only, whole(image)) - exact[k]
        assert np.abs(error).max() < 0.015
        if name != "ramp":
            assert error.std() < 0.05 * (exact[k - 1] - exact[k]).std()


@pytest.mark.parametrize("name", ["512", "128", "odd", "wide", "64"])
def test_pyramid_energies_and_mean_stay_within_the_stated_error(name):
    split = bands.band_split(IMAGES[name], SIGMAS)
    pyramid = bands.build_pyramid(IMAGES[name], SIGMAS)
    ratio = pyramid.energies / bands.band_energies(split)
    assert np.abs(ratio - 1).max() < 0.05
    assert abs(pyramid.mean - split[-1].mean()) < 2e-3


@pytest.mark.parametrize(
    "family", ["us_lung_pocus", "mr_brain_tumor4", "ct_covid_ucsd_cropped", "cxr_kermany_pneumonia"]
)
def test_the_stated_error_holds_on_real_images(family):
    folder = DATA / "labelled" / family
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".jpg", ".jpeg"))
    if not files:
        pytest.skip("the folder of real test data is absent")
    for file in files[:: max(len(files) // 8, 1)]:
        image = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255
        exact, pyramid = bands.gaussian_cascade(image, SIGMAS), bands.build_pyramid(image, SIGMAS)
        energies = bands.band_energies(bands.band_split(image, SIGMAS))
        assert np.abs(pyramid.energies / energies - 1).max() < 0.1
        for k in range(1, 6):
            error = bands.reconstruct(pyramid, [float(j == k) for j in range(7)], whole(image)) - exact[k]
            assert np.abs(error).max() < 0.02
            assert error.std() < 0.05 * (exact[k - 1] - exact[k]).std()


@NAMES
def test_scaled_bands_of_the_fast_form_stay_within_three_percent_of_the_range(name):
    image = IMAGES[name]
    split, pyramid = bands.band_split(image, SIGMAS), bands.build_pyramid(image, SIGMAS)
    rng = np.random.default_rng(1)
    for _ in range(10):
        gains = rng.uniform(0.5, 2.0, 6)
        error = bands.reconstruct(pyramid, weights_for(pyramid, gains), whole(image)) - bands.scale_bands(
            split, gains
        )
        assert np.abs(error).max() < 0.03
        assert error.std() < 0.006


def test_a_window_is_the_same_part_of_the_whole_reconstruction():
    image = IMAGES["wide"]
    pyramid = bands.build_pyramid(image, SIGMAS)
    rng = np.random.default_rng(2)
    weights = weights_for(pyramid, rng.uniform(0.5, 2.0, 6))
    full = bands.reconstruct(pyramid, weights, whole(image))
    for _ in range(200):
        y0, y1 = sorted(rng.choice(151, 2, replace=False).tolist())
        x0, x1 = sorted(rng.choice(332, 2, replace=False).tolist())
        part = bands.reconstruct(pyramid, weights, (y0, y1, x0, x1))
        assert np.abs(part - full[y0:y1, x0:x1]).max() < 1e-5


def test_other_sigmas_use_the_exact_cascade():
    image, sigmas = phantom(80), (1.5, 3.0)
    pyramid = bands.build_pyramid(image, sigmas)
    split, gains = bands.band_split(image, sigmas), np.array([2.0, 0.5, 1.3])
    assert np.allclose(pyramid.energies, bands.band_energies(split))
    fast = bands.reconstruct(pyramid, weights_for(pyramid, gains), whole(image))
    assert np.abs(fast - bands.scale_bands(split, gains)).max() < 1e-5


def test_a_flat_image_stays_flat():
    image = np.full((64, 64), 0.3, np.float32)
    pyramid = bands.build_pyramid(image, SIGMAS)
    out = bands.reconstruct(
        pyramid, bands.level_weights(pyramid, np.full((1, 6), 0.1))[0].tolist(), whole(image)
    )
    assert np.abs(out - 0.3).max() < 1e-3


def test_energy_after_the_augmentation_is_the_reference():
    image = IMAGES["128"]
    split = bands.band_split(image, SIGMAS)
    references = bands.band_energies(split) * np.array([0.5, 1.5, 0.8, 1.2, 0.9, 1.1])
    gains = bands.band_gains(bands.band_energies(split), references)
    assert np.allclose(
        bands.band_energies(split * gains[:, None, None].astype(np.float32)), references, rtol=1e-4
    )


def test_references_are_a_gaussian_truncated_to_one_sigma_and_above_zero():
    statistics = BandStatistics((0.1, 0.02), (0.03, 0.05), 10, (1.0,))
    draws = bands.draw_references(statistics, np.random.default_rng(0).random((20_000, 2)))
    assert draws[:, 0].min() >= 0.07 - 1e-9 and draws[:, 0].max() <= 0.13 + 1e-9
    assert draws[:, 1].min() > 0 and draws[:, 1].max() <= 0.07 + 1e-9
    # a standard normal truncated to +-1 has a standard deviation of .5396
    assert abs(draws[:, 0].mean() - 0.1) < 5e-4 and abs(draws[:, 0].std() - 0.03 * 0.5396) < 3e-4
    edges = bands.draw_references(statistics, np.array([[0.0, 0.0], [0.5, 1.0]]))
    assert edges[1, 0] == pytest.approx(0.1, abs=1e-9) and edges[0, 0] == pytest.approx(0.07, abs=1e-7)
    assert bands.draw_references(BandStatistics((0.1,), (0.0,), 1, ()), np.array([0.9])).tolist() == [0.1]


def test_fit_and_file_round_trip(tmp_path):
    images = [phantom(64, seed=s, noise=0.01 * (1 + s)) for s in range(3)]
    fitted = bands.fit_statistics(images, SIGMAS)
    energies = np.array([bands.build_pyramid(i, SIGMAS).energies for i in images])
    assert np.allclose(fitted.mean, energies.mean(axis=0)) and np.allclose(fitted.sigma, energies.std(axis=0))
    assert fitted.count == 3
    path = tmp_path / "bands.json"
    bands.save_statistics(path, {"ct": fitted, "mr": fitted})
    assert bands.load_statistics(path) == {"ct": fitted, "mr": fitted}


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": "medswav-bands", "version": 1, "modalities": {"ct": {}}}']
)
def test_a_damaged_statistics_file_is_one_clear_line(tmp_path, text):
    path = tmp_path / "bands.json"
    path.write_text(text)
    with pytest.raises(UserError, match="medswav fit-energy"):
        bands.load_statistics(path)


def test_missing_or_newer_statistics_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        bands.load_statistics(tmp_path / "none.json")
    path = tmp_path / "bands.json"
    path.write_text(json.dumps({"format": "medswav-bands", "version": 2, "modalities": {}}))
    with pytest.raises(UserError, match="version 2"):
        bands.load_statistics(path)
    with pytest.raises(UserError, match="at least one"):
        bands.fit_statistics([], SIGMAS)
