"""A listed picture has larger = brighter, whatever its format says of white."""

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ingest.frames import Frame
from tests.ingest.files import grey, one


def tiff(path, image: Image.Image, photometric: int):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = photometric
    image.save(path, "TIFF", tiffinfo=tags)
    with Image.open(path) as saved:
        assert saved.tag_v2[262] == photometric
    return path


def stored(path):
    """The samples of an uncompressed TIFF of one strip, as they lie in the file."""
    with Image.open(path) as image:
        tags = image.tag_v2
        dtype = f"<u{tags[258][0] // 8}"
        return np.fromfile(path, dtype, tags[279][0] // np.dtype(dtype).itemsize, offset=tags[273][0])


@pytest.mark.parametrize(("dtype", "bits"), [("uint8", 8), ("uint16", 16)])
def test_a_tiff_whose_white_is_zero_is_turned_and_recorded(tmp_path, dtype, bits):
    pixels = grey(dtype, bits)
    for photometric in (0, 1):
        path = tiff(tmp_path / f"{photometric}", Image.fromarray(pixels), photometric)
        frame = one(path, "raster", "xr")
        assert isinstance(frame, Frame) and frame.pixels.dtype == dtype
        samples = stored(path).reshape(pixels.shape)
        expected = samples if photometric else 2**bits - 1 - samples
        assert np.array_equal(frame.pixels, expected)
        assert frame.columns["inverted"] is (photometric == 0)


def test_a_png_is_taken_as_it_is(tmp_path):
    pixels = grey("uint8", 8)
    Image.fromarray(pixels).save(tmp_path / "f.png")
    frame = one(tmp_path / "f.png", "raster", "xr")
    assert np.array_equal(frame.pixels, pixels) and frame.columns["inverted"] is False


@pytest.mark.parametrize("compression", [None, "group4", "packbits", "tiff_lzw"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_tiff_of_one_bit_is_turned_at_most_once(tmp_path, compression, photometric):
    white = np.random.default_rng(0).random((48, 40)) > 0.5
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = photometric
    path = tmp_path / "f.tif"
    Image.fromarray(white).save(path, "TIFF", tiffinfo=tags, compression=compression)
    with Image.open(path) as saved:
        assert saved.tag_v2[262] == photometric
        assert np.array_equal(np.asarray(saved), white)  # an independent reader
    frame = one(path, "raster", "xr")
    assert np.array_equal(frame.pixels, white * np.uint8(255))
    assert frame.columns["inverted"] is (photometric == 0)
