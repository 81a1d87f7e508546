"""Stored pixels to [0, 1]: DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, percentiles, and the point-wise changes."""

import numpy as np
import pytest

from trainer.augment.intensity import apply_intensity, to_unit
from trainer.config import IntensityConfig

ROW = {
    "window_center": 40.0,
    "window_width": 400.0,
    "window_function": "LINEAR",
    "p005": -900.0,
    "p995": 1100.0,
    "minimum": -1024.0,
    "maximum": 2000.0,
}
HU = np.array([[-1024, -160, -159, 40, 239, 240, 2000]], np.int16)
RECORDED = IntensityConfig(mode="recorded")


def test_linear_window_is_the_one_of_the_standard():
    expected = np.clip((HU - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1)
    assert np.allclose(to_unit(HU, ROW, RECORDED), expected, atol=1e-6)


def test_linear_exact_and_sigmoid_windows():
    exact = to_unit(HU, ROW | {"window_function": "LINEAR_EXACT"}, RECORDED)
    assert np.allclose(exact, np.clip((HU - 40.0) / 400 + 0.5, 0, 1), atol=1e-6)
    sigmoid = to_unit(HU, ROW | {"window_function": "SIGMOID"}, RECORDED)
    assert np.allclose(sigmoid, 1 / (1 + np.exp(-4 * (HU - 40.0) / 400)), atol=1e-6)


def test_a_missing_function_means_linear():
    assert np.array_equal(to_unit(HU, ROW | {"window_function": None}, RECORDED), to_unit(HU, ROW, RECORDED))


def test_width_one_is_a_threshold():
    out = to_unit(np.array([[39, 40]], np.int16), ROW | {"window_width": 1.0}, RECORDED)
    assert out.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    "change",
    [{"window_center": None}, {"window_width": None}, {"window_width": 0.0}, {"window_center": float("nan")}],
)
def test_an_unusable_window_falls_back_to_percentiles(change):
    expected = to_unit(HU, ROW, IntensityConfig(mode="percentile"))
    assert np.allclose(expected, np.clip((HU + 900.0) / 2000, 0, 1), atol=1e-6)
    assert np.array_equal(to_unit(HU, ROW | change, RECORDED), expected)


def test_fixed_window_as_in_the_head_ct_of_the_paper():
    out = to_unit(HU, ROW, IntensityConfig(mode="fixed", center=55, width=200))
    assert np.allclose(out, np.clip((HU + 45.0) / 200, 0, 1), atol=1e-6)


def test_uint8_pixels_give_the_same_as_wider_ones():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    row = ROW | {"p005": 10.0, "p995": 200.0}
    narrow = to_unit(pixels, row, IntensityConfig())
    assert narrow.dtype == np.float32
    assert np.array_equal(narrow, to_unit(pixels.astype(np.uint16), row, IntensityConfig()))


def test_equal_percentiles_use_the_extremes_and_a_constant_image_is_zero():
    row = ROW | {"p005": 5.0, "p995": 5.0, "minimum": 5.0, "maximum": 9.0}
    assert np.allclose(to_unit(np.array([[5, 7, 9]], np.uint16), row, IntensityConfig()), [[0, 0.5, 1]])
    row |= {"maximum": 5.0}
    assert not to_unit(np.full((2, 2), 5, np.uint16), row, IntensityConfig()).any()


def test_point_wise_changes_are_gamma_then_linear_then_one_clip():
    stack = np.random.default_rng(0).uniform(-0.3, 1.4, (3, 8, 8)).astype(np.float32)
    gamma, gain, offset = np.array([1.0, 2.2, 1.8]), np.array([1.0, 1.1, 0.9]), np.array([0.0, -0.2, 0.2])
    x = np.maximum(stack.astype(np.float64), 0) ** gamma[:, None, None]
    expected = np.clip(x * gain[:, None, None] + offset[:, None, None], 0, 1) * 255
    out = apply_intensity(stack.copy(), gamma, gain, offset)
    assert out.dtype == np.uint8
    assert np.abs(out - expected).max() <= 0.5 + 1e-3


def test_identity_keeps_every_grey_level():
    stack = (np.arange(256, dtype=np.float32) / 255).reshape(1, 16, 16)
    one = np.ones(1)
    assert np.array_equal(apply_intensity(stack, one, one, 0 * one).ravel(), np.arange(256))
