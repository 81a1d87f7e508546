"""Units are the same whatever the order of files, keep series whole, and survive a resume."""

import random

import pytest

from ingest.discover import inventory
from ingest.estimate import estimate
from ingest.plan import make_units, plan_of
from shards.schema import Reason
from tests.ingest.files import NAMES, config, grey, tree, write


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "s"
    for patient in range(4):
        for number in range(3):
            name = f"{number}-{patient}"
            write(
                folder / name,
                grey(seed=10 * patient + number),
                number=10 * patient + number,
                patient=f"P{patient}",
            )
    (folder / "note.txt").write_text("x")
    return folder


def plans(units):
    return [plan_of(unit, NAMES) for unit in units]


def test_a_series_stays_in_one_unit_and_the_order_of_files_does_not_matter(source, tmp_path):
    settings = config(source, tmp_path / "out", unit_files=4)
    entries = inventory(settings)
    units = make_units(entries, settings, NAMES)
    assert sorted(len(unit.entries) for unit in units) == [1, 3, 3, 3, 3]
    assert all(len({entry.group for entry in unit.entries}) == 1 for unit in units)
    random.Random(0).shuffle(entries)
    assert make_units(entries, settings, NAMES) == units
    assert sum(len(unit.entries) for unit in units) == len(entries)


def test_a_plan_holds_pseudonyms_only(source, tmp_path):
    settings = config(source, tmp_path / "out")
    text = str(plans(make_units(inventory(settings), settings, NAMES)))
    assert "note" not in text and "0-1" not in text and str(tmp_path) not in text


def test_a_resume_does_old_units_as_planned_and_new_files_in_new_units(source, tmp_path):
    settings = config(source, tmp_path / "out", unit_files=6)
    before = make_units(inventory(settings), settings, NAMES)
    write(source / "new", number=99, patient="P1")
    after = make_units(inventory(settings), settings, NAMES, plans(before), {before[0].unit})
    assert after[:-1] == before[1:]
    assert [entry.relative for entry in after[-1].entries] == ["new"]
    # Other unit sizes on a resume change nothing that is planned.
    other = config(source, tmp_path / "out", unit_files=1)
    assert make_units(inventory(other), other, NAMES, plans(before))[:-1] == before


def test_what_vanished_or_changed_since_the_plan_is_missing_and_its_new_form_a_new_input(source, tmp_path):
    settings = config(source, tmp_path / "out")
    before = make_units(inventory(settings), settings, NAMES)
    (source / "0-1").unlink()
    write(source / "1-1", patient="P9", number=77)
    units = make_units(inventory(settings), settings, NAMES, plans(before))
    assert [len(unit.missing) for unit in units] == [2, 0, 0]
    assert [entry.relative for entry in units[-1].entries] == ["1-1"]
    assert units[0].unit == before[0].unit


def test_the_plan_counts_without_writing(source, tmp_path):
    settings = config(source, tmp_path / "out")
    write(source / "small", grey(size=(20, 20)), number=50)
    before = tree(tmp_path)
    report = estimate(inventory(settings), settings)
    assert tree(tmp_path) == before
    assert report.inputs == 14 and report.images == {"mr": 12}
    assert report.refusals == {Reason.NOT_AN_IMAGE: 1, Reason.TOO_SMALL: 1}
    assert report.core_seconds > 0 and report.bytes_out > 0
