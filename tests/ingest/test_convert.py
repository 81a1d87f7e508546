"""A unit is a pure function of inputs, settings and key; every input is accounted for; nothing twice."""

import cv2
import numpy as np
import pyarrow.compute as pc
import pytest

from ingest import convert
from ingest.convert import dataset_info, run_unit
from ingest.deidentify import source_id
from shards import catalog
from shards.codec import get_codec
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.schema import Reason
from shards.store import Store
from shards.tar import ShardReader
from shards.verify import verify
from tests.ingest.files import NAMES, config, grey, ingest, tree, units, write


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "s"
    for number in range(3):
        write(folder / f"m{number}", grey(seed=number), number=number)
    write(folder / "c", grey("int16", 12), "CT", number=7, patient="P2")
    write(folder / "bad", number=8, patient="P2", Rows=4000)  # fewer pixels than that
    (folder / "note.txt").write_text("x")
    return folder


def test_equal_runs_give_equal_bytes_with_and_without_the_decoder_process(source, tmp_path):
    ingest(source, tmp_path / "a")
    ingest(source, tmp_path / "b", sandbox="process")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert not verify(tmp_path / "a", deep=True).problems


def test_every_input_is_a_sample_or_a_refusal(source, tmp_path):
    results = ingest(source, tmp_path / "a")
    assert sum(r.inputs for r in results) == 6
    samples = catalog.load(tmp_path / "a")
    refused = {row["source"]: row["reason"] for row in catalog.quarantine(tmp_path / "a").to_pylist()}
    assert samples.num_rows == 4
    assert refused == {
        source_id("bad", NAMES): Reason.UNREADABLE,
        source_id("note.txt", NAMES): Reason.NOT_AN_IMAGE,
    }
    assert set(samples["source"].to_pylist()) == {source_id(n, NAMES) for n in ("m0", "m1", "m2", "c")}


def test_the_stored_pixels_are_those_that_were_read(source, tmp_path):
    ingest(source, tmp_path / "a")
    reader = ShardReader(tmp_path / "a")
    for row in catalog.load(tmp_path / "a", "mr").to_pylist():
        data = reader.read("mr", row["shard"], row["offset"], row["size"])
        pixels = get_codec("htj2k").decode(data)
        seed = next(n for n in range(3) if source_id(f"m{n}", NAMES) == row["source"])
        assert np.array_equal(pixels, grey(seed=seed))
        assert (row["minimum"], row["maximum"]) == (0, 4095)


def test_a_committed_unit_is_not_done_again(source, tmp_path):
    first = ingest(source, tmp_path / "a")
    assert ingest(source, tmp_path / "a") == []
    settings = config(source, tmp_path / "a")
    before = tree(tmp_path / "a")
    again = run_unit(
        units(config(source, tmp_path / "b"))[0], settings, NAMES, tmp_path / "a", tmp_path / "t"
    )
    assert again.samples == first[0].samples and tree(tmp_path / "a") == before


def test_other_settings_are_refused_by_name(source, tmp_path):
    ingest(source, tmp_path / "a")
    settings = config(source, tmp_path / "a", xr_max_side=800)
    with pytest.raises(UserError, match=r"xr_max_side was 1200, now 800"):
        open_or_create(Store(tmp_path / "a"), dataset_info(settings, NAMES))


def test_more_files_later_are_converted_alone(source, tmp_path):
    ingest(source, tmp_path / "a")
    keys = set(catalog.load(tmp_path / "a")["key"].to_pylist())
    write(source / "later", grey(seed=9), number=9)
    results = ingest(source, tmp_path / "a")
    assert [r.inputs for r in results] == [1]
    now = catalog.load(tmp_path / "a")["key"].to_pylist()
    assert keys < set(now) and len(now) == len(set(now)) == 5


def test_duplicates_are_kept_once_and_collisions_quarantined(tmp_path):
    folder = tmp_path / "s"
    write(folder / "a", grey(seed=1), number=1, ImagePositionPatient=[0, 0, 1])
    write(folder / "b", grey(seed=1), number=1, ImagePositionPatient=[0, 0, 1])  # the same again
    write(folder / "c", grey(seed=2), number=1)  # same UID, other pixels
    write(folder / "d", grey(seed=1), number=2, ImagePositionPatient=[0, 0, 1])  # other UID, same image
    write(folder / "e", grey(seed=1), number=3, ImagePositionPatient=[0, 0, 2])  # same pixels elsewhere
    ingest(folder, tmp_path / "out")
    rows = {r["source"]: r["reason"] for r in catalog.quarantine(tmp_path / "out").to_pylist()}
    assert rows == {
        source_id("b", NAMES): Reason.DUPLICATE,
        source_id("c", NAMES): Reason.UID_COLLISION,
        source_id("d", NAMES): Reason.DUPLICATE,
    }
    kept = catalog.load(tmp_path / "out")["source"].to_pylist()
    assert sorted(kept) == sorted(source_id(name, NAMES) for name in "ae")


def test_listed_images_take_modality_patient_and_split_of_their_table(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    wide = grey("uint16", 16, (60, 50))
    cv2.imwrite(str(folder / "a.png"), wide)
    cv2.imwrite(str(folder / "b.tif"), grey("uint8", 8, seed=1))
    cv2.imwrite(str(folder / "c.png"), np.stack([grey("uint8", 8, seed=s) for s in range(3)], -1))
    cv2.imwrite(str(folder / "d.png"), np.stack([grey("uint8", 8, seed=4)] * 3, -1))
    cv2.imwrite(str(folder / "e.png"), grey("uint8", 8, seed=5))
    (folder / "f.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    table = folder / "list.csv"
    lines = ["file,modality,patient,split", "a.png,X-ray,P1,test", "b.tif,CT,P1,test", "c.png,US,P2,train"]
    table.write_text("\n".join([*lines, "d.png,MR,P3,val", "f.png,MR,P3,val", "gone.png,MR,P4,val"]) + "\n")
    tables = [{"path": str(table), "split_column": "split"}]
    ingest(folder, tmp_path / "out", tables=tables)
    rows = {r["modality"]: r for r in catalog.load(tmp_path / "out").to_pylist()}
    assert {m: r["split"] for m, r in rows.items()} == {
        "xr": "test",
        "ct": "test",
        "us": "train",
        "mr": "val",
    }
    assert rows["xr"]["patient"] == rows["ct"]["patient"] == NAMES.id("patient", "P1")
    assert (rows["xr"]["dtype"], rows["xr"]["rows"], rows["xr"]["columns"]) == ("uint16", 60, 50)
    assert (rows["xr"]["minimum"], rows["xr"]["maximum"]) == (wide.min(), wide.max())
    assert rows["us"]["was_color"] and not rows["mr"]["was_color"]
    reasons = {r["source"]: r["reason"] for r in catalog.quarantine(tmp_path / "out").to_pylist()}
    assert reasons == {
        source_id("e.png", NAMES): Reason.NOT_LISTED,
        source_id("f.png", NAMES): Reason.UNREADABLE,
        source_id("gone.png", NAMES): Reason.SOURCE_MISSING,
    }


def test_no_patient_crosses_splits_and_files_without_one_are_kept_apart(tmp_path):
    folder = tmp_path / "s"
    for number in range(12):
        write(folder / f"{number}", grey(seed=number), number=number, patient=f"P{number % 4}")
    write(folder / "x", grey(seed=50), number=50, patient="", StudyInstanceUID="1.2.9")
    write(folder / "y", grey(seed=51), number=51, patient="", StudyInstanceUID="1.2.9")
    write(folder / "z", grey(seed=52), number=52, patient="", StudyInstanceUID="")
    ingest(folder, tmp_path / "out")
    table = catalog.load(tmp_path / "out")
    splits = table.group_by("patient").aggregate([("split", "count_distinct")])
    assert pc.max(splits["split_count_distinct"]).as_py() == 1
    assert splits.num_rows == 6


def test_a_file_that_breaks_our_own_code_is_refused_alone_and_without_its_text(source, tmp_path, monkeypatch):
    real = convert.make_row

    def odd(frame, entry, *rest):
        row = real(frame, entry, *rest)
        if entry.relative == "m0":
            raise ValueError("Quillfeather")
        return row | ({"echo_number": 2**40} if entry.relative == "m1" else {})  # no int32

    monkeypatch.setattr(convert, "make_row", odd)
    ingest(source, tmp_path / "a")
    rows = {r["source"]: (r["frame"], r["reason"]) for r in catalog.quarantine(tmp_path / "a").to_pylist()}
    assert rows[source_id("m0", NAMES)] == rows[source_id("m1", NAMES)] == (-1, Reason.CRASHED)
    kept = set(catalog.load(tmp_path / "a")["source"].to_pylist())
    assert kept == {source_id("m2", NAMES), source_id("c", NAMES)}
    assert not any(b"Quillfeather" in data for data in tree(tmp_path / "a").values())


@pytest.mark.parametrize("error", [UserError("no codec"), OSError("no memory for a child")])
def test_what_is_wrong_with_this_machine_is_not_held_against_a_file(source, tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(convert, "make_row", broken)
    with pytest.raises(type(error)):
        ingest(source, tmp_path / "a")


def test_numbers_that_json_lacks_are_missing_values(source, tmp_path, monkeypatch):
    real = convert.make_row

    def odd(frame, *rest):
        frame.columns |= {"kvp": float("nan"), "position_mm": [0.0, float("inf"), 0.0], "echo_time_ms": 2.0}
        return real(frame, *rest)

    monkeypatch.setattr(convert, "make_row", odd)
    ingest(source, tmp_path / "a")
    rows = catalog.load(tmp_path / "a").to_pylist()
    assert len(rows) == 4
    assert all((r["kvp"], r["position_mm"], r["echo_time_ms"]) == (None, None, 2.0) for r in rows)


@pytest.mark.parametrize("sandbox", ["inline", "process"])
def test_identifiers_that_are_no_text_get_a_pseudonym_too(tmp_path, sandbox):
    folder = tmp_path / "s"
    write(folder / "good", grey(seed=1), number=1)
    path = write(folder / "odd", number=2, SpecificCharacterSet="raw_unicode_escape", PatientID="~ud800X")
    path.write_bytes(path.read_bytes().replace(b"~ud800X", b"\\ud800X"))
    ingest(folder, tmp_path / "out", sandbox=sandbox)
    patients = {r["source"]: r["patient"] for r in catalog.load(tmp_path / "out").to_pylist()}
    assert patients == {
        source_id("good", NAMES): NAMES.id("patient", "P1"),
        source_id("odd", NAMES): NAMES.id("patient", "\ud800X"),
    }
    assert not verify(tmp_path / "out", deep=True).problems
