"""The CRC-32 of each sample, also in a dataset whose catalogue an earlier version wrote; row counts."""

from zlib import crc32

import pytest

from shards import catalog, commit, parquet
from shards.errors import UserError
from shards.repair import find_broken, put_back
from shards.store import Store
from shards.tar import ShardReader
from shards.unit_files import write_catalog
from shards.verify import verify
from tests.shards import make


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A dataset without the column."""
    monkeypatch.setattr(
        commit, "write_catalog", lambda f, m, table: write_catalog(f, m, table.drop_columns(["crc32"]))
    )
    make.build(tmp_path / "before", tmp_path / "scratch")
    monkeypatch.undo()
    return tmp_path / "before"


def test_the_catalogue_has_the_crc32_of_the_encoded_pixels(tmp_path):
    make.build(tmp_path / "data", tmp_path / "scratch")
    reader = ShardReader(tmp_path / "data")
    for row in catalog.load(tmp_path / "data").to_pylist():
        place = (row["modality"], row["shard"], row["offset"], row["size"])
        assert row["crc32"] == crc32(reader.read(*place))


def test_a_wrong_crc32_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.unit_files.crc32", lambda data: 5)
    make.build(tmp_path / "data", tmp_path / "scratch", 1)
    assert {p.code for p in verify(tmp_path / "data", deep=True).problems} == {"crc32_differs"}


def test_a_dataset_of_an_earlier_version_is_read_verified_and_repaired(before, tmp_path):
    table = catalog.load(before)
    assert table["crc32"].null_count == table.num_rows == 8
    assert verify(before, deep=True).clean
    store, made = Store(before), tmp_path / "made"
    broken_file = next(before.glob("catalog/ct/*.parquet"))
    whole = broken_file.read_bytes()
    broken_file.write_bytes(whole[:-9])
    found, _ = find_broken(store)
    make.build(made, tmp_path / "scratch")  # by this version: with the column
    assert [put_back(store, Store(made), one) for one in found] == [[found[0].files[0].path]]
    assert broken_file.read_bytes() == whole and verify(before, deep=True).clean


@pytest.mark.parametrize("split", [None, "train"])
def test_rows_that_are_not_those_of_the_commits_are_refused(tmp_path, split):
    make.build(tmp_path / "data", tmp_path / "scratch", 1)
    part = next((tmp_path / "data").glob("catalog/ct/*.parquet"))
    table = parquet.read_bytes(part.read_bytes())
    keep = [i for i, name in enumerate(table["split"].to_pylist()) if split in (None, name)][:-1]
    part.write_bytes(parquet.to_bytes(table.take(keep)))
    with pytest.raises(UserError, match=r"rows where the commits count \d: run ingest verify"):
        catalog.load(tmp_path / "data", "ct", split=split)
