"""Memory does not grow with a file: frames and slices are read one by one."""

import gzip
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import JPEG2000Lossless, RLELossless

from ingest.config import ReadRules
from ingest.synthetic.syntaxes import encode
from tests.ingest.files import grey, one, read, write

LIMIT_MB = 400
_CHILD = """
import hashlib, re, sys
from pathlib import Path
from ingest.config import ReadRules
from ingest.read import read_file
rules = ReadRules.model_validate_json(sys.argv[4])
count, seen = 0, hashlib.sha256()
for item in read_file(sys.argv[1], sys.argv[2], sys.argv[3], rules):
    count += 1
    if getattr(item, "pixels", None) is not None:
        seen.update(item.pixels.tobytes())
# not ru_maxrss: it starts from the size of the process that forked this one
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(count, seen.hexdigest(), peak // 1024)
"""


def peak(path: Path, kind: str, modality: str = "none", **rules) -> tuple[int, str, int]:
    """(items, sha256 of those that are no refusals, peak MB) of reading a file in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, path, kind, modality, ReadRules(**rules).model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    count, seen, megabytes = done.stdout.split()
    return int(count), seen, int(megabytes)


@pytest.mark.parametrize("modality", ["XA", "MR"])
def test_two_gigabytes_of_uncompressed_frames_are_read_in_little_memory(tmp_path, modality):
    frame = grey("uint16", 12, (1024, 1024))
    path = write(tmp_path / "f", frame, "MR", 12, Modality=modality, NumberOfFrames=1000)
    data = bytearray(path.read_bytes())
    at = data.rindex(struct.pack("<HH", 0x7FE0, 0x10) + b"OW\0\0")
    data[at + 8 : at + 12] = (1000 * frame.nbytes).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(data)
        file.truncate(at + 12 + 1000 * frame.nbytes)  # the other frames are a hole: blank
    assert path.stat().st_size > 2e9
    count, seen, megabytes = peak(path, "dicom", modalities={modality: "x"}, frames_per_cine=64)
    assert (count, seen) == (64, digest_of(frame)) and megabytes < LIMIT_MB


def digest_of(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


@pytest.mark.parametrize("table", ["basic", "extended", "none", "fragments"])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=lambda s: s.name)
def test_frames_are_found_with_any_offset_table(tmp_path, table, syntax):
    clip = np.stack([grey("uint16", 12, seed=s) for s in range(5)])
    path = write(tmp_path / "f", clip, "MR", 12, syntax, frames=True)
    data = pydicom.dcmread(path)
    streams = [encode(frame, 12, syntax) for frame in clip]
    if table == "extended":
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = encapsulate_extended(
            streams
        )
    elif table == "fragments" and syntax == JPEG2000Lossless:  # told apart by their end marks
        data.PixelData = encapsulate(streams, fragments_per_frame=3, has_bot=False)
    else:
        pieces = 3 if table == "fragments" else 1
        data.PixelData = encapsulate(streams, fragments_per_frame=pieces, has_bot=table != "none")
    data["PixelData"].is_undefined_length = True
    data.save_as(path)
    frames = read(path)
    assert [f.index for f in frames] == list(range(5))
    assert all(np.array_equal(f.pixels, clip[f.index]) for f in frames)


def test_offset_tables_that_lie_are_not_believed(tmp_path):
    clip = np.stack([grey("uint16", 12, seed=s) for s in range(3)])
    path = write(tmp_path / "f", clip, "MR", 12, RLELossless, frames=True)
    data = pydicom.dcmread(path)
    element = bytearray(data.PixelData)
    element[8:12] = (7).to_bytes(4, "little")
    data.PixelData = bytes(element)
    data["PixelData"].is_undefined_length = True
    data.save_as(path)
    assert all(np.array_equal(f.pixels, clip[f.index]) for f in read(path))


def nifti(path: Path, shape, dtype="int16", slice_axis=None) -> int:
    """A NIfTI-1 header, written by hand, and the offset of its data."""
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.diag([-0.8, 0.9, -3, 1]), 1)
    header.set_slope_inter(1, 0)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    if slice_axis is not None:
        header.set_dim_info(slice=slice_axis)
    path.write_bytes(header.binaryblock + bytes(4))
    return 352


def test_a_gigabyte_of_nifti_is_read_in_little_memory(tmp_path):
    shape = (1024, 1024, 500)
    path = tmp_path / "f.nii"
    nifti(path, shape)
    plane = grey("int16", 12, (1024, 1024))
    with path.open("ab") as file:
        file.write(plane.tobytes(order="F"))
        file.truncate(352 + 2 * 1024 * 1024 * 500)
    count, seen, megabytes = peak(path, "nifti", "mr")
    assert (count, seen) == (500, digest_of(plane.T[::-1])) and megabytes < LIMIT_MB  # x runs to the left


def test_a_gzipped_nifti_is_read_as_a_stream(tmp_path):
    shape = (512, 512, 700)
    path = tmp_path / "f.nii.gz"
    nifti(tmp_path / "f.nii", shape)
    plane = grey("int16", 12, (512, 512)).tobytes(order="F")
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write((tmp_path / "f.nii").read_bytes() + plane)
        for _ in range(699):
            file.write(bytes(len(plane)))
    count, _, megabytes = peak(path, "nifti", "mr")
    assert count == 700 and megabytes < LIMIT_MB


def test_a_large_nifti_whose_slices_lie_across_the_file_is_refused(tmp_path):
    path = tmp_path / "f.nii"
    nifti(path, (512, 512, 2000), slice_axis=0)
    with path.open("ab") as file:
        file.truncate(352 + 2 * 512 * 512 * 2000)
    assert one(path, "nifti", "mr").reason == "too_large"
