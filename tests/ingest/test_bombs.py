"""Files that ask for much: a reason code, or a sample, within the memory of a worker."""

import math
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

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


def jpeg_2000(path):
    data = write(path, np.zeros((64, 64), np.uint16), "MR", 16, JPEG2000Lossless).read_bytes()
    at = data.index(b"\xff\x4f\xff\x51") + 8  # SIZ: width and height of the grid, then their origin
    path.write_bytes(data[:at] + struct.pack(">II", 14142, 14142) + data[at + 8 :])


@pytest.mark.parametrize("make", [deflated, jpeg_ls, jpeg_2000, nested, lying, lying_to_the_limit])
def test_a_bomb_ends_in_a_reason_below_half_a_gigabyte(tmp_path, make):
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
    assert peak < 500e6


_WORKER = """
import os, sys
from pathlib import Path
from ingest.convert import run_unit
from ingest.sandbox import ProcessReader, process_usage
from tests.ingest.files import NAMES, config, units
root = Path(sys.argv[1])
settings = config(root / "s", root / "out", sandbox="process")
reader = ProcessReader(settings.rules(), 120, 4096)
(unit,) = units(settings)
result = run_unit(unit, settings, NAMES, root / "out", root / "scratch", reader)
print(sum(result.samples.values()), process_usage(os.getpid())[1], reader.usage()[1])
reader.close()
"""


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, JPEGLSLossless, RLELossless, JPEG2000Lossless],
    ids=lambda s: s.name,
)
def test_the_largest_frame_is_taken_within_the_memory_of_a_worker(tmp_path, syntax):
    """data.md: both processes of a worker together, below 600 MB whatever the input."""
    side = math.isqrt(ReadRules().max_frame_pixels)
    ramp = np.arange(side, dtype=np.uint16) // 8
    (tmp_path / "s").mkdir()
    write(tmp_path / "s" / "f", np.add.outer(ramp, ramp), "MR", 12, syntax)
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, tmp_path], capture_output=True, text=True, check=True
    )
    samples, own, decoder = map(int, done.stdout.split())
    assert samples == 1 and own + decoder < 600e6
