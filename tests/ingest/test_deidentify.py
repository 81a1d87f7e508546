"""Free text passes closed vocabularies only; ages are capped; the documented columns are the real ones."""

import json
from pathlib import Path

import pytest

from ingest.deidentify import age_years, columns_document, manufacturer
from shards import catalog
from shards.schema import COLUMN_NAMES, LOCATION_COLUMNS
from shards.tar import ShardReader, list_members
from tests.ingest.files import NAMES, ingest, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("GE MEDICAL SYSTEMS", "ge"),
        ("G.E. Medical Systems", "ge"),
        ("SIEMENS", "siemens"),
        ("Philips Medical Systems", "philips"),
        ("TOSHIBA_MEC", "canon"),
        ("FUJI PHOTO FILM CO. LTD.", "fujifilm"),
        ("Scanner of Dr Quillfeather", "other"),
        ("Gerald", "other"),
        ("", None),
    ],
)
def test_manufacturers_are_a_closed_vocabulary(text, value):
    assert manufacturer(text) == value


@pytest.mark.parametrize(
    ("age", "born", "seen", "years"),
    [
        ("045Y", "", "", 45),
        ("093Y", "", "", 90),
        ("010M", "", "", 0.83),
        ("100D", "", "", 0.27),
        ("", "19500101", "20201231", 70),
        ("", "19000101", "20201231", 90),
        ("", "20201231", "19500101", None),
        ("forty", "", "", None),
    ],
)
def test_ages_are_whole_years_and_capped(age, born, seen, years):
    assert age_years(age, born, seen) == years


def test_rows_hold_pseudonyms_and_vocabularies(tmp_path):
    write(
        tmp_path / "s" / "f",
        Manufacturer="Acme of Nebelstadt",
        BodyPartExamined="Brain",
        ViewPosition="Marianne",
        PatientSex="F",
        Laterality="Left of Theobald",
        PatientAge="099Y",
        FrameOfReferenceUID="1.2.3.4.5",
    )
    ingest(tmp_path / "s", tmp_path / "out")
    row = catalog.load(tmp_path / "out").to_pylist()[0]
    expected = {
        "manufacturer": "other",
        "body_part": "BRAIN",
        "view_position": "other",
        "sex": "F",
        "laterality": None,
        "age_years": 90,
        "patient": NAMES.id("patient", "P1"),
        "instance": NAMES.id("instance", "1.2.3.1"),
        "study": NAMES.id("study", "1.2.3.100"),
        "frame_of_reference": NAMES.id("frame_of_reference", "1.2.3.4.5"),
    }
    assert {name: row[name] for name in expected} == expected


def test_shards_and_catalogue_hold_the_allow_list_and_nothing_else(tmp_path):
    write(tmp_path / "s" / "f")
    ingest(tmp_path / "s", tmp_path / "out")
    table = catalog.load(tmp_path / "out")
    assert set(table.column_names) == COLUMN_NAMES
    shard = next((tmp_path / "out" / "shards" / "mr").iterdir())
    _, offset, size = next(m for m in list_members(shard) if m[0].endswith(".json"))
    described = json.loads(ShardReader(tmp_path / "out").read("mr", shard.name, offset, size))
    assert set(described) == COLUMN_NAMES - LOCATION_COLUMNS
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert set(info["deidentification"]["columns"]) == COLUMN_NAMES


def test_the_documented_columns_are_the_real_ones():
    document = Path(__file__).parents[2] / "docs" / "columns.md"
    assert columns_document() in document.read_text(), (
        "regenerate docs/columns.md with ingest.deidentify.columns_document()"
    )
