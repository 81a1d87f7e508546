"""A small file cut off at every byte is read or refused with a reason: no traceback, no hang."""

import pytest
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
