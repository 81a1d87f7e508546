"""Every input ends as samples or as a refusal with a reason: never a traceback, never a hang."""

import gzip
import os
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from ingest.frames import Frame, Refusal
from ingest.sniff import read_head, sniff
from shards.schema import Reason
from tests.ingest.files import dataset, grey, one, read, write


def refused(path, **rules) -> Reason:
    item = one(path, **rules)
    assert isinstance(item, Refusal), item
    return item.reason


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        (Reason.MODALITY_OUT_OF_SCOPE, {"modality": "MR", "Modality": "OT"}),
        (Reason.NO_MODALITY, {"Modality": ""}),
        (Reason.NO_PIXEL_DATA, {"PixelData": None}),
        (Reason.SOP_CLASS_OUT_OF_SCOPE, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}),
        (Reason.SOP_CLASS_OUT_OF_SCOPE, {"modality": "DX", "PresentationIntentType": "FOR PROCESSING"}),
        (Reason.DICOMDIR, {"SOPClassUID": "1.2.840.10008.1.3.10"}),
        (Reason.BURNED_IN_RISK, {"modality": "CR", "sop_class": "SC"}),
        (Reason.BURNED_IN_RISK, {"modality": "US"}),
        (Reason.BURNED_IN_RISK, {"BurnedInAnnotation": "YES"}),
        (Reason.DERIVED, {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}),
        (Reason.DERIVED, {"modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        (Reason.BAD_PIXEL_DESCRIPTION, {"Rows": None}),
        (Reason.BAD_PIXEL_DESCRIPTION, {"BitsAllocated": 32}),
        (Reason.BAD_PIXEL_DESCRIPTION, {"BitsStored": 17}),
        (Reason.BAD_PIXEL_DESCRIPTION, {"SamplesPerPixel": 4}),
        (Reason.BAD_PIXEL_DESCRIPTION, {"PhotometricInterpretation": "HSV"}),
        (Reason.UNREADABLE, {"Rows": 4000}),
        (Reason.DECODE_FAILED, {"syntax": RLELossless, "Rows": 4000}),
        (Reason.TOO_LARGE, {"Rows": 65535, "Columns": 65535}),
        (Reason.TOO_SMALL, {"Rows": 32}),
        (Reason.TRANSFER_SYNTAX, {"syntax_after": "1.2.840.10008.1.2.4.102"}),
        (Reason.TRANSFER_SYNTAX, {"syntax_after": "1.2.3.4"}),
    ],
)
def test_a_file_that_is_no_usable_image_is_refused_with_its_reason(tmp_path, reason, settings):
    syntax = settings.pop("syntax_after", None)
    path = write(tmp_path / "f", **settings)
    if syntax:
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = encapsulate([bytes(100)])
        data["PixelData"].is_undefined_length = True
        data.save_as(path, implicit_vr=False, little_endian=True)
    assert refused(path) == reason


def test_a_blank_image_is_refused(tmp_path):
    assert refused(write(tmp_path / "f", np.full((48, 40), 7, np.uint16))) == Reason.CONSTANT


def test_a_blank_frame_of_a_clip_is_refused_alone(tmp_path):
    clip = np.stack([grey("uint8", 8), np.zeros((48, 40), np.uint8)])
    items = read(write(tmp_path / "f", clip, "US", 8, frames=True), allow_burned_in=True)
    assert isinstance(items[0], Frame) and items[1] == Refusal(Reason.CONSTANT, 1, "us")


def test_dicom_without_the_part_10_header_is_refused_as_such(tmp_path):
    path = write(tmp_path / "f")
    bare = tmp_path / "bare"
    bare.write_bytes(path.read_bytes()[132:])
    body = path.read_bytes()
    start = 144 + int.from_bytes(body[140:144], "little")
    headless = tmp_path / "headless"
    headless.write_bytes(body[start:])
    for file in (bare, headless):
        assert sniff(read_head(file)) == "dicom"
        assert refused(file) == Reason.NO_PART10_HEADER


def test_a_deflate_bomb_is_refused_before_it_inflates(tmp_path):
    data = dataset("MR")
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = tmp_path / "f"
    data.save_as(path, enforce_file_format=True)
    head = path.read_bytes()
    head = head[: 144 + int.from_bytes(head[140:144], "little")]
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    element = b"\x08\x00\x00\x01UN\0\0" + (32 << 20).to_bytes(4, "little")
    body = squeeze.compress(element) + b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(32))
    path.write_bytes(head + body + squeeze.flush())
    assert path.stat().st_size < 1 << 16
    assert refused(path, max_frame_pixels=1 << 20) == Reason.TOO_LARGE


def test_nested_sequences_beyond_reason_are_refused(tmp_path):
    path = write(tmp_path / "f", PixelData=None)
    data = path.read_bytes()
    item = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    path.write_bytes(data + item * 9000)
    assert refused(path) in (Reason.UNREADABLE, Reason.NO_PIXEL_DATA)


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=str)
def test_a_truncated_file_is_read_or_refused_at_every_length(tmp_path, syntax):
    whole = write(tmp_path / "whole", **({"syntax": syntax} if syntax else {})).read_bytes()
    path = tmp_path / "cut"
    for length in [*range(0, 400, 7), *range(400, len(whole), max(1, len(whole) // 40))]:
        path.write_bytes(whole[:length])
        items = read(path, sniff(read_head(path)))
        assert items and all(isinstance(i, Frame | Refusal) for i in items)


def test_damaged_bytes_never_raise(tmp_path):
    whole = bytearray(write(tmp_path / "whole", syntax=RLELossless).read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(132, len(whole), 8):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        assert read(path)


def test_a_wrong_value_representation_of_an_optional_element_is_a_missing_value(tmp_path):
    path = write(tmp_path / "f")
    data = pydicom.dcmread(path)
    data.add_new("EchoTime", "LO", "eleven")
    data.add_new("PixelSpacing", "LO", ["a", "b"])
    data.add_new("WindowCenter", "LO", "bright")
    data.save_as(path)
    frame = one(path)
    assert isinstance(frame, Frame)
    assert frame.columns["echo_time_ms"] is None and frame.columns["spacing_row_mm"] is None


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert read_head(fifo) is None
    assert refused(fifo) == Reason.NOT_AN_IMAGE
    assert one(tmp_path / "gone").reason == Reason.UNREADABLE


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x1f\x8b broken gzip", b"%PDF-1.4" + bytes(400), gzip.compress(bytes(5000), mtime=0)],
)
def test_other_content_is_no_image_whatever_its_name(tmp_path, content):
    path = tmp_path / "scan.dcm"
    path.write_bytes(content)
    kind = sniff(read_head(path))
    assert kind == "other"
    assert one(path, kind).reason == Reason.NOT_AN_IMAGE


def test_an_icon_in_a_sequence_is_not_taken_for_the_image(tmp_path):
    icon = Dataset()
    icon.Rows = icon.Columns = 64
    icon.BitsAllocated = 8
    icon.PixelData = bytes(4096)
    path = write(tmp_path / "f", PixelData=None, IconImageSequence=Sequence([icon]))
    assert refused(path) == Reason.NO_PIXEL_DATA


def _whole(left=0, top=0, right=39, bottom=47):
    region = Dataset()
    region.RegionSpatialFormat = 1
    region.RegionLocationMinX0, region.RegionLocationMinY0 = left, top
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = right, bottom
    return Sequence([region])


@pytest.mark.parametrize("declared", ["YES", "NO", None])
@pytest.mark.parametrize("margin", [0, 1])
def test_a_region_that_is_the_whole_frame_is_no_crop(tmp_path, declared, margin):
    regions = _whole(0, margin)
    more = {"BurnedInAnnotation": declared} if declared else {}
    path = write(tmp_path / "f", grey("uint8", 8), "US", 8, SequenceOfUltrasoundRegions=regions, **more)
    assert refused(path) == Reason.BURNED_IN_RISK
    allowed = one(path, allow_burned_in=True)
    assert isinstance(allowed, Frame) and allowed.pixels.shape == (48 - margin, 40)


def test_declared_text_is_left_outside_by_a_real_crop(tmp_path):
    path = write(
        tmp_path / "f",
        grey("uint8", 8),
        "US",
        8,
        SequenceOfUltrasoundRegions=_whole(2, 8),
        BurnedInAnnotation="YES",
    )
    frame = one(path)
    assert isinstance(frame, Frame) and frame.pixels.shape == (40, 38)


def test_no_region_speaks_for_a_capture(tmp_path):
    regions = _whole(2, 8)
    path = write(
        tmp_path / "f", grey("uint8", 8), "US", 8, sop_class="SC", SequenceOfUltrasoundRegions=regions
    )
    assert refused(path) == Reason.BURNED_IN_RISK


@pytest.mark.parametrize("modality", ["MR", "CR"])
def test_a_region_speaks_for_ultrasound_only(tmp_path, modality):
    path = write(
        tmp_path / "f", modality=modality, SequenceOfUltrasoundRegions=_whole(2, 8), BurnedInAnnotation="YES"
    )
    assert refused(path) == Reason.BURNED_IN_RISK


@pytest.mark.parametrize("syntax", [None, RLELossless], ids=str)
def test_declared_frames_that_are_not_there_are_one_refusal(tmp_path, syntax):
    more = {"syntax": syntax} if syntax else {}
    groups = Sequence([Dataset()])
    path = write(tmp_path / "f", NumberOfFrames=1_000_000, PerFrameFunctionalGroupsSequence=groups, **more)
    items = read(path)
    if syntax is None:
        assert isinstance(items[0], Frame) and items[1:] == [Refusal(Reason.UNREADABLE, 1, "mr")]
    else:  # which of the declared frames the one codestream is cannot be known
        assert items == [Refusal(Reason.BAD_PIXEL_DESCRIPTION, -1, "mr")]
