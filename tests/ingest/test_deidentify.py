"""Free text passes closed vocabularies only; ages are capped; the documented columns are the real ones."""

import json
from datetime import date
from pathlib import Path

import pytest

from ingest.convert import dataset_info
from ingest.deidentify import age_years, columns_document, manufacturer, shifted_date
from shards import catalog
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.ids import Pseudonymizer, digest
from shards.objects import open_store
from shards.schema import COLUMN_NAMES, LOCATION_COLUMNS, VOLUME_COLUMNS
from shards.tar import ShardReader, list_members
from tests.ingest.files import NAMES, config, grey, ingest, one, write


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
    tables = (columns_document(), columns_document(VOLUME_COLUMNS))
    assert all(table in document.read_text() for table in tables), (
        "regenerate docs/columns.md with ingest.deidentify.columns_document()"
    )


def test_dates_move_by_one_keyed_shift_for_each_patient(tmp_path):
    days = ("20190523", "20190601")
    for number, day in enumerate(days):
        write(tmp_path / "s" / f"{number}", grey(seed=number), number=number, StudyDate=day)
    write(tmp_path / "s" / "other", grey(seed=5), number=5, patient="P2", StudyDate=days[0])
    ingest(tmp_path / "s", tmp_path / "out", date_shift_days=400)
    rows = catalog.load(tmp_path / "out").to_pylist()
    patient = NAMES.id("patient", "P1")
    own = sorted(date.fromisoformat(row["study_date"]) for row in rows if row["patient"] == patient)
    assert (own[1] - own[0]).days == 9  # intervals within a patient stay true
    shift = (own[0] - date(2019, 5, 23)).days
    assert shift == NAMES.shift_days(patient, 400) and abs(shift) <= 400
    shifts = {NAMES.shift_days(f"p{n}", 3) for n in range(200)}
    assert shifts == set(range(-3, 4))
    ingest(tmp_path / "s", tmp_path / "plain")
    assert catalog.load(tmp_path / "plain")["study_date"].null_count == 3


@pytest.mark.parametrize(("text", "days", "value"), [("", 3, None), ("00010101", -1, None), ("x", 1, None)])
def test_what_is_no_date_becomes_none(text, days, value):
    assert shifted_date(text, days) is value


BOX = {"modality": "CT", "rows": 48, "columns": 40, "top": 0, "left": 0, "bottom": 6, "right": 40}


def test_known_boxes_of_text_are_blanked_and_nothing_else(tmp_path):
    path = write(tmp_path / "f", modality="CT", Manufacturer="SIEMENS", RescaleSlope=1, RescaleIntercept=0)
    plain, masked = one(path), one(path, mask_boxes=[BOX | {"manufacturer": "siemens"}])
    assert (masked.pixels[:6] == -1024).all()
    assert (masked.pixels[6:] == plain.pixels[6:]).all()
    for other in ({"manufacturer": "ge"}, {"rows": 50}, {"modality": "MR"}):
        assert (one(path, mask_boxes=[BOX | other]).pixels == plain.pixels).all()


@pytest.mark.parametrize(("covers", "kept"), [(True, True), (False, False)])
def test_a_box_opens_the_burned_in_route_only_where_it_covers_the_text(tmp_path, covers, kept):
    path = write(tmp_path / "f", modality="US")
    box = BOX | {"modality": "US", "covers_text": covers}
    item = one(path, mask_boxes=[box])
    if kept:
        assert (item.pixels[:6] == item.pixels.min()).all()
    else:
        assert item.reason.value == "burned_in_risk"


def test_a_box_outside_its_image_is_refused(tmp_path):
    with pytest.raises(UserError, match="inside rows x columns"):
        config(tmp_path, tmp_path, mask_boxes=[BOX | {"bottom": 99}])
    with pytest.raises(UserError, match="manufacturer"):
        config(tmp_path, tmp_path, mask_boxes=[BOX | {"manufacturer": "Dr Quill"}])


def test_the_site_is_told_apart_and_given_away_to_nobody_without_the_key(tmp_path):
    write(tmp_path / "s" / "f")
    ingest(tmp_path / "s", tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert recorded["config"]["site"] == NAMES.site_id
    assert NAMES.site_id != Pseudonymizer(b"another key of 16 bytes", NAMES.site).site_id
    text = (tmp_path / "out" / "dataset.json").read_text()
    assert NAMES.site not in text and digest("site", NAMES.site)[:12] not in text
    south = dataset_info(config(tmp_path / "s", tmp_path / "out"), Pseudonymizer(NAMES.key, "south"))
    with pytest.raises(UserError, match="site was"):
        open_or_create(open_store(tmp_path / "out"), south)
