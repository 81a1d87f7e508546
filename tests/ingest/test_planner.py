"""The planner on disk makes the units of the planner in memory, whatever buckets and order of rows."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import inventory as stored
from ingest.config import load_config
from ingest.discover import Entry, told_apart
from ingest.identity import identity_of
from ingest.inventory import Inventory, forget_parts, input_id, tell_apart
from ingest.plan import plan_units
from ingest.planner import plan_stored
from shards.commit import Commit, is_release, list_commits, release_unit
from shards.dataset import to_json
from shards.plan import plan_names, read_plans
from shards.store import Store
from tests.ingest.files import NAMES

MODALITIES = ("ct", "mr", "none")


def entry(number, modality, group, size):
    relative = f"f/{number % 7}/é{number}\udcff"
    identity = identity_of(relative, size, str(number).encode())
    return Entry(f"/s/{relative}", relative, relative, size, "dicom", identity, modality, group)


entries_strategy = st.lists(
    st.tuples(
        st.sampled_from(MODALITIES),
        st.sampled_from(["", "P\0\0", "P\0" + "1.2\0" + "3", "P\0" + "1.2\0" + "4", "Q", "\udc80"]),
        st.integers(0, 40),
    ),
    max_size=60,
).map(lambda rows: [entry(number, *row) for number, row in enumerate(rows)])


def configured(files, size):
    return load_config({"sources": ["s"], "output": "o", "unit_files": files, "unit_bytes": size})


def write(folder, entries):
    forget_parts()
    found = Inventory(folder, NAMES)
    found.append(entries)
    found.close()
    return found


def on_disk(store, folder, entries, config, bucket_rows=7):
    todo = plan_stored(
        store, write(folder / "inventory", entries), config, NAMES, folder / "plan", None, bucket_rows
    )
    return list(todo.units), todo


def commit(store, unit):
    counts = {"samples": 0, "quarantined": 1, "inputs": 1}
    values = Commit(unit, (), (), None, counts).__dict__
    assert store.create(f"commits/{unit}.json", to_json(values))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(stored, "PART_ROWS", 16)
    monkeypatch.setattr(stored, "_BATCH_ROWS", 4)
    yield
    forget_parts()


@settings(max_examples=60, deadline=None)
@given(entries_strategy, st.integers(1, 9), st.integers(1, 120), st.integers(1, 20), st.randoms())
def test_the_units_are_those_of_the_plan_in_memory(tmp_path_factory, rows, files, size, bucket_rows, rng):
    place, config = tmp_path_factory.mktemp("p"), configured(files, size)
    wanted = plan_units(Store(place / "memory"), rows, config, NAMES)
    shuffled = rng.sample(rows, len(rows))
    units, _ = on_disk(Store(place / "disk"), place, shuffled, config, bucket_rows)
    assert units == list(wanted.units)
    plans = [
        {p.unit: (p.modality, set(p.sources)) for p in read_plans(Store(place / n))}
        for n in ("memory", "disk")
    ]
    assert plans[0] == plans[1]


@settings(max_examples=60, deadline=None)
@given(entries_strategy, st.integers(1, 6), st.integers(0, 10_000), st.integers(1, 20))
def test_a_later_run_agrees_too_whatever_was_committed_changed_or_gone(
    tmp_path_factory, rows, files, seed, bucket
):
    """The same history on both sides: units committed or released, files gone, changed, new, moved."""
    place, config, rng = tmp_path_factory.mktemp("p"), configured(files, 10**9), random.Random(seed)
    first, second = rows[: len(rows) * 2 // 3], list(rows)
    memory, disk = Store(place / "memory"), Store(place / "disk")
    planned = plan_units(memory, first, config, NAMES).units
    (place / "one").mkdir()
    assert on_disk(disk, place / "one", first, config, bucket)[0] == list(planned)
    for unit in planned:
        fate = rng.choice(["commit", "release", "leave", "leave"])
        for store in (memory, disk):
            if fate == "commit":
                commit(store, unit.unit)
            elif fate == "release":
                release_unit(store, unit.unit)
    for number in range(len(second)):
        fate = rng.choice(["same", "same", "same", "gone", "changed", "moved"])
        if fate == "gone":
            second[number] = None
        elif fate == "changed":
            second[number] = replace(second[number], identity=identity_of("x", number, b"new"))
        elif fate == "moved":
            second[number] = replace(second[number], source=f"other//{second[number].source}")
    second = [e for e in second if e is not None]
    wanted = plan_units(memory, second, config, NAMES)
    (place / "two").mkdir()
    units, todo = on_disk(disk, place / "two", rng.sample(second, len(second)), config, bucket)
    assert sorted(units, key=lambda u: u.unit) == sorted(wanted.units, key=lambda u: u.unit)
    assert (todo.done, todo.waiting, todo.absent) == (wanted.done, wanted.waiting, wanted.absent)
    states = [{c.unit: is_release(c) for c in list_commits(store)} for store in (memory, disk)]
    assert states[0] == states[1]


def test_a_planner_that_is_killed_half_way_is_continued_by_the_same_units(tmp_path):
    rows = [entry(n, "ct", f"P{n // 3:03d}", 10) for n in range(120)]
    config = configured(8, 10**9)
    whole, _ = on_disk(Store(tmp_path / "whole"), tmp_path / "a", rows, config, 20)
    assert len(plan_names(Store(tmp_path / "whole"))) > 3
    store = Store(tmp_path / "whole")
    for name in plan_names(store)[2:]:
        store.delete(name)  # it was killed before these
    again, _ = on_disk(store, tmp_path / "b", rows[::-1], config, 33)
    assert {unit.unit: unit.entries for unit in again} == {unit.unit: unit.entries for unit in whole}


def test_inputs_of_equal_identity_are_told_apart_on_disk_as_in_memory(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(content)
    same = identity_of("f", 1, b"head")
    rows = [Entry(str(tmp_path / n / "f"), "f", f"{n}//f", 1, "other", same) for n in "abc"]
    rows += [entry(number, "ct", "P", 1) for number in range(40)]
    found = write(tmp_path / "inventory", rows)
    config = configured(4, 100)
    tell_apart(found, lambda entries: told_apart(entries, config))
    assert list(found.entries()) == told_apart(rows, config)
    inputs = [value.decode() for part in found.sort_columns() for value in part.inputs.tolist()]
    assert inputs == [input_id(e, NAMES) for e in told_apart(rows, config)]


def test_the_inventory_can_be_read_by_its_owner_only(tmp_path):
    write(tmp_path / "inventory", [entry(1, "ct", "P", 1)])
    assert (tmp_path / "inventory").stat().st_mode & 0o077 == 0
