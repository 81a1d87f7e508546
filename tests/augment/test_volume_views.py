"""The views of volumes against their definition: in the plane, all slices alike, a function of the key."""

import numpy as np
import pytest
from pydantic import ValidationError

from tests.augment.images import phantom
from trainer.augment import bands, crops
from trainer.augment.bands import BandStatistics
from trainer.augment.views import draw
from trainer.augment.volume_views import make_volume_views, naive_volume_views, prepare_volume
from trainer.config import CropConfig, ViewConfig

RECOMMENDED = ViewConfig(
    volume={"box": (5, 112, 96)},
    crops=(
        CropConfig(count=1, size=(84, 72), share=(0.4, 1.0)),
        CropConfig(count=4, size=(42, 36), share=(0.1, 0.4)),
    ),
)
PAPER = ViewConfig(
    geometry="paper",
    volume={"box": (5, 112, 96), "size_range": ((56, 48), (125, 100))},
    crops=(CropConfig(count=1, size=(112, 96)), CropConfig(count=4, size=(56, 48))),
)
OFF = {"energy_probability": 0.0, "gamma_probability": 0.0, "linear_probability": 0.0}
CASES = [pytest.param(RECOMMENDED, id="recommended"), pytest.param(PAPER, id="paper")]


def box() -> np.ndarray:
    """f32 [5, 112, 96]: slices of different brightness."""
    return np.stack([phantom(112, 96, seed=z) * (0.6 + 0.1 * z) for z in range(5)])


def statistics(spread: float = 0.3) -> BandStatistics:
    energies = prepare_volume(box(), RECOMMENDED).pyramid.energies
    return BandStatistics(
        tuple(energies.tolist()), tuple((spread * energies).tolist()), 1, RECOMMENDED.sigmas
    )


def errors(config: ViewConfig, fit: BandStatistics | None, samples: int = 2) -> np.ndarray:
    found = []
    for sample in range(samples):
        key = (0, sample, 0)
        fast, naive = (f(box(), config, fit, key) for f in (make_volume_views, naive_volume_views))
        found += [np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in zip(fast, naive, strict=True)]
    return np.concatenate(found)


@pytest.mark.parametrize("config", CASES)
def test_every_crop_keeps_all_slices(config):
    groups = make_volume_views(box(), config, statistics(), (0, 1, 0))
    assert [g.shape for g in groups] == [(c.count, 5, *c.size) for c in config.crops]
    assert config.crop_shapes == tuple(g.shape[1:] for g in groups)
    assert sum(g.nbytes for g in groups) == config.crop_values
    assert all(g.dtype == np.uint8 and g.std() > 0 for g in groups)


@pytest.mark.parametrize("config", CASES)
def test_without_the_bands_fast_and_naive_views_are_the_same_voxels(config):
    assert errors(config.model_copy(update=OFF), None).max() <= 2
    on = {"energy_probability": 0.0, "gamma_probability": 1.0, "linear_probability": 1.0}
    assert errors(config.model_copy(update=on), None).max() <= 3


@pytest.mark.parametrize("config", CASES)
def test_with_the_bands_they_keep_the_error_of_the_filters(config):
    found = errors(config.model_copy(update=OFF | {"energy_probability": 1.0}), statistics(0.5), samples=3)
    assert found.max() <= 8 and np.percentile(found, 99) <= 4 and found.mean() < 1.5
    exact = {"sigmas": (1.0, 2.5)}  # no octaves: exact filters in both forms
    config = config.model_copy(update=OFF | exact | {"energy_probability": 1.0})
    fit = BandStatistics((0.05, 0.05, 0.2), (0.02, 0.02, 0.05), 1, (1.0, 2.5))
    assert errors(config, fit).max() <= 2


def test_the_energies_are_those_of_the_whole_volume():
    split = np.stack([bands.band_split(image, RECOMMENDED.sigmas) for image in box()], axis=1)
    exact = split.std(axis=(1, 2, 3), dtype=np.float64)
    pyramid = prepare_volume(box(), RECOMMENDED).pyramid
    assert np.abs(pyramid.energies / exact - 1).max() < 0.1
    assert pyramid.mean == pytest.approx(float(split[-1].mean()), abs=2e-3)
    of_slices = split[-1].std(axis=(1, 2)).mean()
    assert exact[-1] > 1.05 * of_slices  # slices differ in brightness, and that counts


def test_all_slices_of_a_crop_share_its_parameters_and_crops_do_not():
    same = np.repeat(box()[:1], 5, axis=0)
    for group in make_volume_views(same, RECOMMENDED, statistics(), (0, 3, 0)):
        assert all((crop == crop[:1]).all() for crop in group)
        assert len({crop.tobytes() for crop in group}) == len(group)


def test_outside_of_the_box_there_is_air():
    tiny = PAPER.model_copy(
        update=OFF | {"volume": PAPER.volume.model_copy(update={"size_range": ((56, 48), (56, 48))})}
    )
    (large,) = make_volume_views(np.ones((5, 112, 96), np.float32), tiny, None, (0, 0, 0))[0]
    assert (large[:, 28:84, 24:72] == 255).all() and large.mean() == pytest.approx(255 / 4, abs=1)


def test_views_are_a_function_of_seed_sample_and_pass():
    fit = statistics()
    first = make_volume_views(box(), RECOMMENDED, fit, (3, 7, 1))
    again = make_volume_views(box(), RECOMMENDED, fit, (3, 7, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for key in ((4, 7, 1), (3, 8, 1), (3, 7, 2)):
        other = make_volume_views(box(), RECOMMENDED, fit, key)
        assert all(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_paper_crops_rescale_the_plane_between_the_two_sizes_of_the_table():
    table = ViewConfig(
        geometry="paper",
        volume={},
        crops=(CropConfig(count=1, size=(224, 192)), CropConfig(count=4, size=(112, 96))),
    )
    assert table.volume.box == (40, 224, 192) and table.crop_shapes == ((40, 224, 192), (40, 112, 96))
    for u, size in ((0.0, (112, 96)), (0.5, (181, 148)), (1.0, (250, 200))):
        draws = np.full(crops.DRAWS_PER_CROP, u)
        place = crops.place((224, 192), table.crops[1], table, (1, 1), draws)
        assert (place.rows, place.columns) == size and (place.height, place.width) == (112, 96)
    sizes = {
        (p.rows, p.columns) for s in range(40) for p in draw((224, 192), table, flat(), (0, s, 0)).placements
    }
    assert min(sizes)[0] < 120 and max(sizes)[0] > 240


def flat() -> BandStatistics:
    return BandStatistics((1.0,) * 6, (0.0,) * 6, 1, (1.0, 2.0, 4.0, 8.0, 16.0))


def test_recommended_crops_of_volumes_have_the_shape_of_the_crop_and_its_share_of_the_plane():
    rng = np.random.default_rng(0)
    inner = 112 * 0.8 * 96 * 0.8
    for crop in RECOMMENDED.crops:
        for _ in range(100):
            u = rng.random(crops.DRAWS_PER_CROP)
            place = crops.place((112, 96), crop, RECOMMENDED, (1, 1), u)
            share = (place.height / place.rows * 112) * (place.width / place.columns * 96) / inner
            wanted = crop.share[0] + (crop.share[1] - crop.share[0]) * u[crops.SCALE]
            assert share == pytest.approx(wanted, rel=0.04)
            assert place.y >= 0.1 * place.rows - 1 and place.x >= 0.1 * place.columns - 1


@pytest.mark.parametrize(
    "bad",
    [
        {"crops": [{"count": 2, "size": [32, 24]}]},  # a rectangle of an image
        {"volume": {}, "size_range": {"ct_volumes": (10, 20)}},
        {"volume": {"size_range": ((100, 100), (90, 110))}},
        {"volume": {"box": (40, 224)}},
    ],
)
def test_impossible_settings_of_volumes_are_refused(bad):
    with pytest.raises(ValidationError):
        ViewConfig.model_validate(bad)
