"""Labels join by path or identifier through pseudonyms, and only classes get in."""

import cv2
import numpy as np
import pytest

from ingest.label_values import placed_box, placed_mask
from ingest.labels import join_labels
from shards import catalog
from shards.errors import UserError
from tests.ingest.files import NAMES, grey, ingest, write


@pytest.fixture
def made(tmp_path):
    source = tmp_path / "data" / "dicom"
    for number in range(3):
        write(source / "a" / f"{number}", grey(seed=number), number=number, patient=f"P{number}")
    out = tmp_path / "out"
    ingest(source, out)
    return source, out


def labels_of(out, name="labels"):
    table = catalog.labels(out, name).to_pylist()
    patients = {r["key"]: r["patient"] for r in catalog.load(out).to_pylist()}
    number = {NAMES.id("patient", f"P{n}"): n for n in range(3)}
    return {number[patients[row["key"]]]: row["label"] for row in table}


def test_labels_join_by_file_below_and_above_the_source(made):
    source, out = made
    inside = source / "labels.csv"
    inside.write_text("file,label,split\na/0,yes,train\na/1,no,test\na/7,yes,train\na/2,,val\n")
    table = join_labels(out, inside, NAMES)
    assert labels_of(out) == {0: "yes", 1: "no"}
    assert table.schema.metadata[b"unmatched"] == b"2"
    assert sorted(table["split"].to_pylist()) == ["test", "train"]
    above = source.parent / "labels.csv"
    above.write_text("file,label\ndicom/a/2,maybe\n")
    join_labels(out, above, NAMES, name="above", sources=[source])
    assert labels_of(out, "above") == {2: "maybe"}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("PatientID", "P1"),
        ("sop_instance_uid", "1.2.3.1"),
        ("SOPInstanceUID", "1.2.3.1"),
        ("SeriesInstanceUID", "1.2.3.200.1"),
    ],
)
def test_labels_join_by_original_identifier(made, tmp_path, column, value):
    table = tmp_path / "l.csv"
    table.write_text(f"{column},label\n{value},yes\nunknown,no\n")
    join_labels(made[1], table, NAMES)
    assert labels_of(made[1]) == {1: "yes"}
    for path in (made[1] / "labels").iterdir():
        assert value.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,grade\na/0,1\n", "label"),
        ("name,label\na/0,1\n", "file"),
        ("file,label\nb/0,1\n", "matches"),
        (f"file,label\na/0,{'report ' * 20}\n", "free text"),
    ],
)
def test_tables_that_cannot_be_joined_are_named(made, tmp_path, content, message):
    table = tmp_path / "l.csv"
    table.write_text(content)
    with pytest.raises(UserError, match=message):
        join_labels(made[1], table, NAMES)


def picture(folder, seed):
    folder.mkdir()
    cv2.imwrite(str(folder / "1.png"), grey("uint8", 8, seed=seed))
    (folder / "images.csv").write_text(f"file,modality,patient\n1.png,CR,P{seed}\n")
    (folder / "labels.csv").write_text(f"file,label\n1.png,class{seed}\n")
    return folder


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_labels_of_one_source_never_label_the_equal_path_of_another(tmp_path, swapped, given):
    a, b = picture(tmp_path / "a", 0), picture(tmp_path / "b", 1)
    order = [str(b), str(a)] if swapped else [str(a), str(b)]
    ingest(a, tmp_path / "out", sources=order)
    samples = catalog.load(tmp_path / "out").to_pylist()
    assert len({sample["source"] for sample in samples}) == 2
    for number, source in enumerate((a, b)):
        join_labels(tmp_path / "out", source / "labels.csv", NAMES, sources=[source] if given else [])
        assert labels_of(tmp_path / "out") == {number: f"class{number}"}


def test_a_path_of_two_sources_ingested_one_by_one_is_refused(tmp_path):
    a, b = picture(tmp_path / "a", 0), picture(tmp_path / "b", 1)
    for source in (a, b):
        ingest(source, tmp_path / "out")
    assert catalog.load(tmp_path / "out").num_rows == 2
    with pytest.raises(UserError, match="one of two"):
        join_labels(tmp_path / "out", a / "labels.csv", NAMES, sources=[a])


def joined(out, tmp_path, text, **settings):
    table = tmp_path / "t.csv"
    table.write_text(text)
    result = join_labels(out, table, NAMES, **settings)
    stored = catalog.labels(out, "labels")
    assert stored.column_names == result.column_names
    patients = {r["key"]: r["patient"] for r in catalog.load(out).to_pylist()}
    number = {NAMES.id("patient", f"P{n}"): n for n in range(10)}
    return {number[patients[row["key"]]]: row for row in stored.to_pylist()}, result.schema.metadata


def test_several_labels_are_columns_or_one_cell(made, tmp_path):
    text = "file,a,b\na/0,1,1.0\na/1,0,0\na/2,,\n"
    rows, metadata = joined(made[1], tmp_path, text, kind="multi", values=("a", "b"))
    assert {n: row["labels"] for n, row in rows.items()} == {0: ["a", "b"], 1: []}
    assert metadata[b"unmatched"] == b"1"
    assert "unknown" not in rows[0]
    rows, _ = joined(made[1], tmp_path, "file,label\na/0,x|y\na/0,z\n", kind="multi")
    assert rows[0]["labels"] == ["x", "y", "z"]


def test_an_empty_cell_beside_others_is_unknown_and_no_zero(made, tmp_path):
    text = "file,a,b,c\na/0,1,,\na/0,,0,\na/1,0,0,0\n"
    rows, _ = joined(made[1], tmp_path, text, kind="multi", values=("a", "b", "c"))
    assert {n: (row["labels"], row["unknown"]) for n, row in rows.items()} == {0: (["a"], ["c"]), 1: ([], [])}


def test_labels_join_by_key_and_by_accession_number(tmp_path):
    for number in range(2):
        write(tmp_path / "s" / f"{number}", grey(seed=number), number=number, patient=f"P{number}",
              AccessionNumber=f"ACC-{number}")  # fmt: skip
    out = tmp_path / "out"
    ingest(tmp_path / "s", out)
    rows, _ = joined(out, tmp_path, "AccessionNumber,label\nACC-1,yes\n")
    assert {n: row["label"] for n, row in rows.items()} == {1: "yes"}
    rows, _ = joined(out, tmp_path, f"key,label\n{rows[1]['key']},no\n")
    assert {n: row["label"] for n, row in rows.items()} == {1: "no"}
    for path in (p for p in out.rglob("*") if p.is_file()):
        assert b"ACC-" not in path.read_bytes()


def test_boxes_and_masks_follow_the_reduction_of_an_x_ray(tmp_path):
    write(tmp_path / "s" / "0", grey(size=(200, 100)), modality="CR", patient="P0")
    out = tmp_path / "out"
    ingest(tmp_path / "s", out, xr_max_side=100)
    text = "file,x0,y0,x1,y1,label\n0,10,20,30,60,node\n0,90,0,100.8,50,\n"
    rows, metadata = joined(out, tmp_path / "s", text, kind="boxes")
    first, second = rows[0]["boxes"]
    assert first == {"x0": 5, "y0": 10, "x1": 15, "y1": 30, "label": "node"}
    assert (second["x1"], second["label"]) == (50, None) and metadata[b"misplaced"] == b"0"
    with pytest.raises(
        UserError, match=r"line 3 of t.csv: the box \(90, 0, 400, 50\) does not lie in its image"
    ):
        joined(out, tmp_path / "s", text.replace("100.8", "400"), kind="boxes")
    rows, metadata = joined(out, tmp_path / "s", "file,x0,y0,x1,y1,label\n0,,,,,\n", kind="boxes")
    assert rows[0]["boxes"] == [] and metadata[b"unmatched"] == b"0"  # read, and nothing found
    text = 'file,b\n0,"[[10, 20, 30, 60]]"\n'
    rows, _ = joined(out, tmp_path / "s", text, kind="boxes", values=("b",))
    assert rows[0]["boxes"][0]["y1"] == 30
    with pytest.raises(UserError, match="four numbers"):
        joined(out, tmp_path / "s", "file,x0,y0,x1,y1\n0,9,9,1,1\n", kind="boxes")
    mask = np.zeros((200, 100), np.uint8)
    mask[20:60, 10:30] = 2
    cv2.imwrite(str(tmp_path / "s" / "m.png"), mask)
    rows, _ = joined(out, tmp_path / "s", "file,mask\n0,m.png\n", kind="masks")
    stored = cv2.imdecode(np.frombuffer(rows[0]["mask"], np.uint8), cv2.IMREAD_UNCHANGED)
    assert stored.shape == (100, 50) and (stored == mask[::2, ::2]).all()
    cv2.imwrite(str(tmp_path / "s" / "m.png"), mask[1:])
    with pytest.raises(UserError, match="matches"):
        joined(out, tmp_path / "s", "file,mask\n0,m.png\n", kind="masks")


def test_boxes_and_masks_follow_the_crop_of_an_ultrasound_image():
    sample = {"rows": 10, "columns": 20, "original_rows": 40, "original_columns": 60}
    sample |= {"crop_top": 5, "crop_left": 7}
    assert placed_box((8, 6, 100, 9, ""), sample) == {"x0": 1, "y0": 1, "x1": 20, "y1": 4, "label": None}
    assert placed_box((0, 0, 5, 5, ""), sample) is None
    mask = grey("uint8", 8, size=(40, 60))
    stored = cv2.imdecode(np.frombuffer(placed_mask(mask, sample), np.uint8), cv2.IMREAD_UNCHANGED)
    assert (stored == mask[5:15, 7:27]).all()


def test_a_column_of_identifiers_is_no_label(made, tmp_path):
    with pytest.raises(UserError, match="identifiers"):
        joined(made[1], tmp_path, "file,PatientID\na/0,P0\n", label_column="PatientID")
