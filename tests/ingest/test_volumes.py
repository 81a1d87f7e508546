"""Series become volume samples beside their slices, exactly once; broken ones stay slices, with a reason."""

import json
import random
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import webdataset
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ingest.config import load_config
from ingest.convert import run_unit
from ingest.dicom.volume import volumes
from ingest.labels import join_labels
from shards import catalog
from shards.codec import get_codec
from shards.commit import list_commits, sweep
from shards.errors import UserError
from shards.objects import open_store
from shards.schema import VOLUME_COLUMNS, VOLUME_LOCATION_COLUMNS
from shards.tar import ShardReader
from shards.verify import verify
from shards.volumes import read_slab
from tests.ingest.files import NAMES, config, grey, ingest, tree, units, write
from tests.ingest.test_volume_geometry import stack, turned

BOTH = {"outputs": ("slices", "volumes")}


def slice_of(folder: Path, number: int, z: float, seed: int | None = None, **elements) -> np.ndarray:
    """One CT slice at z mm; its HU, which tell the place."""
    values = grey("int16", 12, seed=number if seed is None else seed)
    given = {
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "ImagePositionPatient": [-10.0, 5.5, z],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.7, 0.6],
        "FrameOfReferenceUID": "1.2.9",
    } | elements
    known = {name: value for name, value in given.items() if value is not None}
    write(folder / f"f{number}", values, "CT", number=number, **known)
    return np.clip(values, -1024, 32767)


def series(folder: Path, places, first: int = 0, **elements) -> dict[float, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    return {z: slice_of(folder, first + n, z, **elements) for n, z in enumerate(places)}


def slab(root: Path, row, *given) -> np.ndarray:
    reader = ShardReader(root)
    try:
        return read_slab(reader, row, *given)
    finally:
        reader.close()


def refusals(root: Path) -> list[tuple[str, str, str]]:
    rows = catalog.quarantine(root).to_pylist()
    return sorted((row["kind"], row["modality"], row["reason"]) for row in rows)


def test_a_series_is_a_volume_in_the_order_of_its_places_beside_its_slices(tmp_path):
    order = [5.0, 0.0, 7.5, 2.5, 10.0]
    pixels = series(tmp_path / "s", order)
    (result,) = ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    assert result.samples == {"ct": 5, "ct_volumes": 1} and result.reasons == {}
    (row,) = catalog.load(tmp_path / "out", "ct_volumes").to_pylist()
    expected = np.stack([pixels[z] for z in sorted(order)])
    assert np.array_equal(slab(tmp_path / "out", row), expected)
    assert row["spacing_slice_mm"] == 2.5 and row["position_mm"] == [-10.0, 5.5, 0.0]
    assert row["affine"] == [0, 0, 0.6, -10, 0, 0.7, 0, 5.5, 2.5, 0, 0, 0]
    assert row["regularly_spaced_3d_volume"] and row["gantry_tilt_degrees"] == 0 == row["obliquity_degrees"]
    assert (row["mean"], row["std"]) == pytest.approx((expected.mean(), expected.std()))
    assert (row["minimum"], row["maximum"]) == (expected.min(), expected.max())
    slices = {r["key"]: r for r in catalog.load(tmp_path / "out", "ct").to_pylist()}
    linked = [slices[key] for key in row["slice_keys"]]
    assert [r["slice_index"] for r in linked] == [0, 1, 2, 3, 4]
    assert {r["volume"] for r in linked} == {row["key"]} and {r["split"] for r in linked} == {row["split"]}
    assert [r["position_mm"][2] for r in linked] == sorted(order)
    assert verify(tmp_path / "out", deep=True).clean
    assert catalog.counts(tmp_path / "out").keys() == {"ct"}
    (counted,) = catalog.counts(tmp_path / "out", volumes=True).values()
    assert sum(counted.values()) == 1 and len(catalog.load(tmp_path / "out")) == 5


def test_a_slab_is_read_without_the_other_slices_and_at_lower_resolution(tmp_path, monkeypatch):
    pixels = series(tmp_path / "s", range(6))
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    (row,) = catalog.load(tmp_path / "out", "ct_volumes").to_pylist()
    spans = []
    read = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda *a: spans.append(a[-1]) or read(*a))
    assert np.array_equal(slab(tmp_path / "out", row, 2, 4), np.stack([pixels[2], pixels[3]]))
    assert len(spans) == 1 and spans[0] < sum(row["sizes"][2:4]) + 2 * 512
    half = slab(tmp_path / "out", row, 5, 6, 1)
    assert half.shape == (1, 24, 20) and half.dtype == np.int16
    for empty in ((2, 2), (-1, 2), (0, 7)):
        with pytest.raises(IndexError, match="6 slices"):
            slab(tmp_path / "out", row, *empty)


def test_the_tar_of_a_volume_is_one_webdataset_sample_that_holds_the_allow_list_only(tmp_path):
    pixels = series(tmp_path / "s", range(3))
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    (shard,) = (tmp_path / "out" / "shards" / "ct_volumes").iterdir()
    (sample,) = webdataset.WebDataset(str(shard), shardshuffle=False)
    decode = get_codec("htj2k").decode
    assert all(np.array_equal(decode(sample[f"{n:04d}.j2c"]), pixels[n]) for n in range(3))
    assert set(json.loads(sample["json"])) == {c.name for c in VOLUME_COLUMNS} - VOLUME_LOCATION_COLUMNS


@pytest.mark.parametrize(
    ("places", "reason"),
    [([0, 1, 2, 4, 5], "volume_uneven"), ([0, 1, 2, 2.001, 3], "volume_repeated_position")],
)
def test_slices_of_a_broken_volume_stay_samples_and_the_stack_has_a_reason(tmp_path, places, reason):
    series(tmp_path / "s", places)
    (result,) = ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    assert result.samples == {"ct": 5} and result.reasons == {reason: 1}
    assert refusals(tmp_path / "out") == [("volume", "ct", reason)]
    rows = catalog.load(tmp_path / "out", "ct").to_pylist()
    assert {(r["volume"], r["slice_index"]) for r in rows} == {(None, None)}
    assert verify(tmp_path / "out", deep=True).clean


def test_a_stack_of_which_some_slices_have_no_place_is_refused_and_one_without_any_is_not_asked(tmp_path):
    series(tmp_path / "s", range(4))
    slice_of(tmp_path / "s", 9, 9.0, ImagePositionPatient=None)
    for number in (20, 21):
        bare = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "SeriesInstanceUID": "1.77"}
        slice_of(tmp_path / "s", number, 0.0, **bare)
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    assert refusals(tmp_path / "out") == [("volume", "ct", "volume_without_geometry")]
    assert len(catalog.load(tmp_path / "out")) == 7


def test_a_tilted_stack_is_a_volume_whose_flags_and_sheared_affine_say_so(tmp_path):
    (tmp_path / "s").mkdir()
    for n in range(4):
        slice_of(tmp_path / "s", n, 2.0 * n, ImagePositionPatient=[0.0, 0.5 * n, 2.0 * n])
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    (row,) = catalog.load(tmp_path / "out", "ct_volumes").to_pylist()
    assert not row["regularly_spaced_3d_volume"] and not row["consistent_in_plane"]
    assert row["gantry_tilt_degrees"] == pytest.approx(np.degrees(np.arctan(0.25)), abs=1e-5)
    assert np.reshape(row["affine"], (3, 4))[:, 0].tolist() == [0.0, 0.5, 2.0]


def test_time_points_and_patients_are_volumes_of_their_own_and_a_lone_slice_is_none(tmp_path):
    series(tmp_path / "s", range(3), TemporalPositionIdentifier=1)
    series(tmp_path / "s", range(3), first=10, TemporalPositionIdentifier=2)
    series(tmp_path / "s", range(3), first=20, patient="P2", SeriesInstanceUID="1.2.3.200.1")
    series(tmp_path / "s", [50], first=30, SeriesInstanceUID="1.5")
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    rows = catalog.load(tmp_path / "out", "ct_volumes").to_pylist()
    assert [row["slices"] for row in rows] == [3, 3, 3] and refusals(tmp_path / "out") == []
    assert Counter(row["patient"] for row in rows) == {
        NAMES.id("patient", "P1"): 2,
        NAMES.id("patient", "P2"): 1,
    }
    loose = [r for r in catalog.load(tmp_path / "out").to_pylist() if r["volume"] is None]
    assert [r["position_mm"][2] for r in loose] == [50.0]


def group(**elements) -> Dataset:
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return item


def test_the_frames_of_an_enhanced_object_are_volumes_by_their_functional_groups(tmp_path):
    (tmp_path / "s").mkdir()
    frames = np.stack([grey(seed=n) for n in range(6)])
    shared = group(
        PixelMeasuresSequence=Sequence([group(PixelSpacing=[0.5, 0.5], SliceThickness=2)]),
        PlaneOrientationSequence=Sequence([group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
    )
    each = [  # two time points, the slices of each from the top to the bottom
        group(
            PlanePositionSequence=Sequence([group(ImagePositionPatient=[0, 0, -2.0 * (n % 3)])]),
            FrameContentSequence=Sequence([group(TemporalPositionIndex=1 + n // 3)]),
        )
        for n in range(6)
    ]
    write(
        tmp_path / "s" / "e",
        frames,
        "MR",
        frames=True,
        SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1",
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(each),
    )
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    rows = catalog.load(tmp_path / "out", "mr_volumes").to_pylist()
    found = sorted((slab(tmp_path / "out", row).tolist() for row in rows), key=str)
    expected = [frames[[2, 1, 0]], frames[[5, 4, 3]]]
    assert found == sorted((e.tolist() for e in expected), key=str)


def test_nifti_is_a_volume_for_each_time_point_and_none_without_form_codes(tmp_path):
    (tmp_path / "s").mkdir()
    voxels = np.random.default_rng(1).integers(0, 4000, (40, 48, 5, 2)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, np.diag([0.8, 0.9, 3.0, 1.0]))
    nibabel.save(image, tmp_path / "s" / "a.nii.gz")
    bare = nibabel.Nifti1Image(voxels[..., 0] + 1, None)
    bare.header.set_sform(None, 0)
    bare.header.set_qform(None, 0)
    nibabel.save(bare, tmp_path / "s" / "b.nii")
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    rows = catalog.load(tmp_path / "out", "mr_volumes").to_pylist()
    assert [row["slices"] for row in rows] == [5, 5] and refusals(tmp_path / "out") == []
    assert len(catalog.load(tmp_path / "out")) == 15
    times = [slab(tmp_path / "out", row) for row in rows]
    # Rows run to the back and columns to the left of the patient: both axes of the file turned.
    wanted = [voxels[::-1, ::-1, :, t].transpose(2, 1, 0) for t in range(2)]
    assert any(np.array_equal(times[0], w) for w in wanted)
    assert any(np.array_equal(times[1], w) for w in wanted) and not np.array_equal(*times)
    for row in rows:  # LPS: the first voxel kept is the last of the file in x and y
        matrix = np.reshape(row["affine"], (3, 4))
        assert np.allclose(matrix @ [0, 0, 0, 1], [-39 * 0.8, -47 * 0.9, 0.0], atol=1e-4)
        assert np.allclose(matrix @ [4, 47, 39, 1], [0.0, 0.0, 12.0], atol=1e-4)


def test_volumes_are_the_same_bytes_whatever_the_order_of_files_and_after_a_kill(tmp_path):
    for name, places in (("a", range(4)), ("b", [0, 1, 3])):
        series(tmp_path / "s" / name, places, first=10 * len(name), SeriesInstanceUID=f"1.{ord(name)}")
    ingest(tmp_path / "s", tmp_path / "one", **BOTH)
    settings = config(tmp_path / "s", tmp_path / "two", **BOTH)
    (unit,) = units(settings)
    killed = type("Killed", (BaseException,), {})

    class Store(type(open_store(tmp_path / "two"))):
        def create(self, *_):
            raise killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(killed):
        patch.setattr("ingest.convert.open_store", lambda _: Store(tmp_path / "two"))
        run_unit(unit, settings, NAMES, tmp_path / "two", tmp_path / "scratch")
    assert list_commits(open_store(tmp_path / "two")) == []
    assert any("ct_volumes" in name for name in sweep(open_store(tmp_path / "two"), dry_run=True))
    run_unit(unit, settings, NAMES, tmp_path / "two", tmp_path / "scratch")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("distances", [range(6), range(5, -1, -1), [4, 1, 3, 0, 5, 2]])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (25, -10, 40)])
def test_the_volume_on_disk_is_the_one_that_highdicom_builds(tmp_path, degrees, distances):
    highdicom = pytest.importorskip("highdicom")
    across_down = turned(*degrees)
    (tmp_path / "s").mkdir()
    for number, place in enumerate(stack(across_down, distances)):
        place_of = {"ImagePositionPatient": [round(v, 6) for v in place.position]}
        slice_of(tmp_path / "s", number, 0, ImageOrientationPatient=list(across_down), **place_of)
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    (row,) = catalog.load(tmp_path / "out", "ct_volumes").to_pylist()
    datasets = [pydicom.dcmread(path) for path in (tmp_path / "s").iterdir()]
    theirs = highdicom.get_volume_from_series(datasets).flip_spatial(0)  # it stacks against the normal
    assert np.allclose(np.reshape(row["affine"], (3, 4)), theirs.affine[:3], atol=1e-4)
    assert np.array_equal(
        np.clip(slab(tmp_path / "out", row), -1024, None), np.clip(theirs.array, -1024, None)
    )


def test_hostile_geometry_gives_a_reason_and_no_error(tmp_path):
    wild = [
        {"ImagePositionPatient": [1e300, -1e300, 1e300]},
        {"ImageOrientationPatient": [1e200, 0, 0, 0, 1e200, 0]},
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"PixelSpacing": [1e-300, 1e300]},
    ]
    for number, elements in enumerate(wild):
        uid = {"SeriesInstanceUID": f"1.{number}"}
        for n in range(3):
            (tmp_path / "s").mkdir(exist_ok=True)
            slice_of(tmp_path / "s", 10 * number + n, float(n), **uid, **elements)
    (result,) = ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    assert result.samples["ct"] == 15
    assert set(result.reasons) <= {"volume_uneven", "volume_without_geometry", "volume_repeated_position"}
    assert verify(tmp_path / "out", deep=True).clean


def test_deep_verify_finds_a_volume_whose_slices_were_swapped(tmp_path):
    series(tmp_path / "s", range(3))
    ingest(tmp_path / "s", tmp_path / "out", **BOTH)
    (shard,) = (tmp_path / "out" / "shards" / "ct_volumes").iterdir()
    (row,) = catalog.load(tmp_path / "out", "ct_volumes").to_pylist()
    data = bytearray(shard.read_bytes())
    # Another codestream of the same length: one sample of the body changed.
    data[row["offsets"][1] + row["sizes"][1] // 2] ^= 0x10
    shard.write_bytes(data)
    found = {problem.code for problem in verify(tmp_path / "out", deep=True).problems}
    assert "sha256_differs" in found and found & {"pixels_differ", "decode_failed"}


def test_volumes_alone_are_refused_with_the_fix_and_mixed_settings_too(tmp_path):
    with pytest.raises(UserError, match="give slices,volumes"):
        load_config({"sources": ["a"], "output": "b", "outputs": ["volumes"]})
    series(tmp_path / "s", range(3))
    ingest(tmp_path / "s", tmp_path / "out")
    with pytest.raises(UserError, match="outputs was"):
        ingest(tmp_path / "s", tmp_path / "out", **BOTH)


def test_a_b_value_or_an_instance_tells_stacks_at_one_place_apart():
    shells = [s for b in ("0", "1000") for s in stack(passes=("", b, "z"))]
    random.Random(2).shuffle(shells)
    assert [len(v.slices) for v in volumes(shells)] == [8, 8]
    # What differs from slice to slice tells nothing.
    each = [s for n in range(4) for s in stack(distances=[n], passes=(str(n),))]
    assert [len(v.slices) for v in volumes(each + each)] == [8]


def test_labels_of_a_series_join_its_volume(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    series(source / "a", [0.0, 2.5, 5.0], patient="P1")
    series(source / "b", [0.0, 2.5, 5.0], first=10, patient="P2")
    slice_of(source / "b", 20, 90.0, patient="P3")  # in no volume
    ingest(source, out, **BOTH)
    table = tmp_path / "labels.csv"
    table.write_text("PatientID,label\nP1,bleeding\nP2,none\nP3,none\n")
    found = join_labels(out, table, NAMES, "volumes", of="volumes")
    assert found.schema.metadata[b"unmatched"] == b"1"
    patients = {row["key"]: row["patient"] for row in catalog.load(out, "ct_volumes").to_pylist()}
    joined = {patients[row["key"]]: row["label"] for row in catalog.labels(out, "volumes").to_pylist()}
    assert joined == {NAMES.id("patient", "P1"): "bleeding", NAMES.id("patient", "P2"): "none"}
    join_labels(out, table, NAMES, "slices")
    before = catalog.labels(out, "slices")
    for name, of in (("slices", "volumes"), ("volumes", "images")):
        with pytest.raises(UserError, match="choose another --name"):
            join_labels(out, table, NAMES, name, of=of)
    assert catalog.labels(out, "slices") == before
    join_labels(out, table, NAMES, "volumes", of="volumes")  # those of its own kind are replaced
    table.write_text("PatientID,label\nP1,bleeding\nP1,none\n")
    with pytest.raises(UserError, match=r"line 3 of labels\.csv: a volume has two labels"):
        join_labels(out, table, NAMES, "volumes", of="volumes")
    table.write_text("PatientID,label,frame\nP1,bleeding,0\n")
    for wrong in ({"of": "volumes"}, {"of": "series"}):
        with pytest.raises(UserError):
            join_labels(out, table, NAMES, "volumes", **wrong)
