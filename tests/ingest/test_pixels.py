"""Stored pixels are the source's own, whatever the syntax, by the rules of data.md section 2."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit

from ingest.dicom import pixels
from ingest.frames import Frame, Refusal
from ingest.synthetic.syntaxes import COLOR, GREY, encode
from shards.schema import Reason
from tests.ingest.files import grey, one, read, write


@pytest.mark.parametrize("syntax", GREY, ids=lambda s: s.name)
@pytest.mark.parametrize(("dtype", "bits"), [("uint8", 8), ("uint16", 10), ("uint16", 16), ("int16", 16)])
def test_stored_values_of_every_syntax_are_those_written_and_those_of_pydicom(tmp_path, syntax, dtype, bits):
    pixels = grey(dtype, bits)
    path = write(tmp_path / "f", pixels, "MR", bits, syntax)
    frame = one(path)
    assert np.array_equal(frame.pixels, pixels)
    assert np.array_equal(frame.pixels, pydicom.dcmread(path).pixel_array)
    assert frame.pixels.dtype == pixels.dtype
    assert frame.columns["transfer_syntax"] == syntax
    assert not frame.columns["lossy_source"]


@pytest.mark.parametrize("syntax", COLOR, ids=lambda s: s.name)
def test_colour_becomes_luma(tmp_path, syntax):
    smooth = np.add.outer(np.arange(64), np.arange(48))
    rgb = np.stack([smooth * 2, 255 - smooth * 2, smooth + 50], -1).clip(0, 255).astype(np.uint8)
    path = write(tmp_path / "f", rgb, "US", 8, syntax, "RGB")
    frame = one(path, allow_burned_in=True)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    lossy = syntax == JPEGBaseline8Bit
    assert np.abs(frame.pixels - luma).max() <= (6 if lossy else 1)
    assert frame.columns["was_color"] and frame.columns["lossy_source"] == lossy
    assert frame.pixels.dtype == np.uint8


def test_of_ybr_the_luma_is_taken_as_it_is(tmp_path):
    ybr = np.stack([grey("uint8", 8, seed=s) for s in range(3)], -1)
    frame = one(write(tmp_path / "f", ybr, "US", 8, photometric="YBR_FULL"), allow_burned_in=True)
    assert np.array_equal(frame.pixels, ybr[..., 0])
    planar = write(
        tmp_path / "planar",
        ybr,
        "US",
        8,
        photometric="YBR_FULL",
        PlanarConfiguration=1,
        PixelData=np.moveaxis(ybr, -1, 0).tobytes(),
    )
    assert np.array_equal(one(planar, allow_burned_in=True).pixels, ybr[..., 0])


def test_native_ybr_422_is_unpacked(tmp_path):
    y = grey("uint8", 8)
    packed = np.empty((y.shape[0], y.shape[1] // 2, 4), np.uint8)
    packed[..., 0], packed[..., 1], packed[..., 2:] = y[:, ::2], y[:, 1::2], 128
    path = write(
        tmp_path / "f",
        np.stack([y] * 3, -1),
        "US",
        8,
        photometric="YBR_FULL_422",
        PixelData=packed.tobytes(),
    )
    assert np.array_equal(one(path, allow_burned_in=True).pixels, y)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda s: s.name)
@pytest.mark.parametrize("entry_bits", [8, 16])
def test_a_palette_image_is_the_luma_of_its_palette(tmp_path, syntax, entry_bits):
    ramp = np.arange(256)
    tables = [ramp, 255 - ramp, (ramp * 7) % 256]
    elements: dict = {}
    for name, values in zip(("Red", "Green", "Blue"), tables, strict=True):
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        stored = values.astype("u1") if entry_bits == 8 else (values * 257).astype(order + "u2")
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, entry_bits]
        elements[f"{name}PaletteColorLookupTableData"] = stored.tobytes()
    indices = grey("uint8", 8)
    path = write(tmp_path / "f", indices, "US", 8, syntax, "PALETTE COLOR", **elements)
    frame = one(path, allow_burned_in=True)
    rgb = np.stack(tables, -1)[indices]
    assert np.abs(frame.pixels - rgb @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert frame.columns["was_color"] and frame.columns["photometric"] == "PALETTE COLOR"
    if entry_bits == 8 and syntax == ExplicitVRLittleEndian:
        assert np.array_equal(apply_color_lut(indices, pydicom.dcmread(path)), rgb)


def test_bits_above_bits_stored_are_masked_and_the_sign_extended(tmp_path):
    pixels = grey("uint16", 12)
    overlaid = pixels | (np.random.default_rng(1).integers(0, 16, pixels.shape) << 12).astype(np.uint16)
    assert np.array_equal(one(write(tmp_path / "u", overlaid, bits=12)).pixels, pixels)
    signed = one(write(tmp_path / "s", overlaid, bits=12, PixelRepresentation=1)).pixels
    assert np.array_equal(signed, np.where(pixels > 2047, pixels.astype(int) - 4096, pixels))
    shifted = write(tmp_path / "h", (pixels << 4).astype(np.uint16), bits=12, HighBit=15)
    assert np.array_equal(one(shifted).pixels, pixels)


def test_an_unsigned_jpeg_2000_stream_in_a_signed_image_is_read_as_signed(tmp_path):
    pixels = grey("int16", 14)
    bits = (pixels.astype(np.int32) & 0x3FFF).astype(np.uint16)
    data_path = write(tmp_path / "f", bits, bits=14, syntax=JPEG2000Lossless, PixelRepresentation=1)
    assert np.array_equal(one(data_path).pixels, pixels)


def test_ct_is_stored_in_hounsfield_units_with_padding_as_air(tmp_path):
    raw = grey("int16", 16) // 8
    raw[5, 5], raw[6, 6], raw[7, 7] = -2000, -3024, 300
    path = write(tmp_path / "f", raw, "CT", 16, RescaleSlope=1, RescaleIntercept=-24, PixelPaddingValue=300)
    frame = one(path)
    expected = np.clip(raw.astype(int) - 24, -1024, 32767)
    expected[raw == 300] = -1024
    assert frame.pixels.dtype == np.int16 and np.array_equal(frame.pixels, expected)
    assert frame.columns["rescale_slope"] == 1 and frame.columns["rescale_intercept"] == -24


def test_ct_with_a_fractional_slope_is_rounded_once_and_clipped(tmp_path):
    raw = grey("uint16", 16)
    frame = one(write(tmp_path / "f", raw, "CT", 16, RescaleSlope="0.6", RescaleIntercept="-1024.5"))
    assert np.array_equal(frame.pixels, np.clip(np.rint(raw * 0.6 - 1024.5), -1024, 32767))


def test_a_padding_value_of_the_other_signedness_is_understood(tmp_path):
    raw = grey("int16", 16, seed=3) // 16
    raw[0, 0] = -500
    path = write(tmp_path / "f", raw, "CT", 16)
    data = pydicom.dcmread(path)
    data.add_new("PixelPaddingValue", "US", 65536 - 500)
    data.RescaleSlope, data.RescaleIntercept = 1, 5000
    data.save_as(path)
    pixels = one(path).pixels
    assert (pixels[raw == -500] == -1024).all() and (pixels[raw != -500] > 0).all()


@pytest.mark.parametrize(("dtype", "bits"), [("uint8", 8), ("uint16", 10), ("int16", 16)])
def test_monochrome1_is_mirrored_in_its_bit_range_with_its_window(tmp_path, dtype, bits):
    raw = grey(dtype, bits)
    path = write(tmp_path / "f", raw, "CR", bits, photometric="MONOCHROME1", WindowCenter=100, WindowWidth=50)
    frame = one(path)
    end = -1 if dtype == "int16" else 2**bits - 1
    assert np.array_equal(frame.pixels, end - raw.astype(int)) and frame.pixels.dtype == dtype
    assert frame.columns["inverted"]
    assert frame.columns["window_center"] == end - 100 and frame.columns["window_width"] == 50


def test_an_inverse_presentation_lut_is_mirrored_once(tmp_path):
    raw = grey("uint16", 12)
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        path = write(
            tmp_path / photometric, raw, "DX", 12, photometric=photometric, PresentationLUTShape="INVERSE"
        )
        assert np.array_equal(one(path).pixels, 4095 - raw.astype(int))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_negative_slope_is_mirrored_with_its_window(tmp_path, photometric):
    raw = grey("uint16", 12)
    units = {"RescaleSlope": -2, "RescaleIntercept": 4095, "WindowCenter": 500, "WindowWidth": 400}
    frame = one(write(tmp_path / "f", raw, "CR", 12, photometric=photometric, **units))
    shown = (4095 - 2 * raw.astype(int)) * (1 if photometric == "MONOCHROME2" else -1)
    order = np.argsort(shown, axis=None, kind="stable")
    assert (np.diff(frame.pixels.ravel()[order].astype(int)) >= 0).all()  # the larger, the brighter
    assert frame.columns["inverted"] is (photometric == "MONOCHROME2")
    stored = (500 - 4095) / -2
    assert frame.columns["window_center"] == (4095 - stored if photometric == "MONOCHROME2" else stored)
    assert frame.columns["window_width"] == 200


def test_the_window_of_an_mr_image_is_given_in_stored_values(tmp_path):
    path = write(
        tmp_path / "f", RescaleSlope=2, RescaleIntercept=10, WindowCenter=[110, 5], WindowWidth=[40, 5]
    )
    columns = one(path).columns
    assert (columns["window_center"], columns["window_width"]) == (50, 20)
    assert columns["window_function"] == "LINEAR"


def test_a_modality_lut_is_applied(tmp_path):
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [256, 0, 16], "US"
    table = (np.arange(256)[::-1] * 3).astype("<u2")
    lut.add_new("LUTData", "OW", table.tobytes())
    raw = grey("uint8", 8)
    path = write(tmp_path / "f", raw, "CR", 8, ModalityLUTSequence=Sequence([lut]))
    frame = one(path)
    assert np.array_equal(frame.pixels, table[raw]) and frame.pixels.dtype == np.uint16


def test_a_large_radiograph_is_reduced_by_area_averaging_and_keeps_its_size_on_record(tmp_path):
    raw = grey("uint16", 10, (320, 200))
    frame = one(write(tmp_path / "f", raw, "CR", 10, ImagerPixelSpacing=[0.1, 0.2]), xr_max_side=160)
    assert frame.pixels.shape == (160, 100) and frame.pixels.dtype == np.uint16
    blocks = raw.reshape(160, 2, 100, 2).mean((1, 3))
    assert np.abs(frame.pixels - blocks).max() <= 0.5
    columns = frame.columns
    assert (columns["original_rows"], columns["original_columns"]) == (320, 200)
    assert (columns["spacing_row_mm"], columns["spacing_column_mm"]) == (0.2, 0.4)


def _region(left, top, right, bottom, kind=1):
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = kind, 1, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX, item.PhysicalDeltaY = 0.02, -0.03
    return item


def test_ultrasound_is_cropped_to_its_largest_tissue_region(tmp_path):
    raw = grey("uint8", 8, (120, 160))
    regions = [_region(0, 0, 159, 119, kind=3), _region(10, 20, 69, 79), _region(80, 20, 120, 60)]
    path = write(tmp_path / "f", raw, "US", 8, SequenceOfUltrasoundRegions=Sequence(regions))
    frame = one(path)
    assert np.array_equal(frame.pixels, raw[20:80, 10:70])
    assert frame.columns["spacing_row_mm"] == pytest.approx(0.3)
    assert frame.columns["spacing_column_mm"] == pytest.approx(0.2)
    assert (frame.columns["original_rows"], frame.columns["original_columns"]) == (120, 160)


def test_a_cine_gives_at_most_n_frames_evenly_spread(tmp_path):
    clip = np.stack([grey("uint8", 8, seed=s) for s in range(10)])
    path = write(tmp_path / "f", clip, "US", 8, frames=True)
    frames = read(path, allow_burned_in=True, frames_per_cine=4)
    assert [f.index for f in frames] == [0, 2, 5, 7]
    assert all(np.array_equal(f.pixels, clip[f.index]) for f in frames)


def test_an_enhanced_object_gives_every_frame_with_its_own_geometry_and_rescale(tmp_path):
    volume = np.stack([grey("int16", 12, seed=s) for s in range(20)])
    groups = []
    for z in range(20):
        group = Dataset()
        position, values = Dataset(), Dataset()
        position.ImagePositionPatient = [1, 2, 3.5 * z]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, z, "HU"
        group.PlanePositionSequence = Sequence([position])
        group.PixelValueTransformationSequence = Sequence([values])
        groups.append(group)
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.6], 3.5
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([plane])
    path = write(
        tmp_path / "f",
        volume,
        "CT",
        12,
        frames=True,
        PerFrameFunctionalGroupsSequence=Sequence(groups),
        SharedFunctionalGroupsSequence=Sequence([shared]),
    )
    frames = read(path, frames_per_cine=4)
    assert [f.index for f in frames] == list(range(20))
    for z, frame in enumerate(frames):
        assert np.array_equal(frame.pixels, np.clip(volume[z].astype(int) + z, -1024, 32767))
        assert frame.columns["position_mm"] == [1, 2, 3.5 * z]
        assert frame.columns["orientation"] == [1, 0, 0, 0, 1, 0]
        assert (frame.columns["spacing_row_mm"], frame.columns["spacing_column_mm"]) == (0.5, 0.6)
        assert frame.columns["slice_thickness_mm"] == 3.5


def test_twelve_bit_jpeg_extended_is_read(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint16) * 16
    stream = bytes(imagecodecs.jpeg_encode(smooth, level=98, bitspersample=12))
    from pydicom.encaps import encapsulate

    path = write(tmp_path / "f", smooth, "CR", 12)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.51"
    data.PixelData = encapsulate([stream])
    data["PixelData"].is_undefined_length = True
    data.save_as(path)
    frame = one(path)
    assert np.abs(frame.pixels.astype(int) - smooth).max() < 24
    assert frame.columns["lossy_source"]


@pytest.mark.parametrize("syntax", ["4.201", "4.202", "4.203"])
def test_htj2k_is_read(tmp_path, syntax):
    imagecodecs = pytest.importorskip("imagecodecs")
    from pydicom.encaps import encapsulate

    pixels = grey("uint16", 12)
    path = write(tmp_path / "f", pixels)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.{syntax}"
    data.PixelData = encapsulate([bytes(imagecodecs.htj2k_encode(pixels, reversible=True))])
    data["PixelData"].is_undefined_length = True
    data.save_as(path)
    assert np.array_equal(one(path).pixels, pixels)


def test_every_encoder_of_this_test_is_really_used():
    """The oracle would be empty if the syntaxes fell back to one another."""
    assert (
        len({bytes(encode(grey("uint8", 8), 8, s)) for s in GREY if s.is_compressed and s.is_encapsulated})
        == 4
    )


def test_padding_beyond_the_stored_bits_is_air(tmp_path):
    raw = grey("uint16", 12)
    words = raw.copy()
    words[:8] = 63536  # -2000 in 16 bits, on an image of 12
    path = write(tmp_path / "f", words, "CT", 12, RescaleSlope=1, RescaleIntercept=-1024)
    data = pydicom.dcmread(path)
    data.add_new("PixelPaddingValue", "US", 63536)
    data.save_as(path)
    pixels = one(path).pixels
    assert (pixels[:8] == -1024).all() and np.array_equal(pixels[8:], raw[8:].astype(int) - 1024)


def test_overlay_bits_beside_the_padding_do_not_hide_it(tmp_path):
    raw = grey("uint16", 12) | 1
    raw[3, 3] = 0x8000
    path = write(tmp_path / "f", raw, "CT", 12, RescaleSlope=1, RescaleIntercept=500, PixelPaddingValue=0)
    assert one(path).pixels[3, 3] == -1024


@pytest.mark.parametrize("unit", ["MGML", "Z_EFF", "ED", "PCT"])
def test_ct_in_other_units_than_hounsfield_is_refused(tmp_path, unit):
    path = write(tmp_path / "f", None, "CT", RescaleSlope="0.01", RescaleIntercept=0, RescaleType=unit)
    assert one(path) == Refusal(Reason.DERIVED, -1, "ct")


@pytest.mark.parametrize("unit", ["HU", "HU_MOD", "US", "", None])
def test_ct_in_hounsfield_or_unnamed_units_is_taken(tmp_path, unit):
    more = {} if unit is None else {"RescaleType": unit}
    frame = one(write(tmp_path / "f", None, "CT", RescaleSlope=1, RescaleIntercept=-1024, **more))
    assert np.array_equal(frame.pixels, grey().astype(int) - 1024)


def test_ct_without_a_rescale_is_hounsfield_only_where_its_pixels_are_signed(tmp_path):
    signed = grey("int16", 12)
    frame = one(write(tmp_path / "s", signed, "CT"))
    assert np.array_equal(frame.pixels, np.clip(signed, -1024, None))
    assert one(write(tmp_path / "u", None, "CT")) == Refusal(Reason.BAD_PIXEL_DESCRIPTION, -1, "ct")


def test_an_empty_modality_lut_is_none(tmp_path):
    empty = {name: Sequence([]) for name in ("ModalityLUTSequence", "VOILUTSequence", "FrameVOILUTSequence")}
    window = {"RescaleSlope": 2, "RescaleIntercept": 10, "WindowCenter": 110, "WindowWidth": 40}
    frame = one(write(tmp_path / "f", grey(), "CR", **window, **empty))
    assert isinstance(frame, Frame) and np.array_equal(frame.pixels, grey())
    assert (frame.columns["rescale_slope"], frame.columns["window_center"]) == (2, 50)


def _voi_lut(table, first=0, as_bytes=True):
    lut = Dataset()
    lut.LUTDescriptor = [len(table), first, 16]
    if as_bytes:
        lut.add_new("LUTData", "OW", np.asarray(table, "<u2").tobytes())
    else:
        lut.add_new("LUTData", "US", [int(v) for v in table])
    return lut


@pytest.mark.parametrize("as_bytes", [True, False])
def test_of_a_voi_lut_the_rising_part_is_the_window(tmp_path, as_bytes):
    table = np.concatenate([np.zeros(100), np.linspace(0, 4095, 512), np.full(388, 4095)]).astype(int)
    luts = Sequence([_voi_lut(table, 50, as_bytes)])
    columns = one(write(tmp_path / "f", grey(), "DX", VOILUTSequence=luts)).columns
    # The last input of the lowest output and the first one of the highest: 50 + 100 and 50 + 611.
    assert (columns["window_center"], columns["window_width"]) == ((150 + 661 + 1) / 2, 512)
    assert columns["window_function"] == "LINEAR"
    inverse = one(write(tmp_path / "i", grey(), "DX", photometric="MONOCHROME1", VOILUTSequence=luts)).columns
    assert inverse["window_center"] == 4095 - columns["window_center"]
    both = one(write(tmp_path / "b", VOILUTSequence=luts, WindowCenter=7, WindowWidth=9)).columns
    assert (both["window_center"], both["window_width"]) == (7, 9)


def test_a_voi_lut_that_makes_no_sense_gives_no_window(tmp_path):
    lying = _voi_lut([0, 1, 2])
    lying.LUTDescriptor = [5000, 0, 16]
    for lut in (Dataset(), _voi_lut([5, 4, 3]), _voi_lut([1, 1]), lying):
        frame = one(write(tmp_path / "f", grey(), "DX", VOILUTSequence=Sequence([lut])))
        assert frame.columns.get("window_center") is None


def test_a_ct_in_false_colours_is_no_image_in_hounsfield_units(tmp_path):
    elements = {}
    for name in ("Red", "Green", "Blue"):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"{name}PaletteColorLookupTableData"] = bytes(range(256))
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    path = write(
        tmp_path / "f", grey("uint8", 8), "CT", 8, photometric="PALETTE COLOR", **elements, **rescale
    )
    assert one(path) == Refusal(Reason.DERIVED, -1, "ct")


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("kind", ["OB", "OW"])
def test_bytes_in_big_endian_words_are_swapped_back(tmp_path, planar, kind):
    clip = np.stack([grey("uint8", 8, (41, 35), seed=s) for s in range(3)])
    path = write(tmp_path / "f", clip, "MR", 8, ExplicitVRBigEndian, frames=True)
    raw = clip.tobytes() + b"\0"
    data = pydicom.dcmread(path)
    swapped = np.frombuffer(raw, ">u2").astype("<u2").tobytes()
    data.add_new("PixelData", kind, raw if kind == "OB" else swapped)
    data.PlanarConfiguration = planar
    data.save_as(path)
    assert np.array_equal(pydicom.dcmread(path).pixel_array, clip)
    assert all(np.array_equal(f.pixels, clip[f.index]) for f in read(path))


@pytest.mark.parametrize(
    "padding", [{}, {"PixelPaddingValue": 63536}, {"PixelPaddingValue": 7, "PixelPaddingRangeLimit": 90}]
)
@pytest.mark.parametrize("high", [11, 15])
@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("slope", [1.0, 0.73])
def test_hounsfield_units_are_the_same_looked_up_and_step_by_step(
    tmp_path, monkeypatch, padding, high, signed, slope
):
    words = np.random.default_rng(high).permutation(np.arange(1 << 17, dtype=np.uint32)).astype(np.uint16)
    path = write(
        tmp_path / "f",
        grey("uint16", 12, (256, 512)),
        "CT",
        12,
        RescaleSlope=str(slope),
        RescaleIntercept="-1000",
    )
    data = pydicom.dcmread(path)
    data.PixelData = words.tobytes()
    data.HighBit, data.PixelRepresentation = high, signed
    for name, value in padding.items():
        data.add_new(name, "US", value)
    data.save_as(path)
    quick = one(path)
    monkeypatch.setattr(pixels, "_by_table", lambda raw, dataset: False)
    steps = one(path)
    assert quick.pixels.dtype == steps.pixels.dtype == np.int16
    assert len(np.unique(quick.pixels)) > 1000 and np.array_equal(quick.pixels, steps.pixels)
