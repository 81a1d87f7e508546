"""A dataset shows committed rows only, in one order; it refuses to mix configurations; plans come back."""

import json
import random

import pyarrow as pa
import pytest

from shards import catalog
from shards.commit import (
    QuarantineRow,
    commit_unit,
    committed_sources,
    committed_units,
    is_release,
    list_commits,
    orphans,
    release_unit,
    sweep,
)
from shards.dataset import open_or_create, read_info
from shards.errors import UserError
from shards.ids import digest
from shards.plan import PlannedUnit, read_plans, write_plan
from shards.schema import LOCATION_COLUMNS, catalog_schema
from shards.stats import pixel_digest
from shards.store import Store
from shards.tar import ShardReader, list_members
from tests.shards import make

UNIT = digest("unit", "x")


@pytest.fixture
def dataset(tmp_path):
    make.build(tmp_path / "root", tmp_path / "scratch", units=4)
    return tmp_path / "root"


def test_the_order_of_samples_and_refusals_does_not_matter(tmp_path):
    trees = []
    for seed in range(3):
        samples, refused = make.samples(UNIT, number=6), make.refused(4)
        random.Random(seed).shuffle(samples)
        random.Random(seed).shuffle(refused)
        commit_unit(Store(tmp_path / f"{seed}"), UNIT, iter(samples), refused, tmp_path / "scratch", 9)
        trees.append(make.tree(tmp_path / f"{seed}"))
    assert trees[0] == trees[1] == trees[2]


def test_the_order_of_units_does_not_matter(tmp_path, dataset):
    other = Store(tmp_path / "other")
    open_or_create(other, make.info())
    for n in reversed(range(4)):
        unit, modality = digest("unit", str(n)), ("ct", "xr")[n % 2]
        bad = [QuarantineRow(make.PSEUDONYMS.id("source", f"bad{n}"), -1, "other", "none", "not_an_image")]
        commit_unit(other, unit, make.samples(unit, modality, n * 4), bad, tmp_path / "scratch", 5)
    assert make.tree(tmp_path / "other") == make.tree(dataset)


def test_a_second_commit_changes_nothing_and_does_not_read_its_samples(tmp_path):
    store = Store(tmp_path / "root")
    first = commit_unit(store, UNIT, make.samples(UNIT), make.refused(), tmp_path / "scratch", 5)
    before = make.tree(tmp_path / "root")

    def must_not_run():
        raise AssertionError("the samples were read")
        yield

    assert commit_unit(store, UNIT, must_not_run(), [], tmp_path / "scratch", 5) == first
    assert make.tree(tmp_path / "root") == before


def test_a_late_writer_with_other_bytes_cannot_change_what_was_committed(tmp_path, monkeypatch):
    store = Store(tmp_path / "root")
    first = commit_unit(store, UNIT, make.samples(UNIT), make.refused(1), tmp_path / "scratch", 5)
    before = make.tree(tmp_path / "root")
    monkeypatch.setattr("shards.commit.find_commit", lambda store, unit: None)  # it looked too early
    other = commit_unit(store, UNIT, make.samples(UNIT, number=2), make.refused(2), tmp_path / "scratch", 5)
    assert other == first
    assert len(sweep(store)) == 3
    assert make.tree(tmp_path / "root") == before


def test_uncommitted_files_are_invisible_and_swept(dataset):
    store = Store(dataset)
    before, rows = make.tree(dataset), catalog.load(dataset).num_rows
    part = next(iter((dataset / "catalog" / "ct").iterdir())).read_bytes()
    for name in (
        f"catalog/ct/ct-{'x' * 26}.parquet",
        f"shards/ct/ct-{'x' * 26}.tar",
        f"quarantine/unit-{'x' * 26}.parquet",
        f"shards/ct/.tmp-{'0' * 16}-a",
    ):
        (dataset / name).write_bytes(part)
    assert catalog.load(dataset).num_rows == rows
    assert sweep(store, dry_run=True) == orphans(store) != []
    assert sweep(store, min_age_seconds=3600) == []
    assert len(sweep(store)) == 4
    assert make.tree(dataset) == before and orphans(store) == []


def test_the_commit_says_what_was_written(dataset):
    for commit in list_commits(Store(dataset)):
        (shard,), (part,) = commit.shards, commit.catalogs
        assert commit.counts == {"samples": 4, "quarantined": 1, "inputs": 5}
        assert shard.samples == part.samples == commit.statistics[shard.modality]["samples"] == 4
        assert commit.statistics[shard.modality]["raw_bytes"] == 4 * 40 * 36 * 2
        assert shard.size == (dataset / shard.path).stat().st_size
    assert committed_units(Store(dataset)) == {digest("unit", str(n)) for n in range(4)}
    assert len(committed_sources(Store(dataset))) == 4 * 5


def test_rows_in_tar_and_catalogue_agree_and_pixels_are_where_the_catalogue_says(dataset):
    reader = ShardReader(dataset)
    for row in catalog.load(dataset).to_pylist():
        data = reader.read(row["modality"], row["shard"], row["offset"], row["size"])
        pixels = make.get_codec(row["codec"]).decode(data)
        assert pixel_digest(pixels) == row["pixel_digest"]
        shard = dataset / "shards" / row["modality"] / row["shard"]
        places = {name: place for name, *place in list_members(shard)}
        inside = json.loads(reader.read(row["modality"], row["shard"], *places[f"{row['key']}.json"]))
        assert inside == {k: v for k, v in row.items() if k not in LOCATION_COLUMNS}


def test_load_sorts_by_key_and_selects(dataset):
    everything = catalog.load(dataset)
    keys = everything["key"].to_pylist()
    assert everything.schema.equals(catalog_schema()) and len(keys) == 16 and keys == sorted(keys)
    ct = catalog.load(dataset, "ct", ["rows", "key"])
    assert ct.column_names == ["rows", "key"] and ct.num_rows == 8
    parts = [catalog.load(dataset, split=s, columns=["split"]) for s in ("train", "val", "test")]
    assert sum(p.num_rows for p in parts) == 16
    assert all(
        set(p["split"].to_pylist()) <= {s} for p, s in zip(parts, ("train", "val", "test"), strict=True)
    )
    assert catalog.load(dataset, "mr").num_rows == 0
    by_split = {
        m: {s: catalog.load(dataset, m, split=s).num_rows for s in n}
        for m, n in catalog.counts(dataset).items()
    }
    assert by_split == catalog.counts(dataset) and set(by_split) == {"ct", "xr"}


def test_quarantine_lists_all_refusals(dataset):
    table = catalog.quarantine(dataset)
    assert table.num_rows == 4 and set(table["reason"].to_pylist()) == {"not_an_image"}


@pytest.mark.parametrize("change", ["unit", "location", "unknown", "missing", "duplicate", "modality"])
def test_rows_that_break_the_schema_are_refused_and_nothing_is_written(tmp_path, change):
    samples = make.samples(UNIT)
    row = samples[1].row
    changes = {
        "unit": {"unit": "another"},
        "location": {"offset": 3},
        "unknown": {"PatientName": "x"},
        "missing": {"key": None},
        "duplicate": {"key": samples[0].row["key"]},
        "modality": {"modality": "../ct"},
    }
    row.update(changes[change])
    with pytest.raises(ValueError):
        commit_unit(Store(tmp_path / "root"), UNIT, samples, [], tmp_path / "scratch", 4)
    assert make.tree(tmp_path) == {}


def test_a_unit_without_samples_commits_its_refusals(tmp_path):
    store = Store(tmp_path / "root")
    commit = commit_unit(store, UNIT, [], make.refused(3), tmp_path / "scratch", 3)
    assert commit.shards == commit.catalogs == () and commit.counts["quarantined"] == 3
    assert list_commits(store) == [commit]


def test_the_same_settings_open_a_dataset_again(dataset):
    assert open_or_create(Store(dataset), make.info(modalities=("ct", "us"))) == read_info(Store(dataset))


def test_other_settings_are_refused_by_name_with_old_and_new_value(dataset):
    before = make.tree(dataset)
    changed = make.info(
        codec="png16",
        key_id="otherkey",
        fingerprint="z",
        config={"xr_max_side": 800, "limits": {"min_side": 64}, "new": True},
    )
    with pytest.raises(UserError) as error:
        open_or_create(Store(dataset), changed)
    message = str(error.value)
    for words in (
        'codec was "htj2k", now "png16"',
        "xr_max_side was 1200, now 800",
        "limits.min_side was 33, now 64",
        "new was not set, now true",
        'now "otherkey"',
        "another output folder",
    ):
        assert words in message
    assert "\n" not in message and make.tree(dataset) == before


def test_a_changed_fingerprint_alone_is_refused(dataset):
    with pytest.raises(UserError, match="fingerprint was"):
        open_or_create(Store(dataset), make.info(fingerprint="z"))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    for function in (catalog.load, catalog.counts, catalog.quarantine):
        with pytest.raises(UserError, match="no dataset"):
            function(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"modalities": []}'])
def test_a_damaged_dataset_json_is_a_clear_error(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        read_info(Store(tmp_path))


@pytest.mark.parametrize(("version", "fix"), [(99, "upgrade"), (1, "new output folder")])
def test_another_format_is_refused_with_the_fix(tmp_path, version, fix):
    open_or_create(Store(tmp_path), make.info(format_version=version))
    with pytest.raises(UserError, match=fix):
        read_info(Store(tmp_path))


def test_plans_come_back_each_unit_once(tmp_path):
    store = Store(tmp_path)
    a, b, c = (PlannedUnit(u, "ct", (f"{u}1", f"{u}0")) for u in "abc")
    assert write_plan(store, [b, a]) and write_plan(store, [c, a])
    assert read_plans(store) == [a, b, c]
    assert len(store.list("plans")) == 2


def test_of_two_authors_of_a_plan_one_reads_again(tmp_path):
    store = Store(tmp_path)
    first, second = PlannedUnit("a", "ct", ("1",)), PlannedUnit("b", "ct", ("1", "2"))
    assert write_plan(store, [first], 0) and not write_plan(store, [second], 0)
    assert read_plans(store) == [first]
    assert write_plan(store, [second], 1)


def test_labels_are_sorted_by_key_and_replaced(dataset):
    table = pa.table({"key": ["b", "a"], "label": [1, 0]})
    for _ in range(2):
        catalog.write_labels(Store(dataset), "finding", table)
        assert catalog.labels(dataset, "finding").to_pydict() == {"key": ["a", "b"], "label": [0, 1]}
    assert catalog.label_names(dataset) == ["finding"]
    with pytest.raises(UserError, match="there are: finding"):
        catalog.labels(dataset, "other")
    with pytest.raises(UserError, match="no name for labels"):
        catalog.write_labels(Store(dataset), "../x", table)
    with pytest.raises(ValueError, match="each key once"):
        catalog.write_labels(Store(dataset), "x", pa.table({"key": ["a", "a"]}))


def test_a_scratch_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(UserError, match="scratch: a part of the path is a file"):
        commit_unit(Store(tmp_path / "root"), UNIT, make.samples(UNIT), [], tmp_path / "scratch", 4)


def test_the_sweep_removes_our_own_names_only(dataset):
    store = Store(dataset)
    ours = [
        f"shards/ct/ct-{'a' * 26}.tar",
        f"catalog/ct/ct-{'a' * 26}.parquet",
        f"quarantine/{UNIT}-{'a' * 26}.parquet",
        f"shards/ct/.tmp-{'0' * 16}-x.tar",
    ]
    theirs = ["shards/ct/ct-x.tar", "quarantine/b.dcm", "catalog/list.csv", ".tmp-mine", "my/.tmp-0-x"]
    theirs.append(f"my/.tmp-{'0' * 16}-x")
    for name in ours + theirs:
        store.local(name).parent.mkdir(parents=True, exist_ok=True)
        store.local(name).write_bytes(b"x")
    assert sweep(store) == sorted(ours)
    assert all(store.exists(name) for name in theirs)


def test_a_released_unit_is_never_committed_and_a_committed_one_never_released(tmp_path):
    store = Store(tmp_path / "root")
    assert release_unit(store, UNIT) and release_unit(store, UNIT)
    late = commit_unit(store, UNIT, make.samples(UNIT), [], tmp_path / "scratch", 4)
    assert is_release(late) and late.files() == ()
    commit_unit(store, "other", make.samples("other"), [], tmp_path / "scratch", 4)
    assert not release_unit(store, "other")
