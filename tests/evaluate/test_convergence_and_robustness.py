"""Convergence over several seeds; transforms that are functions of a key, and what a box plot shows."""

import numpy as np
import pytest

from shards.errors import UserError
from trainer.evaluate import convergence, robustness
from trainer.evaluate.robustness import Ranges, Transform, apply, draw_transforms


def test_epochs_without_an_evaluation_are_passed_over():
    assert convergence.convergence_epoch([np.nan, 0.5, np.nan, 1.0]) == 4
    with pytest.raises(ValueError, match="no number"):
        convergence.convergence_epoch([np.nan])
    with pytest.raises(ValueError, match="above 0"):
        convergence.convergence_epoch([-1, 0])
    assert convergence.convergence_epoch([0.2, 0.5, 0.9], share=0.5) == 2


def test_trainings_are_compared_by_their_mean_epochs():
    slow = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.4, 0.4, 0.4]]  # 4 and 2 epochs
    fast = [[0.8, 0.8], [0.9, 0.8]]
    rows = {row["name"]: row for row in convergence.compare({"none": slow, "ours": fast})}
    assert rows["none"]["epochs"] == {"mean": 3, "min": 2, "max": 4, "n": 2}
    assert rows["ours"]["faster"]["none"] == pytest.approx(100 * (1 - 1 / 3))
    assert rows["none"]["faster"]["ours"] == pytest.approx(-200)
    assert rows["ours"]["best"]["mean"] == pytest.approx(0.85)


def test_transforms_are_a_function_of_the_key_and_stay_in_their_ranges():
    first = draw_transforms((0, "image1"), 50)
    assert first == draw_transforms((0, "image1"), 50) and first[:7] == draw_transforms((0, "image1"), 7)
    assert not set(first) & set(draw_transforms((1, "image1"), 50)) and len(set(first)) == 50
    assert not set(first) & set(draw_transforms((0, "image2"), 50))
    many = draw_transforms((3,), 2000)
    for name, (low, high) in vars(Ranges()).items():
        values = np.array([getattr(t, name) for t in many])
        assert low <= values.min() and values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_kinds_share_what_they_have_in_common():
    both, gamma, geometric = (draw_transforms((7,), 9, k) for k in ("both", "gamma", "geometric"))
    assert gamma == [Transform(gamma=t.gamma) for t in both]
    assert geometric == [Transform(degrees=t.degrees, scale=t.scale) for t in both]


def test_images_are_drawn_once_each():
    chosen = robustness.draw_images(200, (0,))
    assert len(set(chosen.tolist())) == 50 and (np.diff(chosen) > 0).all() and chosen.max() < 200
    assert robustness.draw_images(7, (0,)).tolist() == list(range(7))


def test_apply_turns_scales_and_bends_an_image():
    image = np.random.default_rng(0).random((33, 33)).astype(np.float32)
    assert np.array_equal(apply(image, Transform()), image)
    assert np.allclose(apply(image, Transform(gamma=2.0)), image**2, atol=1e-6)
    assert np.allclose(apply(image, Transform(degrees=90.0)), np.rot90(image), atol=2e-3)
    spot = np.zeros((33, 33), np.float32)
    spot[16, 20] = 1  # 4 px right of the centre (16, 16): 8 px at twice the size, then up a quarter turn
    assert np.unravel_index(apply(spot, Transform(scale=2.0)).argmax(), (33, 33)) == (16, 24)
    assert np.unravel_index(apply(spot, Transform(degrees=90.0, scale=2.0)).argmax(), (33, 33)) == (8, 16)


def test_slices_of_a_volume_are_turned_alike_and_stay_in_range():
    volume = np.random.default_rng(0).random((2, 3, 20, 24)).astype(np.float32)
    one = draw_transforms((1,), 1)[0]
    turned = apply(volume, one)
    assert turned.dtype == np.float32 and turned.shape == volume.shape
    assert turned.min() >= 0 and turned.max() <= 1
    assert np.array_equal(turned[1, 2], apply(volume[1, 2], one))


def test_deviation_is_relative_to_the_image_as_it_is():
    found = robustness.relative_deviation(np.array([0.5, 0.2]), np.array([[0.6, 0.4], [0.2, 0.0]]))
    assert np.allclose(found, [[0.2, 0.2], [0, 1]])
    assert np.isnan(robustness.relative_deviation(np.array([0.0]), np.array([[0.1]]))).all()
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        robustness.relative_deviation(np.array([1.5]), np.array([[0.1]]))
    with pytest.raises(ValueError, match="must be"):
        robustness.relative_deviation(np.array([0.5]), np.array([0.1]))


def test_a_model_is_measured_on_each_image_as_it_is_and_transformed():
    images = [np.full((1, 8, 8), v, np.float32) for v in (0.5, 0.8)]
    keys = [(0, "a"), (0, "b")]

    def brightness(batch):
        assert batch.shape == (5, 1, 8, 8)
        return batch.mean((1, 2, 3))

    gamma = np.array([[t.gamma for t in draw_transforms(key, 4, "gamma")] for key in keys])
    by_hand = 1 - np.array([[0.5], [0.8]]) ** (gamma - 1)  # |v^g - v| / v
    found = robustness.measure(brightness, images, keys, "gamma", 4)
    assert np.allclose(found, by_hand, atol=1e-5)
    assert np.allclose(robustness.measure(brightness, images, keys, "geometric", 4), 0, atol=1e-5)


def test_the_box_is_tukeys():
    # quartiles of 1..9 and 30: 3.25, 5.5, 7.75; the whiskers may reach -3.5 and 14.5
    box = robustness.box(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 30, np.nan]))
    assert (box.q1, box.median, box.q3) == (3.25, 5.5, 7.75)
    assert (box.low, box.high, box.outliers, box.n, box.undefined, box.mean) == (1, 9, 1, 10, 1, 7.5)
    with pytest.raises(UserError, match="no case has a probability above 0"):
        robustness.box(np.array([np.nan]))


def test_two_models_side_by_side():
    steady = np.array([[0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [0.0, 0.3, 0.3], [np.nan] * 3])
    shaky = np.array([[0.3, 0.0, 0.3], [0.1, 0.1, 0.9], [0.3, 0.3, 0.3], [0.5] * 3])
    rows = robustness.compare({"ours": steady, "none": shaky})
    # medians .1 < .3, .2 > .1, .3 = .3; the fourth image is not compared
    assert rows[0]["steadier"]["none"] == pytest.approx(1.5 / 3) and rows[0]["box"].undefined == 3
    assert rows[1]["steadier"]["ours"] == pytest.approx(1.5 / 3) and rows[1]["box"].n == 12
    with pytest.raises(ValueError, match="the same ones"):
        robustness.compare({"a": steady, "b": shaky[:2]})
