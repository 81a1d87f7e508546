"""Small files that ask for much: a reason code from a decoder process that stays below 1 GB."""

import struct
import zlib

import numpy as np
import pytest
from pydicom.uid import JPEGLSLossless

from ingest.config import ReadRules
from ingest.frames import Refusal
from ingest.sandbox import ProcessReader
from tests.ingest.files import write

_PIXELS = struct.pack("<HH", 0x7FE0, 0x10)
_PLAIN, _DEFLATED = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"


def deflated(path):
    data = write(path, Rows=14142, Columns=14142).read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    meta = data[:start].replace(struct.pack("<H", 20) + _PLAIN, struct.pack("<H", 22) + _DEFLATED)
    meta = meta[:140] + (start - 144 + 2).to_bytes(4, "little") + meta[144:]
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    body = packer.compress(
        data[start : data.rindex(_PIXELS)] + _PIXELS + b"OW\0\0" + struct.pack("<I", 400 << 20)
    )
    body += b"".join(packer.compress(bytes(4 << 20)) for _ in range(100)) + packer.flush()
    path.write_bytes(meta + body)


def jpeg_ls(path):
    data = write(path, np.zeros((64, 64), np.uint16), "MR", 16, JPEGLSLossless).read_bytes()
    at = data.index(b"\xff\xf7") + 5  # SOF55: length, precision, then lines and samples of a line
    path.write_bytes(data[:at] + struct.pack(">HH", 14142, 14142) + data[at + 4 :])


def nested(path):
    data = write(path).read_bytes()
    at = data.rindex(_PIXELS)
    level = struct.pack("<HH", 0x40, 0xA730) + b"SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    path.write_bytes(data[:at] + 9000 * level + data[at:])


def lying(path):
    write(path, Rows=8000, Columns=8000)


def lying_to_the_limit(path):
    write(path, Rows=65535, Columns=65535)


@pytest.mark.parametrize("make", [deflated, jpeg_ls, nested, lying, lying_to_the_limit])
def test_a_bomb_ends_in_a_reason_below_a_gigabyte(tmp_path, make):
    make(tmp_path / "f")
    assert (tmp_path / "f").stat().st_size < 500_000
    reader = ProcessReader(ReadRules(), 60, 4096)
    try:
        items = list(reader.read(str(tmp_path / "f"), "dicom", "none"))
        seconds, peak = reader.usage()
    finally:
        reader.close()
    print(make.__name__, items, seconds, peak / 1e6)
    assert len(items) == 1 and isinstance(items[0], Refusal)
    assert peak < 1e9
