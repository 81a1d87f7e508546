"""Every syntax holds the pixels that were given, as pydicom decodes them."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID, CTImageStorage

from ingest.synthetic.fields import noise
from ingest.synthetic.identity import header, make_person, uid
from ingest.synthetic.syntaxes import COLOR, GREY, LOSSY, set_pixels


def picture(kind: str) -> tuple[NDArray[np.generic], int]:
    rng = np.random.default_rng(5)
    field = noise(rng, (61, 74), 3.0) + 0.05 * noise(rng, (61, 74), 0.0)
    if kind == "rgb":
        value = np.clip(field * 40 + 128, 0, 255)
        return np.stack([value, 255 - value, value / 2], -1).astype(np.uint8), 8
    if kind == "int16":
        return np.where(field > 2, -2000, field * 400).astype(np.int16), 16
    bits = int(kind.removeprefix("uint"))
    stored = np.clip((field + 3) / 6, 0, 1) * (2**bits - 1)
    return stored.astype(np.uint8 if bits == 8 else np.uint16), bits


def read_back(frames: NDArray[np.generic], bits: int, syntax: UID, plugin: str = "") -> NDArray[np.generic]:
    person = make_person(np.random.default_rng(1), "T1")
    data = header(person, "CT", CTImageStorage, uid("a"), uid("b"), uid("c"))
    set_pixels(data, frames, bits, syntax, "RGB" if frames.ndim == 4 else "MONOCHROME2")
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    file.seek(0)
    return pixel_array(dcmread(file), raw=True, decoding_plugin=plugin)


@pytest.mark.parametrize("syntax", GREY, ids=lambda s: s.keyword)
@pytest.mark.parametrize("kind", ["uint8", "uint10", "uint12", "uint13", "uint16", "int16"])
def test_grey_pixels_come_back_exactly_from_every_decoder(syntax: UID, kind: str) -> None:
    pixels, bits = picture(kind)
    plugins = get_decoder(syntax).available_plugins or ("",)
    for plugin in plugins:
        assert np.array_equal(read_back(pixels[None], bits, syntax, plugin), pixels), plugin


@pytest.mark.parametrize("syntax", [s for s in COLOR if s not in LOSSY], ids=lambda s: s.keyword)
@pytest.mark.parametrize("count", [1, 3])
def test_colour_frames_come_back_exactly(syntax: UID, count: int) -> None:
    pixels, bits = picture("rgb")
    frames = np.stack([np.roll(pixels, i, axis=1) for i in range(count)])
    found = read_back(frames, bits, syntax)
    assert np.array_equal(found, frames if count > 1 else frames[0])


def test_jpeg_baseline_luma_is_that_of_the_picture_within_its_loss() -> None:
    pixels, bits = picture("rgb")
    (syntax,) = LOSSY
    found = read_back(pixels[None], bits, syntax)[..., 0].astype(float)
    assert np.abs(found - pixels @ np.array([0.299, 0.587, 0.114])).mean() < 3
