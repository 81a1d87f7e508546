"""A small file cut off at every byte is read or refused with a reason: no traceback, no hang."""

import cv2
import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless

from ingest.config import ReadRules
from ingest.frames import Frame, Refusal
from ingest.sandbox import InlineReader
from ingest.sniff import read_head, sniff
from tests.ingest.files import grey, write


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless],
    ids=lambda s: s.name,
)
def test_a_file_truncated_at_every_byte_ends_in_a_reason(tmp_path, syntax):
    pixels = grey("uint8", 8, (20, 16))
    pixels[2:] = 7  # short in every syntax
    whole = write(tmp_path / "whole", pixels, "MR", 8, syntax).read_bytes()
    assert len(whole) < 2000
    path, reader = tmp_path / "cut", InlineReader(ReadRules(min_side=8))
    path.write_bytes(whole)
    for length in range(len(whole), -1, -1):
        if length < len(whole):
            with path.open("r+b") as file:
                file.truncate(length)
        items = list(reader.read(str(path), sniff(read_head(path)), "none"))
        assert len(items) == 1, length
        if length == len(whole):
            assert isinstance(items[0], Frame)
        elif length < len(whole) - 12:  # padding and end marks may be missed
            assert isinstance(items[0], Refusal), length


def picture(path):
    """One small image that keeps few values: short in every format."""
    pixels = grey("uint8", 8, (20, 16))
    pixels[3:] = 7
    if path.name.startswith("nii"):
        data = np.arange(16 * 20 * 2, dtype=np.int16).reshape(16, 20, 2).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)
    elif path.suffix == ".tif":
        Image.fromarray(pixels).save(path, "TIFF")
    else:
        cv2.imwrite(str(path), pixels)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "nii.nii", "nii.nii.gz"])
def test_a_picture_or_a_volume_truncated_at_every_byte_is_refused_or_has_the_same_pixels(tmp_path, name):
    whole = picture(tmp_path / name)
    path, reader = tmp_path / "cut", InlineReader(ReadRules(min_side=8))
    kind = sniff(whole[:4096])

    def pixels(length):
        path.write_bytes(whole[:length])
        items = list(reader.read(str(path), kind, "mr"))
        assert items, length
        return [item.pixels.tobytes() for item in items if isinstance(item, Frame)]

    expected = pixels(len(whole))
    assert expected and len(whole) < 2500
    refused = 0
    for length in range(len(whole)):
        found = pixels(length)
        assert found in ([], expected), length
        refused += found != expected
    assert refused > len(whole) - 40  # end marks may be missed
