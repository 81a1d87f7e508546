"""Units are the same whatever the order of files, keep series whole, and survive a resume."""

import random
from itertools import pairwise
from pathlib import Path

import pytest

from ingest.convert import SourceChangedError, dataset_info, run_unit
from ingest.discover import inventory
from ingest.estimate import _Stratum, estimate
from ingest.inventory import Inventory
from ingest.plan import make_units, plan_of, plan_units
from shards import catalog
from shards.commit import release_unit
from shards.dataset import open_or_create
from shards.plan import read_plans
from shards.schema import Reason
from shards.store import Store
from shards.verify import verify
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


def run(settings, only=None):
    """Plan as `ingest run` does, and convert `only` so many units; what the plan said."""
    store = Store(settings.output)
    open_or_create(store, dataset_info(settings, NAMES))
    todo = plan_units(store, inventory(settings), settings, NAMES)
    for unit in todo.units[:only]:
        run_unit(unit, settings, NAMES, settings.output, Path(f"{settings.output}-scratch"))
    return todo


def digests(out):
    return sorted(catalog.load(out)["pixel_digest"].to_pylist())


@pytest.fixture
def undisturbed(source, tmp_path):
    run(config(source, tmp_path / "undisturbed"))
    return tmp_path / "undisturbed"


def test_units_of_a_source_that_is_not_given_wait_for_it(source, undisturbed, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    write(other / "x", grey(seed=50), number=50)
    assert run(config(source, out), only=0).absent == 0
    todo = run(config(other, out))
    assert todo.absent == 13 and len(todo.waiting) == 2 and catalog.load(out).num_rows == 1
    again = run(config(source, out))
    assert again.absent == 0 and not again.waiting
    for name, data in tree(undisturbed).items():  # the same bytes, whatever ran between
        assert tree(out)[name] == data


def test_what_is_left_of_a_planned_unit_is_converted_and_what_comes_back_too(source, undisturbed, tmp_path):
    settings = config(source, tmp_path / "out")
    run(settings, only=0)
    (source / "0-1").rename(tmp_path / "aside")
    todo = run(settings)
    assert todo.absent == 1 and not todo.waiting
    assert catalog.load(tmp_path / "out").num_rows == 11
    assert run(settings).absent == 0
    (tmp_path / "aside").rename(source / "0-1")
    assert len(run(settings).units) == 1
    assert digests(tmp_path / "out") == digests(undisturbed)
    assert verify(tmp_path / "out").clean


def test_a_unit_released_for_a_file_that_is_back_before_the_new_plan_is_done(source, undisturbed, tmp_path):
    settings = config(source, tmp_path / "out")
    planned = run(settings, only=0)
    for unit in planned.units:
        release_unit(Store(settings.output), unit.unit)  # killed here: no new plan was written
    run(settings)
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_a_source_that_drops_while_it_is_read_loses_nothing(source, undisturbed, tmp_path):
    settings = config(source, tmp_path / "out")
    todo = run(settings, only=0)
    source.rename(tmp_path / "gone")
    for unit in todo.units:
        with pytest.raises(SourceChangedError):
            run_unit(unit, settings, NAMES, tmp_path / "out", tmp_path / "scratch")
    (tmp_path / "gone").rename(source)
    run(settings)
    for name, data in tree(undisturbed).items():
        assert tree(tmp_path / "out")[name] == data


def test_a_file_that_changed_since_the_plan_is_converted_in_its_new_form(source, tmp_path):
    settings = config(source, tmp_path / "out")
    run(settings, only=0)
    write(source / "1-1", grey(seed=77), patient="P9", number=77)
    assert run(settings).absent == 1
    assert NAMES.id("patient", "P9") in catalog.load(tmp_path / "out")["patient"].to_pylist()
    assert catalog.load(tmp_path / "out").num_rows == 12
    assert run(settings).units == ()


def test_two_drivers_plan_no_input_twice(source, tmp_path, monkeypatch):
    """The second sees one file more and has read the plans before the first has written its own."""
    settings = config(source, tmp_path / "out")
    first = []

    def first_plans_meanwhile(*given):
        monkeypatch.undo()
        first.append(run(settings, only=0))
        write(source / "late", grey(seed=60), number=60)
        return make_units(inventory(settings), *given[1:])

    monkeypatch.setattr("ingest.plan.make_units", first_plans_meanwhile)
    second = run(settings)
    for unit in first[0].units:
        run_unit(unit, settings, NAMES, tmp_path / "out", tmp_path / "scratch")
    planned = [source for plan in read_plans(Store(tmp_path / "out")) for source in plan.sources]
    assert len(planned) == len(set(planned))
    assert len(second.units) == len(first[0].units)
    run(settings)
    assert catalog.load(tmp_path / "out").num_rows == 13 and verify(tmp_path / "out").clean


def test_an_inventory_on_disk_is_estimated_as_a_list_is(source, tmp_path):
    settings = config(source, tmp_path / "out")
    entries = inventory(settings)
    stored = Inventory(tmp_path / "scratch", NAMES)
    stored.append(entries)
    stored.close()
    wanted, found = (estimate(some, settings, sample=4) for some in (entries, stored))
    wanted.core_seconds = found.core_seconds = 0.0
    assert found == wanted and found.sampled == 4


def test_the_sample_of_many_files_is_small_and_even():
    stratum = _Stratum(48)
    for number in range(100_000):
        stratum.add(number)
    assert stratum.count == 100_000 and 48 <= len(stratum.numbers) <= 96
    steps = {b - a for a, b in pairwise(stratum.numbers)}
    assert len(steps) == 1 and stratum.numbers[0] == 0
    assert 100_000 - stratum.numbers[-1] <= steps.pop()


def test_the_plan_counts_without_writing(source, tmp_path):
    settings = config(source, tmp_path / "out")
    write(source / "small", grey(size=(20, 20)), number=50)
    before = tree(tmp_path)
    report = estimate(inventory(settings), settings)
    assert tree(tmp_path) == before
    assert report.inputs == 14 and report.images == {"mr": 12}
    assert report.refusals == {Reason.NOT_AN_IMAGE: 1, Reason.TOO_SMALL: 1}
    assert report.core_seconds > 0 and report.bytes_out > 0
