"""A listed picture has larger = brighter, whatever its format says of white."""

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ingest.frames import Frame
from ingest.sniff import sniff
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


@pytest.mark.parametrize("planar", [1, 2])
def test_the_luma_of_a_tiff_is_that_of_its_colours_however_they_lie(tmp_path, planar):
    colours = np.random.default_rng(1).integers(0, 256, (48, 40, 3), np.uint8)
    path = tmp_path / "f.tif"
    chosen = "contig" if planar == 1 else "separate"
    planes = colours if planar == 1 else np.moveaxis(colours, -1, 0)
    path.write_bytes(imagecodecs.tiff_encode(planes, photometric="rgb", planarconfig=chosen))
    with Image.open(path) as saved:
        assert saved.tag_v2.get(284, 1) == planar
    frame = one(path, "raster", "us")
    assert np.array_equal(frame.pixels, cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY))
    assert frame.columns["was_color"] is True


@pytest.mark.parametrize("was_color", [True, False])
def test_a_tiff_with_a_palette_is_stored_as_its_colours_not_as_their_numbers(tmp_path, was_color):
    numbers = np.arange(48 * 40, dtype=np.uint8).reshape(48, 40)
    palette = np.random.default_rng(2).integers(0, 256, (256, 3), np.uint8)
    if not was_color:
        palette = np.repeat(np.arange(256, dtype=np.uint8)[::-1, None], 3, 1)
    image = Image.fromarray(numbers, "L")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "f.tif")
    with Image.open(tmp_path / "f.tif") as saved:
        assert saved.tag_v2[262] == 3
        colours = np.asarray(saved.convert("RGB"))  # an independent reader
    frame = one(tmp_path / "f.tif", "raster", "us")
    expected = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY) if was_color else colours[..., 0]
    assert np.array_equal(frame.pixels, expected) and frame.columns["was_color"] is was_color


def test_a_tiff_of_jpegs_is_lossy_and_a_big_tiff_is_a_tiff(tmp_path):
    pixels = grey("uint8", 8)
    Image.fromarray(pixels).save(tmp_path / "jpeg.tif", compression="jpeg")
    assert one(tmp_path / "jpeg.tif", "raster", "us").columns["lossy_source"] is True
    Image.fromarray(pixels).save(tmp_path / "big.tif", big_tiff=True)
    assert (tmp_path / "big.tif").read_bytes()[:4] == b"II+\0"
    assert sniff((tmp_path / "big.tif").read_bytes()) == "raster"
    frame = one(tmp_path / "big.tif", "raster", "us")
    assert np.array_equal(frame.pixels, pixels) and frame.columns["lossy_source"] is False
