"""Codecs are lossless for every stored dtype, deterministic, and give halves and quarters."""

import cv2
import imagecodecs
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards.codec import area_reduce, get_codec
from shards.errors import UserError
from shards.stats import pixel_digest, pixel_statistics

CODECS = ["htj2k", "png16", "blosc2"]
DTYPES = ["uint8", "uint16", "int16"]


def image(dtype: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    limits = np.iinfo(dtype)
    noise = np.random.default_rng(seed).integers(limits.min, limits.max, (rows, columns), endpoint=True)
    noise.flat[0], noise.flat[-1] = limits.min, limits.max
    return noise.astype(dtype)


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_pixels_come_back_exactly_and_bytes_are_reproducible(codec, dtype, rows, columns, seed):
    pixels = image(dtype, rows, columns, seed)
    coder = get_codec(codec)
    data = coder.encode(pixels)
    decoded = coder.decode(data)
    assert decoded.dtype == pixels.dtype and np.array_equal(decoded, pixels)
    assert coder.encode(np.asfortranarray(pixels)) == data


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", [1, 2])
def test_reduced_decoding_is_the_image_at_half_and_quarter(codec, dtype, reduce):
    limits = np.iinfo(dtype)
    y, x = np.mgrid[0:131, 0:90]
    wave = (np.sin(x / 14) + np.cos(y / 17) + 2) / 4
    pixels = (limits.min + wave * (limits.max - limits.min)).astype(dtype)
    coder = get_codec(codec)
    small = coder.decode(coder.encode(pixels), reduce)
    step = 1 << reduce
    assert small.shape == (-(-131 // step), -(-90 // step)) and small.dtype == pixels.dtype
    expected = area_reduce(pixels, reduce).astype(float)
    # The 5/3 low pass is centred on even pixels, area averaging between them: up to 1.5 pixels apart.
    assert np.abs(small - expected).mean() < 0.05 * (limits.max - limits.min)
    assert np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.99


@settings(max_examples=60, deadline=None)
@example(dtype="uint16", reduce=2, bits=12, seed=100)  # the most of 5,400 cases: half of the range
@given(
    dtype=st.sampled_from(DTYPES),
    reduce=st.sampled_from([1, 2]),
    bits=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_reduced_htj2k_never_wraps_black_to_white(dtype, reduce, bits, seed):
    limits = np.iinfo(dtype)
    span = min(2**bits - 1, limits.max - limits.min)
    # Blocks and checkerboards of the extremes: the worst that the wavelet's low pass can meet.
    rng = np.random.default_rng(seed)
    cells = np.kron(rng.integers(0, 2, (16, 16)), np.ones((rng.integers(1, 6),) * 2, int))
    low = int(rng.integers(limits.min, limits.max - span, endpoint=True))
    pixels = (low + span * cells).astype(dtype)
    coder = get_codec("htj2k")
    small = coder.decode(coder.encode(pixels), reduce).astype(np.int64)
    assert small.min() >= low and small.max() <= low + span
    mean = area_reduce(np.pad(pixels, 8, "edge").astype(np.int64), reduce)
    # A wrapped value is a whole range away from every mean nearby; the 5/3 filter overshoots by half of it.
    near = [np.roll(mean, (i, j), (0, 1)) for i in range(-2, 3) for j in range(-2, 3)]
    pad = 8 >> reduce
    inside = (slice(pad, pad + small.shape[0]), slice(pad, pad + small.shape[1]))
    assert (small <= np.max(near, 0)[inside] + 0.6 * span + 8).all()
    assert (small >= np.min(near, 0)[inside] - 0.6 * span - 8).all()


def test_codestreams_of_other_encoders_are_reduced_without_wrapping_too():
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 21:] = 255
    foreign = imagecodecs.htj2k_encode(pixels, reversible=True)
    assert np.array_equal(get_codec("htj2k").decode(foreign, 1), area_reduce(pixels, 1))


def test_area_reduction_is_the_mean_of_each_block():
    pixels = image("int16", 7, 9)
    small = area_reduce(pixels, 1)
    assert small[1, 2] == np.rint(pixels[2:4, 4:6].mean())
    assert small[3, 4] == pixels[6, 8]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_other_decoders_read_unsigned_images(dtype):
    pixels = image(dtype, 40, 50)
    for codec in ("htj2k", "png16"):
        raw = np.frombuffer(get_codec(codec).encode(pixels), np.uint8)
        assert np.array_equal(cv2.imdecode(raw, cv2.IMREAD_UNCHANGED), pixels)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut"])
def test_damaged_data_is_a_value_error_or_wrong_pixels_never_a_crash(codec, damage):
    coder = get_codec(codec)
    pixels = image("uint16", 64, 64)
    data = coder.encode(pixels)
    damaged = {"empty": b"", "garbage": b"\x00" * 200, "cut": data[: len(data) // 2]}[damage]
    try:
        decoded = coder.decode(damaged)
    except ValueError as error:
        assert "damaged" in str(error)
    else:
        assert damage == "cut" and pixel_digest(decoded) != pixel_digest(pixels)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 2), np.float32), np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2), "u1")]
)
@pytest.mark.parametrize("codec", CODECS)
def test_other_arrays_are_refused(codec, pixels):
    with pytest.raises(ValueError, match="2D"):
        get_codec(codec).encode(pixels)


def test_an_unknown_codec_names_the_known_ones():
    with pytest.raises(UserError, match="htj2k, png16 or blosc2"):
        get_codec("jpeg")


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_statistics_agree_with_numpy(dtype, rows, columns, seed):
    pixels = image(dtype, rows, columns, seed)
    found = pixel_statistics(pixels)
    wide = pixels.astype(np.float64)
    expected = {
        "p005": np.percentile(wide, 0.5),
        "p995": np.percentile(wide, 99.5),
        "mean": wide.mean(),
        "std": wide.std(),
        "minimum": wide.min(),
        "maximum": wide.max(),
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_pixel_digest_tells_dtype_shape_and_values_apart_and_is_pinned():
    zeros = np.zeros((2, 3), np.uint16)
    others = [zeros.T, zeros.astype(np.int16), zeros + np.uint16(1), np.zeros((2, 6), np.uint8)]
    assert len({pixel_digest(a) for a in [zeros, *others]}) == 5
    assert pixel_digest(np.arange(6, dtype=">u2").reshape(2, 3)) == "z2ka5hbdihdrrpi62stpdlqsmp"
