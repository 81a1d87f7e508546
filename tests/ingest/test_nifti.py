"""A NIfTI volume gives the same slices and the same geometry however its axes are stored."""

import gzip
import itertools
import struct

import nibabel
import numpy as np
import pytest

from ingest.frames import Frame, Refusal
from ingest.sniff import read_head, sniff
from shards.schema import Reason
from tests.ingest.files import one, read

SHAPE = (40, 48, 6)
AFFINE = np.array([[0.8, 0, 0, -16], [0, 0.9, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1.0]])


def volume(dtype="int16", shape=SHAPE):
    rng = np.random.default_rng(0)
    return rng.integers(-500 if dtype == "int16" else 0, 1000, shape).astype(dtype)


def save(path, data, affine=AFFINE, **fields):
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_slope_inter(1, 0)
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def frames(path, modality="mr", **rules):
    items = read(path, "nifti", modality, **rules)
    assert all(isinstance(i, Frame) for i in items), items
    return items


def test_slices_are_shown_as_dicom_shows_them(tmp_path):
    data = volume()
    found = frames(save(tmp_path / "v.nii", data))
    assert [f.index for f in found] == list(range(6))
    for z, frame in enumerate(found):
        assert np.array_equal(frame.pixels, data[::-1, ::-1, z].T)  # front on top, right side at the left
        assert frame.columns["orientation"] == pytest.approx([1, 0, 0, 0, 1, 0])  # LPS
        x, y = -16 + 0.8 * 39, -20 + 0.9 * 47
        assert frame.columns["position_mm"] == pytest.approx([-x, -y, 5 + 3 * z])
        assert frame.columns["spacing_row_mm"] == pytest.approx(0.9)
        assert frame.columns["spacing_column_mm"] == pytest.approx(0.8)
        assert frame.columns["slice_thickness_mm"] == pytest.approx(3.0)


@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=3)))
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2)])
def test_stored_axes_do_not_matter(tmp_path, axes, flips):
    data = volume()
    expected = frames(save(tmp_path / "v.nii", data))
    turned = nibabel.orientations.apply_orientation(data, np.stack([axes, flips], 1).astype(float))
    inverse = nibabel.orientations.inv_ornt_aff(np.stack([axes, flips], 1).astype(float), data.shape)
    for one_frame, other in zip(
        expected, frames(save(tmp_path / "t.nii", turned, AFFINE @ inverse)), strict=True
    ):
        assert np.array_equal(one_frame.pixels, other.pixels)
        assert other.columns["position_mm"] == pytest.approx(one_frame.columns["position_mm"], abs=1e-4)
        assert other.columns["orientation"] == pytest.approx(one_frame.columns["orientation"], abs=1e-6)


def test_slices_are_cut_as_they_were_acquired(tmp_path):
    sagittal = np.array([[0, 0, 4.0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])
    data = volume()
    found = frames(save(tmp_path / "v.nii", data, sagittal))
    assert len(found) == 6 and found[0].pixels.shape == (48, 40)
    assert np.array_equal(found[2].pixels, data[::-1, ::-1, 2].T)
    assert found[0].columns["orientation"] == pytest.approx([0, 1, 0, 0, 0, -1])


@pytest.mark.parametrize(
    ("dtype", "stored"), [("uint8", "uint8"), ("int16", "int16"), ("uint16", "uint16"), (">i2", "int16")]
)
def test_integers_stay_and_the_scale_is_a_column(tmp_path, dtype, stored):
    data = volume(dtype)
    found = frames(save(tmp_path / "v.nii", data, scl_slope=0.5, scl_inter=7))
    assert {f.pixels.dtype.name for f in found} <= {stored, "uint16"}
    assert np.array_equal(found[0].pixels, data[::-1, ::-1, 0].T)
    assert (found[0].columns["rescale_slope"], found[0].columns["rescale_intercept"]) == (0.5, 7)


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_a_slope_of_0_or_nan_is_none(tmp_path, slope):
    path = save(tmp_path / "v.nii", volume())
    raw = bytearray(path.read_bytes())
    struct.pack_into("<ff", raw, 112, slope, 3.0)
    path.write_bytes(raw)
    columns = frames(path)[0].columns
    assert (columns["rescale_slope"], columns["rescale_intercept"]) == (1, 0)


def test_floats_are_scaled_to_16_bits_and_back(tmp_path):
    data = np.random.default_rng(0).normal(0, 1e-3, SHAPE).astype(np.float32)
    data[0, 0, 0] = np.nan
    found = frames(save(tmp_path / "v.nii", data))
    for z, frame in enumerate(found):
        back = frame.pixels * frame.columns["rescale_slope"] + frame.columns["rescale_intercept"]
        truth = np.nan_to_num(data[::-1, ::-1, z].T, nan=np.nanmin(data))
        assert np.abs(back - truth).max() < np.ptp(np.nan_to_num(data)) / 65535


def test_ct_is_in_hounsfield_units(tmp_path):
    data = volume()
    found = frames(save(tmp_path / "v.nii", data, scl_slope=2, scl_inter=-100), "ct")
    expected = np.clip(2 * data[::-1, ::-1, 0].T.astype(int) - 100, -1024, 32767)
    assert np.array_equal(found[0].pixels, expected) and found[0].pixels.dtype == np.int16


def test_what_is_no_number_is_air_in_ct_whatever_the_slope(tmp_path):
    data = volume("float32")
    data[0, 0] = np.nan
    found = frames(save(tmp_path / "v.nii", data, scl_slope=0.5, scl_inter=10), "ct")
    assert {int(frame.pixels[-1, -1]) for frame in found} == {-1024}


def test_without_an_orientation_there_is_no_geometry(tmp_path):
    path = save(tmp_path / "v.nii", volume(), sform_code=0, qform_code=0)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<hh", raw, 252, 0, 0)
    path.write_bytes(raw)
    assert frames(path)[0].columns.get("position_mm") is None


def test_of_a_series_in_time_some_points_are_taken(tmp_path):
    data = volume(shape=(40, 48, 3, 10))
    found = frames(save(tmp_path / "v.nii", data), frames_per_cine=2)
    assert [f.index for f in found] == [0, 1, 2, 15, 16, 17]
    assert np.array_equal(found[4].pixels, data[::-1, ::-1, 1, 5].T)


@pytest.mark.parametrize("name", ["v.nii.gz", "v"])
def test_the_content_decides_not_the_name(tmp_path, name):
    plain = save(tmp_path / "x.nii", volume())
    path = tmp_path / name
    path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith("gz") else plain.read_bytes())
    assert sniff(read_head(path)) == "nifti"
    assert len(frames(path)) == 6


def test_labels_vectors_and_colours_are_refused(tmp_path):
    mask = (volume() > 300).astype(np.uint8)
    assert one(save(tmp_path / "mask.nii", mask), "nifti", "mr").reason == Reason.LABEL_MAP
    labelled = save(tmp_path / "label.nii", volume(), intent_code=1002)
    assert one(labelled, "nifti", "mr").reason == Reason.LABEL_MAP
    vectors = save(tmp_path / "vector.nii", volume(shape=(40, 48, 6, 1, 3)))
    assert one(vectors, "nifti", "mr").reason == Reason.LABEL_MAP
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, AFFINE), tmp_path / "rgb.nii")
    assert one(tmp_path / "rgb.nii", "nifti", "mr").reason == Reason.LABEL_MAP


def test_damage_and_lies_are_refused(tmp_path):
    raw = save(tmp_path / "v.nii", volume()).read_bytes()
    path = tmp_path / "cut.nii"
    for length in (340, 360, 1000, len(raw) - 1):
        path.write_bytes(raw[:length])
        assert one(path, "nifti", "mr").reason in (Reason.UNREADABLE, Reason.NOT_AN_IMAGE)
    path.write_bytes(gzip.compress(raw)[:-2000])
    assert one(path, "nifti", "mr").reason == Reason.UNREADABLE
    huge = bytearray(raw)
    struct.pack_into("<8h", huge, 40, 4, 32000, 32000, 32000, 3, 1, 1, 1)
    path.write_bytes(huge)
    assert one(path, "nifti", "mr").reason == Reason.TOO_LARGE
    tiny = save(tmp_path / "tiny.nii", volume(shape=(20, 30, 40)))
    assert one(tiny, "nifti", "mr").reason == Reason.TOO_SMALL


@pytest.mark.parametrize("large", [False, True])
def test_a_packed_file_that_was_damaged_is_refused_by_its_check_sum(tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr("ingest.nifti_file.IN_MEMORY_BYTES", 0)
    path = save(tmp_path / "v.nii", volume())
    packed = bytearray(
        gzip.compress(path.read_bytes(), 0)
    )  # stored: a changed voxel inflates without an error
    path.write_bytes(packed)
    assert len(frames(path)) == SHAPE[2]
    packed[len(packed) // 2] ^= 1
    path.write_bytes(packed)
    assert [item.reason for item in read(path, "nifti", "mr")] == [Reason.UNREADABLE]


def test_blank_slices_are_refused_one_by_one(tmp_path):
    data = volume()
    data[..., 0] = 0
    items = read(save(tmp_path / "v.nii", data), "nifti", "mr")
    assert items[0] == Refusal(Reason.CONSTANT, 0, "mr") and len(items) == 6


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -2.0, 0.0])
def test_a_voxel_size_that_is_no_length_is_a_missing_value(tmp_path, size):
    path = save(tmp_path / "v.nii", volume(), sform_code=0, qform_code=0)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, 80, size)  # pixdim[1]
    struct.pack_into("<hh", raw, 252, 0, 0)
    path.write_bytes(raw)
    columns = frames(path)[0].columns
    assert (columns["spacing_row_mm"], columns["spacing_column_mm"]) == (pytest.approx(0.9), None)


def test_a_range_beyond_all_numbers_is_refused(tmp_path):
    data = np.random.default_rng(0).normal(0, 1, SHAPE)
    data[0, 0, 0], data[1, 0, 0] = 1.7e308, -1.7e308
    assert one(save(tmp_path / "v.nii", data), "nifti", "mr").reason == Reason.BAD_PIXEL_DESCRIPTION


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e3), ("mm", 1), ("micron", 1e-3), ("unknown", 1)])
@pytest.mark.parametrize("oriented", [True, False])
def test_lengths_are_in_millimetres_whatever_the_unit_of_the_file(tmp_path, unit, factor, oriented):
    image = nibabel.Nifti1Image(volume(), AFFINE)
    image.header.set_xyzt_units(unit, "sec")
    nibabel.save(image, tmp_path / "v.nii")
    if not oriented:
        raw = bytearray((tmp_path / "v.nii").read_bytes())
        struct.pack_into("<hh", raw, 252, 0, 0)
        (tmp_path / "v.nii").write_bytes(raw)
    columns = frames(tmp_path / "v.nii")[2].columns
    assert columns["spacing_row_mm"] == pytest.approx(0.9 * factor)
    assert columns["slice_thickness_mm"] == pytest.approx(3.0 * factor)
    if oriented:
        assert columns["position_mm"][2] == pytest.approx(11 * factor)
        assert columns["orientation"] == pytest.approx([1, 0, 0, 0, 1, 0])


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=3)))
def test_a_volume_too_large_for_memory_gives_the_same_slices(tmp_path, monkeypatch, name, flips):
    data = volume(shape=(*SHAPE, 5))
    path = save(tmp_path / name, data, AFFINE @ np.diag([*flips, 1]))
    whole = {f.index: f for f in frames(path, frames_per_cine=3)}
    monkeypatch.setattr("ingest.nifti_file.IN_MEMORY_BYTES", 0)
    streamed = frames(path, frames_per_cine=3)
    assert sorted(f.index for f in streamed) == sorted(whole)
    for frame in streamed:
        assert np.array_equal(frame.pixels, whole[frame.index].pixels)
        assert frame.columns == whole[frame.index].columns
