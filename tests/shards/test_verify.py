"""verify finds each kind of damage, names the file, and is silent about a good dataset."""

import json
from pathlib import Path

import pytest

from shards import parquet
from shards.commit import list_commits
from shards.errors import UserError
from shards.store import Store
from shards.tar import ShardWriter, list_members
from shards.verify import verify
from tests.shards import make


@pytest.fixture
def dataset(tmp_path):
    make.build(tmp_path / "root", tmp_path / "scratch", units=3)
    return tmp_path / "root"


def first(root: Path) -> tuple[Path, Path, Path]:
    """Commit record, shard and catalogue part of one unit."""
    commit = list_commits(Store(root))[0]
    return root / f"commits/{commit.unit}.json", root / commit.shards[0].path, root / commit.catalogs[0].path


def codes(root: Path, deep: bool = False) -> set[str]:
    return {problem.code for problem in verify(root, deep).problems}


def recommit(root: Path, **sizes: int) -> None:
    """Make the record agree with the damaged file's size, as only a fault of the writer could."""
    record, shard, part = first(root)
    values = json.loads(record.read_text())
    values["shards"][0]["size"] = shard.stat().st_size
    values["catalogs"][0]["size"] = part.stat().st_size
    record.write_text(json.dumps(values))


@pytest.mark.parametrize("deep", [False, True])
def test_a_good_dataset_is_clean_and_counted(dataset, deep):
    report = verify(dataset, deep)
    assert report.clean and report.orphans == ()
    assert (report.units, report.samples, report.quarantined, report.inputs) == (3, 12, 3, 15)
    assert report.size == sum(f.size for c in list_commits(Store(dataset)) for f in c.files())


@pytest.mark.parametrize("codec", ["png16", "blosc2"])
def test_other_codecs_verify_too(tmp_path, codec):
    store = Store(tmp_path / "root")
    make.open_or_create(store, make.info(codec=codec))
    samples = [make.sample("u", "ct", n, codec) for n in range(2)]
    make.commit_unit(store, "u", samples, [], tmp_path / "scratch", 2)
    assert verify(tmp_path / "root", deep=True).clean


def test_a_tar_cut_at_a_member_boundary_is_found_even_with_the_size_on_record(dataset):
    _, shard, _ = first(dataset)
    offset = list_members(shard)[4][1] - 512
    shard.write_bytes(shard.read_bytes()[:offset])
    assert codes(dataset) == {"size_differs", "tar_damaged"}
    recommit(dataset)
    assert codes(dataset) == {"tar_damaged"}
    # With an end marker of its own it is a sound tar of fewer samples.
    shard.write_bytes(shard.read_bytes() + bytes(1024))
    recommit(dataset)
    assert codes(dataset) == {"tar_count_differs", "index_differs"}


def test_a_missing_file_of_each_kind_is_named(dataset):
    commit = list_commits(Store(dataset))[0]
    for file in commit.files():
        kept = (dataset / file.path).read_bytes()
        (dataset / file.path).unlink()
        (problem,) = verify(dataset, deep=True).problems
        assert (problem.code, problem.path) == ("file_missing", file.path)
        (dataset / file.path).write_bytes(kept)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # by imagecodecs
def test_one_flipped_byte_of_pixels_is_found_by_deep_only(dataset):
    _, shard, _ = first(dataset)
    raw = bytearray(shard.read_bytes())
    _, offset, size = list_members(shard)[0]
    raw[offset + size - 20] ^= 255
    shard.write_bytes(raw)
    assert codes(dataset) == set()
    assert codes(dataset, deep=True) >= {"sha256_differs"}
    assert codes(dataset, deep=True) & {"pixels_differ", "decode_failed"}


def test_a_changed_row_inside_the_tar_is_found(dataset):
    _, shard, _ = first(dataset)
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b'"age_years":61.0', b'"age_years":16.0', 1))
    assert codes(dataset, deep=True) == {"sha256_differs", "row_differs"}


def test_samples_in_another_order_than_the_catalogue_says_are_found(dataset, tmp_path):
    _, shard, _ = first(dataset)
    raw, members = shard.read_bytes(), list_members(shard)
    with ShardWriter(tmp_path / "other.tar") as writer:
        for (name, offset, size), (_, j_offset, j_size) in reversed(
            list(zip(members[::2], members[1::2], strict=True))
        ):
            data = {"j2c": raw[offset : offset + size], "json": raw[j_offset : j_offset + j_size]}
            writer.add(name.partition(".")[0], data)
    shard.write_bytes((tmp_path / "other.tar").read_bytes())
    assert "index_differs" in codes(dataset)


@pytest.mark.parametrize("damage", ["garbage", "schema", "rows"])
def test_a_damaged_catalogue_is_found(dataset, damage):
    _, _, part = first(dataset)
    table = parquet.read_bytes(part.read_bytes())
    if damage == "garbage":
        part.write_bytes(b"x" * part.stat().st_size)
    else:
        part.write_bytes(parquet.to_bytes(table.drop(["rows"]) if damage == "schema" else table[:2]))
    expected = {"garbage": "parquet_damaged", "schema": "schema_differs", "rows": "rows_differ"}[damage]
    assert expected in codes(dataset)


def test_a_damaged_record_is_found_and_hides_no_file_as_orphan(dataset):
    record, _, _ = first(dataset)
    for text in ("{", "{}", "[]", record.read_text().replace('"unit":"', '"unit":"x')):
        record.write_text(text)
        report = verify(dataset)
        assert {p.code for p in report.problems} == {"commit_damaged"} and report.orphans == ()
        assert report.units == 2


def test_counts_that_do_not_add_up_are_found(dataset):
    record, _, _ = first(dataset)
    values = json.loads(record.read_text())
    values["counts"]["samples"] += 1
    record.write_text(json.dumps(values))
    assert codes(dataset) == {"counts_differ"}


def test_a_key_in_two_units_and_a_patient_in_two_splits_are_found(dataset, tmp_path):
    again = make.sample("again", "ct", 0)
    again.row["split"] = "val" if again.row["split"] != "val" else "test"
    make.commit_unit(Store(dataset), "again", [again], [], tmp_path / "scratch", 1)
    assert codes(dataset) == {"key_repeated", "patient_in_two_splits"}


def test_orphans_are_listed_but_no_problem(dataset):
    (dataset / f"shards/ct/ct-{'x' * 26}.tar").write_bytes(b"x")
    report = verify(dataset)
    assert report.clean and report.orphans == (f"shards/ct/ct-{'x' * 26}.tar",)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="no dataset"):
        verify(tmp_path)
