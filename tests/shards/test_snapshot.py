"""A snapshot changes what opening a dataset costs and nothing else, whatever is done before and after."""

import itertools
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.cli import ingest_main
from shards import catalog, commit, records, snapshot
from shards.commit import DamagedRecordError, Retry, list_commits, orphans, sweep
from shards.dataset import open_or_create
from shards.ids import digest
from shards.objects import open_store
from shards.retries import retry_unit
from shards.store import Store
from shards.verify import verify
from tests.crash.killer import killed
from tests.shards import make
from tests.shards.test_object_store import proxy, root, server  # noqa: F401

READERS = (list_commits, commit.committed_sources, catalog.counts, catalog.load, catalog.quarantine, orphans)


def assert_same_without(store: Store, readers=(*READERS, verify)) -> None:
    """Every reader gives what it gives where there is no snapshot."""
    with_snapshot = [read(store) for read in readers]
    kept = {name: store.read(name) for name in store.list("snapshots")}
    for name in kept:
        store.delete(name)
    assert [read(store) for read in readers] == with_snapshot
    for name, data in kept.items():
        store.put(name, data)


def add(store: Store, scratch, number: int, retried: bool = False) -> None:
    unit = digest("unit", str(number))
    rows = make.samples(unit, ("ct", "xr")[number % 2], 5 * number, 1)
    open_or_create(store, make.info())
    commit.commit_unit(store, unit, rows, make.refused(number % 3), scratch, 1 + number % 3)
    if retried and number % 3:
        sources = (make.refused()[0].source,)
        again = retry_unit(unit, 1)
        commit.commit_unit(store, again, [], make.refused(), scratch, 1, Retry(unit, 1, sources, 1))


@pytest.fixture
def dataset(tmp_path):
    for number in range(4):
        add(Store(tmp_path / "root"), tmp_path / "scratch", number, retried=True)
    return Store(tmp_path / "root")


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(["commit", "retry", "snapshot", "damage", "sweep"]), max_size=9))
def test_readers_see_the_same_after_any_steps(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("steps")
    store = Store(folder / "root")
    add(store, folder / "scratch", 0)
    for number, step in enumerate(steps, 1):
        if step in ("commit", "retry"):
            add(store, folder / "scratch", number, step == "retry")
        elif step == "snapshot":
            assert snapshot.take(store).units == len(list_commits(store))
        elif step == "sweep":
            sweep(store)
        else:
            for name in store.list("snapshots")[-1:]:
                data = store.read(name)
                store.put(name, data[: len(data) // 2])
        # verify of a damaged snapshot says so: that is the one difference
        for name in store.list("snapshots"):
            if records.open_snapshot(store, name) is None:
                assert {p.code for p in verify(store).problems} == {"snapshot_damaged"}
                store.delete(name)
        assert_same_without(store)
    shutil.rmtree(folder)


def test_a_snapshot_is_read_in_place_of_what_it_covers(dataset, tmp_path, monkeypatch):
    taken = snapshot.take(dataset)
    add(dataset, tmp_path / "scratch", 9)
    read = []
    monkeypatch.setattr(dataset, "read", lambda name, *a: read.append(name) or Store.read(dataset, name, *a))
    assert len(list_commits(dataset)) == taken.units + 1
    assert sorted(read) == sorted([taken.name, records.record_name(digest("unit", "9"))])


def test_the_same_commits_give_the_same_snapshot_and_a_newer_one_replaces_it(dataset, tmp_path):
    first = snapshot.take(dataset)
    before = make.tree(tmp_path / "root")
    assert first.created and not snapshot.take(dataset).created
    assert make.tree(tmp_path / "root") == before
    add(dataset, tmp_path / "scratch", 9)
    second = snapshot.take(dataset)
    assert second.removed == (first.name,) and dataset.list("snapshots") == [second.name]
    after = make.tree(tmp_path / "root")
    assert {n: d for n, d in before.items() if n != first.name}.items() <= after.items()


@pytest.mark.parametrize("torn", [False, True], ids=["between", "torn-write"])
def test_killed_anywhere_readers_see_the_same_and_the_next_is_whole(dataset, tmp_path, torn):
    snapshot.take(dataset)
    add(dataset, tmp_path / "scratch", 9)
    expected = list_commits(dataset)
    operations = 0
    for n in itertools.count():
        copy = tmp_path / f"{n}"
        shutil.copytree(tmp_path / "root", copy)
        was_killed = killed(lambda copy=copy: snapshot.take(Store(copy)), n, torn)
        store = Store(copy)
        assert list_commits(store) == expected and verify(store).clean
        name = snapshot.take(store).name
        sweep(store)
        assert store.list("snapshots") == [name] and store.temporaries() == []
        if not was_killed:
            break
        operations = n + 1
    assert operations >= 5


def test_a_record_that_is_removed_and_made_anew_is_not_that_of_the_snapshot(dataset, tmp_path):
    unit = digest("unit", "2")
    name = snapshot.take(dataset).name
    dataset.delete(records.record_name(unit))
    assert unit not in {c.unit for c in list_commits(dataset)}
    assert_same_without(dataset, READERS)
    assert {p.code for p in verify(dataset).problems} == {"snapshot_differs"}
    assert snapshot.drop_stale(dataset) == [name]
    commit.commit_unit(dataset, unit, make.samples(unit, "us", 70, 2), [], tmp_path / "scratch", 2)
    assert catalog.counts(dataset)["us"] != {"train": 0, "val": 0, "test": 0}
    assert snapshot.drop_stale(dataset) == []


def test_verify_finds_a_snapshot_with_other_records(dataset):
    snapshot.take(dataset)
    name = records.record_name(digest("unit", "1"))
    values = json.loads(dataset.read(name))
    values["counts"]["inputs"] += 1
    dataset.put(name, json.dumps(values).encode())
    assert {p.code for p in verify(dataset).problems} == {"snapshot_differs"}


def test_a_damaged_record_is_one_line_and_comes_back_from_a_snapshot(dataset, capsys, tmp_path):
    unit = digest("unit", "1")
    whole = dataset.read(records.record_name(unit))
    dataset.put(records.record_name(unit), whole[:50])
    with pytest.raises(DamagedRecordError):
        snapshot.take(dataset)
    assert ingest_main(["status", str(tmp_path / "root")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    dataset.put(records.record_name(unit), whole)
    snapshot.take(dataset)
    dataset.put(records.record_name(unit), whole[:50])
    assert {p.code for p in verify(dataset).problems} == {"commit_damaged", "snapshot_differs"}
    assert snapshot.restore_records(dataset, [unit]) == [unit]
    assert dataset.read(records.record_name(unit)) == whole and verify(dataset).clean


def test_in_s3_it_is_the_same(root, tmp_path):  # noqa: F811
    store = open_store(root)
    for number in range(3):
        add(store, tmp_path / "scratch", number)
    snapshot.take(store)
    add(store, tmp_path / "scratch", 3)
    assert_same_without(store)
    assert snapshot.take(store).units == len(list_commits(store)) == 4
    assert len(store.list("snapshots")) == 1


def test_the_command_says_what_it_covers(dataset, tmp_path, capsys):
    assert ingest_main(["snapshot", str(tmp_path / "root"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["units"] == len(list_commits(dataset)) and dataset.list("snapshots") == [said["name"]]
    assert ingest_main(["snapshot", str(tmp_path / "root")]) == 0
    assert "there was already" in capsys.readouterr().out
    assert ingest_main(["snapshot", str(tmp_path / "scratch")]) == 2
