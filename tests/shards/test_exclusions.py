"""What is left out of a dataset depends on its commits alone, and no image gets into two splits by it."""

import dataclasses
import itertools
import json
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.cli import ingest_main
from shards import catalog, exclusions, parquet
from shards.commit import EncodedSample, commit_unit, list_commits, sweep
from shards.compare import compare
from shards.dataset import open_or_create
from shards.duplicates import GEOMETRY, resolve
from shards.ids import digest
from shards.objects import open_store
from shards.schema import Reason
from shards.store import Store
from shards.verify import verify
from tests.crash.killer import killed
from tests.shards import make
from tests.shards.test_object_store import proxy, root, server  # noqa: F401
from trainer.batches import dataset_fingerprint

COLUMNS = ["key", "unit", "source", "modality", "split", "volume", "instance", "frame", "pixel_digest"]

# (image, instance or None, patient, position): what an image of a unit is made of
image = st.tuples(
    st.integers(0, 3), st.none() | st.integers(0, 3), st.integers(0, 5), st.sampled_from([None, 1.0, 2.0])
)
dataset_units = st.lists(st.lists(image, min_size=1, max_size=4), min_size=1, max_size=5)
_encoded = {number: make.sample("u", "ct", number) for number in range(4)}


def sample(unit: str, number: int, description) -> EncodedSample:
    picture, instance, patient, position = description
    base = _encoded[picture]
    name = make.PSEUDONYMS.id("patient", f"Q{patient}")
    own = {
        "unit": unit,
        "key": digest("key", unit, str(number)),
        "source": digest("source", unit, str(number // 2)),  # two images a file
        "patient": name,
        "split": make.PSEUDONYMS.split(name, (0.4, 0.3, 0.3)),
        "instance": None if instance is None else digest("instance", str(instance)),
        "frame": number % 2,
        "position_mm": None if position is None else [0.0, 0.0, position],
    }
    return dataclasses.replace(base, row=base.row | own)


def write(store: Store, scratch, number: int, descriptions) -> None:
    unit = digest("unit", str(number), repr(descriptions))
    rows = [sample(unit, n, description) for n, description in enumerate(descriptions)]
    open_or_create(store, make.info())
    commit_unit(store, unit, rows, [], scratch, 1)


def all_rows(store: Store) -> list[dict]:
    tables = [
        parquet.read(store, f.path, [*COLUMNS, *GEOMETRY]) for c in list_commits(store) for f in c.catalogs
    ]
    return [row for table in tables for row in table.to_pylist()]


def update(store: Store, scratch) -> exclusions.Exclusions:
    shutil.rmtree(scratch / "compare", ignore_errors=True)
    (scratch / "compare").mkdir(parents=True)
    return exclusions.update(store, scratch / "compare")


EXAMPLE = [
    [(0, 0, 0, 1.0), (1, 1, 0, 2.0)],
    [(0, 0, 0, 1.0), (2, 1, 0, 2.0)],  # the same; a collision
    [(0, 7, 3, 1.0), (3, 8, 3, None)],  # the first with another instance, of another patient
    [(3, None, 1, 1.0), (3, None, 1, 1.0)],
]


@pytest.fixture
def dataset(tmp_path):
    for number, descriptions in enumerate(EXAMPLE):
        write(Store(tmp_path / "root"), tmp_path / "scratch", number, descriptions)
    return Store(tmp_path / "root")


@settings(max_examples=40, deadline=None)
@given(dataset_units, st.randoms(use_true_random=False))
def test_it_depends_on_the_commits_alone(tmp_path_factory, units, rng):
    """Any order, one run or several, any size of the files on scratch: the same bytes, those of the rule."""
    folder = tmp_path_factory.mktemp("exclusions")
    numbered = list(enumerate(units))
    one, several = Store(folder / "one"), Store(folder / "several")
    for number, descriptions in numbered:
        write(one, folder / "scratch", number, descriptions)
    expected = update(one, folder)
    rng.shuffle(numbered)
    for number, descriptions in numbered:
        write(several, folder / "scratch", number, descriptions)
        found = update(several, folder)
    assert found.name == expected.name and several.list("exclusions") == one.list("exclusions")
    rows = all_rows(one)
    rng.shuffle(rows)
    ruled = resolve(rows)
    assert {(e.unit, e.key, e.modality, e.split, e.reason) for e in ruled} == {
        tuple(row.values()) for row in expected.table.to_pylist()
    }
    (folder / "small").mkdir()
    assert compare(one, list_commits(one), folder / "small", None, 3, 2) == sorted(ruled)
    shutil.rmtree(folder)


@settings(max_examples=60, deadline=None)
@given(dataset_units)
def test_no_image_of_a_later_split_was_ever_in_an_earlier_one_and_one_stays(units):
    rows = []
    for number, descriptions in enumerate(units):
        unit = digest("unit", str(number))
        rows += [sample(unit, n, d).row | {"volume": None} for n, d in enumerate(descriptions)]
    gone = {e.key for e in resolve(rows)}
    kept = [row for row in rows if row["key"] not in gone]
    order = ["train", "val", "test"]
    for row in kept:
        # equal pixels of any state of the dataset, left out or not
        same = [other for other in rows if other["pixel_digest"] == row["pixel_digest"]]
        assert order.index(row["split"]) == min(order.index(other["split"]) for other in same)
    content = [(r["pixel_digest"], repr(r["position_mm"]), r["unit"], r["source"]) for r in kept]
    files = {}
    for pixels, position, *file in content:
        assert files.setdefault((pixels, position), file) == file
    instances = [(r["instance"], r["frame"]) for r in kept if r["instance"] is not None]
    assert len(set(instances)) == len(instances)
    if rows and not any(row["instance"] for row in rows):
        assert {r["pixel_digest"] for r in kept} == {r["pixel_digest"] for r in rows}


def test_all_readers_leave_the_same_out(dataset, tmp_path, capsys):
    before = dataset_fingerprint(tmp_path / "root")
    total = catalog.load(dataset).num_rows
    assert total == 8 and "all but 4 units" in _status(tmp_path, capsys)
    found = update(dataset, tmp_path)
    left = found.table.num_rows
    assert set(found.reasons()) == {Reason.DUPLICATE, Reason.UID_COLLISION}
    assert catalog.load(dataset, "ct").num_rows == catalog.load(dataset).num_rows == total - left
    assert not set(catalog.load(dataset)["key"].to_pylist()) & set(found.keys().to_pylist())
    assert sum(catalog.counts(dataset)["ct"].values()) == total - left
    report = verify(dataset, deep=True)
    assert report.clean and (report.samples, report.excluded) == (total - left, left)
    assert dataset_fingerprint(tmp_path / "root") != before
    said = _status(tmp_path, capsys)
    assert "uid_collision (another" in said and "all but" not in said


def _status(tmp_path, capsys) -> str:
    assert ingest_main(["status", str(tmp_path / "root")]) == 0
    return capsys.readouterr().out


def test_a_dataset_without_duplicates_keeps_its_fingerprint(tmp_path):
    make.build(tmp_path / "root", tmp_path / "scratch")
    before = dataset_fingerprint(tmp_path / "root")
    assert update(Store(tmp_path / "root"), tmp_path).table.num_rows == 0
    assert dataset_fingerprint(tmp_path / "root") == before


def test_frames_of_one_file_stay(tmp_path):
    store = Store(tmp_path / "root")
    write(store, tmp_path / "scratch", 0, [(3, 5, 1, 1.0), (3, 5, 1, 1.0)])
    write(store, tmp_path / "scratch", 1, [(2, None, 1, 1.0)])
    assert update(store, tmp_path).table.num_rows == 0


def test_a_volume_goes_with_a_slice_that_another_split_holds():
    rows = [sample("u" * 26, 0, (0, None, 0, 1.0)).row | {"volume": None, "split": "train"}]
    rows += [sample("v" * 26, 1, (0, None, 1, 1.0)).row | {"volume": "stack", "split": "test"}]
    assert {(e.key, e.modality) for e in resolve(rows)} == {(rows[1]["key"], "ct"), ("stack", "ct_volumes")}
    rows[1]["split"] = "train"  # then the stack stays: its slices are in the same split
    assert "stack" not in {e.key for e in resolve(rows)}


def test_killed_anywhere_readers_see_one_record_or_the_other(dataset, tmp_path):
    first = update(dataset, tmp_path)
    write(dataset, tmp_path / "scratch", 9, [(0, 0, 0, 1.0)])
    copies = tmp_path / "copies"
    shutil.copytree(tmp_path / "root", copies / "whole")
    second = update(Store(copies / "whole"), tmp_path)
    operations = 0
    for n in itertools.count():
        copy = copies / f"{n}"
        shutil.copytree(tmp_path / "root", copy)
        (tmp_path / f"scratch{n}").mkdir()
        was_killed = killed(
            lambda c=copy, n=n: exclusions.update(Store(c), tmp_path / f"scratch{n}"), n, True
        )
        assert exclusions.read(Store(copy)).name in (first.name, second.name)
        assert verify(copy).clean
        assert update(Store(copy), tmp_path).name == second.name
        sweep(Store(copy))
        assert Store(copy).list("exclusions")[-1:] == [second.name] and Store(copy).temporaries() == []
        if not was_killed:
            break
        operations = n + 1
    assert operations >= 5


def test_a_damaged_record_is_found_and_written_again(dataset, tmp_path):
    whole = update(dataset, tmp_path)
    data = dataset.read(whole.name)
    dataset.put(whole.name, data[:-9] + b"123456789")
    assert {p.code for p in verify(dataset).problems} == {"exclusions_damaged"}
    assert exclusions.read(dataset).name == ""
    assert update(dataset, tmp_path).name == whole.name and dataset.read(whole.name) == data
    other = exclusions.to_bytes([c.unit for c in list_commits(dataset)], [])
    dataset.delete(whole.name)
    dataset.put(exclusions._name_of(other, 4), other)
    assert {p.code for p in verify(dataset, deep=True).problems} == {"exclusions_differ"}


def test_in_s3_and_by_the_command_it_is_the_same(dataset, root, tmp_path, capsys):  # noqa: F811
    store = open_store(root)
    for name in dataset.list():
        store.put(name, dataset.read(name))
    units = [root, str(tmp_path / "root")]
    random.Random(0).shuffle(units)
    said = []
    for place in units:
        assert ingest_main(["dedupe", place, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] and said[0]["excluded"] == exclusions.read(dataset).reasons() != {}
    assert catalog.load(store) == catalog.load(dataset)
    assert ingest_main(["dedupe", str(tmp_path / "scratch")]) == 2
