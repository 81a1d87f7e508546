"""Labels join by path or identifier through pseudonyms, and only classes get in."""

import cv2
import pytest

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
    [("PatientID", "P1"), ("SOPInstanceUID", "1.2.3.1"), ("SeriesInstanceUID", "1.2.3.200.1")],
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
