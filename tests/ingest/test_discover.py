"""The inventory: every file once, by content, in a fixed order, and clear words for an unusable source."""

import os
import shutil
import zipfile

import cv2
import pytest

from ingest.discover import inventory, unchanged
from ingest.identity import content_of
from shards.errors import UserError
from tests.ingest.files import config, grey, write


def listed(source, **settings):
    return inventory(config(source, source / "out", **settings))


def test_content_decides_what_a_file_is(tmp_path):
    write(tmp_path / "s" / "picture.jpg")
    (tmp_path / "s" / "fake.dcm").write_text("no image")
    kinds = {entry.relative: entry.kind for entry in listed(tmp_path / "s")}
    assert kinds == {"picture.jpg": "dicom", "fake.dcm": "other"}


def test_empty_missing_and_useless_sources_are_named_as_such(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        listed(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        listed(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(UserError, match="no DICOM"):
        listed(tmp_path / "texts")


def test_the_output_and_loops_of_links_are_not_walked(tmp_path):
    source = tmp_path / "s"
    write(source / "a" / "f")
    (source / "out").mkdir()
    (source / "out" / "dataset.json").write_text("{}")
    (source / "a" / "loop").symlink_to(source)
    elsewhere = write(tmp_path / "elsewhere" / "g", number=2)
    (source / "linked").symlink_to(elsewhere.parent)
    assert sorted(e.relative for e in listed(source)) == ["a/f", "linked/g"]


def test_a_pipe_is_an_input_and_does_not_block(tmp_path):
    write(tmp_path / "s" / "f")
    os.mkfifo(tmp_path / "s" / "pipe")
    assert {e.relative: e.kind for e in listed(tmp_path / "s")}["pipe"] == "other"


def test_equal_files_of_two_sources_are_two_inputs(tmp_path):
    write(tmp_path / "a" / "f")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    settings = config(tmp_path / "a", tmp_path / "out", sources=[str(tmp_path / "a"), str(tmp_path / "b")])
    entries = inventory(settings)
    assert len({entry.identity for entry in entries}) == 2
    assert all(unchanged(entry) for entry in entries)
    overlapping = config(
        tmp_path, tmp_path / "out", sources=[str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "f")]
    )
    assert len(inventory(overlapping)) == 2


def test_a_changed_file_is_noticed(tmp_path):
    path = write(tmp_path / "s" / "f")
    entry = listed(tmp_path / "s")[0]
    assert unchanged(entry)
    write(path, grey(seed=1), patient="P2")
    assert not unchanged(entry)


def test_images_count_only_where_a_table_lists_them(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        cv2.imwrite(str(source / name), grey("uint8", 8))
    with pytest.raises(UserError, match="table"):
        listed(source)
    (source / "images.csv").write_text("file,modality,patient\na.png,CR,P1\nb.png,PT,P2\n")
    entries = {e.relative: e for e in listed(source)}
    assert set(entries) == {"a.png", "b.png", "c.png"}  # the table is no input
    assert entries["a.png"].modality == "xr" and entries["a.png"].patient == "P1"
    assert entries["b.png"].modality == "none" and entries["b.png"].listed
    assert entries["c.png"].hint == "not_listed"


def test_tables_that_cannot_be_used_are_named(tmp_path):
    source = tmp_path / "s"
    write(source / "f")
    table = tmp_path / "t.csv"
    cases = {
        "file,x\na,b\n": "modality",
        "name,modality\na,CT\n": "file_column",
        "file,modality,split\na,CT,holdout\n": "split",
    }
    for content, message in cases.items():
        table.write_text(content)
        with pytest.raises(UserError, match=message):
            listed(
                source, tables=[{"path": str(table), "split_column": "split" if "split" in content else None}]
            )


def test_the_subject_of_a_bids_path_is_the_patient(tmp_path):
    import nibabel
    import numpy as np

    source = tmp_path / "s"
    for relative in ("sub-01/anat/T1w.nii", "sub-01/anat/T2w.nii", "sub-02_bold.nii", "loose.nii"):
        path = source / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(grey("int16", 12, (40, 40, 2)), np.eye(4)), path)
    patients = {e.relative: e.patient for e in listed(source)}
    assert patients == {
        "sub-01/anat/T1w.nii": "01",
        "sub-01/anat/T2w.nii": "01",
        "sub-02_bold.nii": "02",
        "loose.nii": "",
    }


def nifti(path, seed):
    import nibabel
    import numpy as np

    values = np.zeros((64, 64, 8), np.int16)
    values[8:56, 8:56, 2:] = np.random.default_rng(seed).integers(0, 900, (48, 48, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def test_another_nifti_with_the_same_name_size_and_head_is_another_input(tmp_path):
    one, two = nifti(tmp_path / "a" / "T1.nii", 1), nifti(tmp_path / "b" / "T1.nii", 2)
    assert one.read_bytes()[:4096] == two.read_bytes()[:4096]
    first, second = listed(tmp_path / "a")[0], listed(tmp_path / "b")[0]
    assert first.identity != second.identity and unchanged(first)
    one.write_bytes(two.read_bytes())
    assert not unchanged(first)


def test_a_large_file_is_told_apart_by_its_end_and_by_blocks_between(tmp_path):
    size = 4 << 20
    for place in (size - 1, size // 2):
        data = bytearray(size)
        path = tmp_path / f"{place}"
        path.write_bytes(data)
        before = content_of(str(path), size, bytes(4096), "nifti")
        data[place] = 1
        path.write_bytes(data)
        assert content_of(str(path), size, bytes(4096), "nifti") != before


@pytest.mark.parametrize("equal", [False, True])
def test_the_order_and_the_number_of_sources_change_no_identity(tmp_path, equal):
    nifti(tmp_path / "a" / "T1.nii", 1)
    nifti(tmp_path / "b" / "T1.nii", 1 if equal else 2)

    def of(*names):
        sources = [str(tmp_path / name) for name in names]
        return inventory(config(tmp_path, tmp_path / "out", sources=sources))

    def identities(*names):
        return {(e.source, e.identity) for e in of(*names)}

    assert identities("a", "b") == identities("b", "a")
    assert {e.identity for e in of("a")} < {e.identity for e in of("b", "a")}
    assert {e.source for e in of("a", "b")} == {"a//T1.nii", "b//T1.nii"}
    assert [e.source for e in of("a")] == ["T1.nii"]


def test_a_source_that_is_a_link_takes_its_tables_along(tmp_path):
    (tmp_path / "real").mkdir()
    cv2.imwrite(str(tmp_path / "real" / "1.png"), grey("uint8", 8))
    (tmp_path / "real" / "images.csv").write_text("file,modality\n1.png,CR\n")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [(e.relative, e.modality) for e in listed(tmp_path / "link")] == [("1.png", "xr")]


def test_a_listed_file_that_is_not_there_is_a_refused_input(tmp_path):
    write(tmp_path / "s" / "f")
    (tmp_path / "s" / "images.csv").write_text("file,modality\nx/absent.png,CR\n")
    hints = {entry.relative: entry.hint for entry in listed(tmp_path / "s")}
    assert hints == {"f": "", "x/absent.png": "source_missing"}


@pytest.mark.parametrize("content", [b"name\nM\xfcller\n", b"a,b\n1,2\n", None])
def test_a_found_table_that_cannot_be_used_is_an_input_like_others(tmp_path, content):
    write(tmp_path / "s" / "f")
    table = tmp_path / "s" / "images.csv"
    table.write_bytes(content) if content else table.symlink_to("/nonexistent")
    assert {e.relative: e.hint for e in listed(tmp_path / "s")} == {"f": "", "images.csv": "not_an_image"}


def test_a_patient_in_two_splits_of_a_table_is_refused(tmp_path):
    write(tmp_path / "s" / "f")
    table = tmp_path / "t.csv"
    table.write_text("file,modality,patient,split\na.png,CR,P,train\nb.png,CR,P,test\n")
    with pytest.raises(UserError, match="two splits"):
        listed(tmp_path / "s", tables=[{"path": str(table), "split_column": "split"}])


def test_the_split_of_a_table_is_that_of_the_patient_for_all_files_listed_or_not(tmp_path):
    source = tmp_path / "s"
    for relative in ("sub-01/T1w.nii", "sub-01/T2w.nii", "sub-02/T1w.nii"):
        nifti(source / relative, len(relative))
    for number, patient in enumerate(["P1", "P1", "P2"]):
        write(source / f"{number}.dcm", number=number, patient=patient)
    table = tmp_path / "t.csv"
    rows = ["s/sub-01/T1w.nii,mr,,test", "s/0.dcm,mr,P1,val"]
    table.write_text("\n".join(["file,modality,patient,split", *rows]) + "\n")
    tables = [{"path": str(table), "split_column": "split"}]
    splits = {e.relative: e.split for e in listed(source, tables=tables)}
    assert splits == {
        "sub-01/T1w.nii": "test",
        "sub-01/T2w.nii": "test",
        "sub-02/T1w.nii": "",
        "0.dcm": "val",
        "1.dcm": "val",
        "2.dcm": "",
    }
    with zipfile.ZipFile(tmp_path / "s" / "more.zip", "w") as archive:
        archive.write(source / "1.dcm", "again.dcm")
    assert {e.relative: e.split for e in listed(source, tables=tables)}["more.zip/again.dcm"] == "val"


@pytest.mark.parametrize("patient", ["P2", ""])
def test_a_split_of_a_dicom_file_under_another_patient_is_refused_not_dropped(tmp_path, patient):
    write(tmp_path / "s" / "0.dcm", patient="P1")
    table = tmp_path / "t.csv"
    table.write_text(f"file,modality,patient,split\ns/0.dcm,mr,{patient},test\n")
    with pytest.raises(UserError, match="not the patient of their headers"):
        listed(tmp_path / "s", tables=[{"path": str(table), "split_column": "split"}])


def test_a_named_patient_column_must_be_there_and_its_lack_is_told(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    cv2.imwrite(str(source / "1.png"), grey("uint8", 8))
    table = tmp_path / "t.csv"
    table.write_text("file,modality,person\ns/1.png,CR,P1\n")
    with pytest.raises(UserError, match=r"no column 'PatientID'.*patient_column"):
        listed(source, tables=[{"path": str(table), "patient_column": "PatientID"}])
    notes = []
    for column, patient in (("patient", ""), ("person", "P1"), (None, "")):
        chosen = config(source, tmp_path / "o", tables=[{"path": str(table), "patient_column": column}])
        assert [e.patient for e in inventory(chosen, note=notes.append)] == [patient]
    assert len(notes) == 2 and all(note.startswith("1 listed files have no patient") for note in notes)


@pytest.mark.parametrize(
    "line", ["file;modality;patient", "file\tmodality\tpatient", " file , modality,patient "]
)
def test_tables_of_spreadsheets_are_read_as_they_are_saved(tmp_path, line):
    source = tmp_path / "s"
    source.mkdir()
    cv2.imwrite(str(source / "1.png"), grey("uint8", 8))
    mark = next(m for m in ";\t," if m in line)
    (source / "images.csv").write_text(f"{line}\n1.png{mark}CR{mark}P1\n")
    assert [(e.relative, e.modality, e.patient) for e in listed(source)] == [("1.png", "xr", "P1")]


def test_a_table_with_a_zero_byte_is_no_table(tmp_path):
    write(tmp_path / "s" / "f")
    table = tmp_path / "t.csv"
    table.write_bytes(b"file,modality\na\0b.png,CR\n")
    with pytest.raises(UserError, match=r"t\.csv is not a CSV"):
        listed(tmp_path / "s", tables=[{"path": str(table)}])
