"""Features to Parquet: the values of the probes, in a fixed order, in bounded memory, whole or not at all."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from shards.errors import UserError
from tests.batches.make import COUNTS
from trainer import embed as embedding
from trainer.batches import eval_images
from trainer.downstream.features import extract
from trainer.embed import embed, image_batches, open_parts, table_writer
from trainer.source import open_source


@pytest.fixture(scope="module")
def source(run):
    return open_source(run)


def features(dataset, source, out: Path, split=None, chosen=None, **options) -> pa.Table:
    parts = open_parts(dataset, source.info.intensity, source.info.modalities, split, chosen)
    embed(dataset, source.network, source.info, out, parts, **{"batch_size": 4, "device": "cpu"} | options)
    return pq.read_table(out)


def test_features_are_those_of_the_probes_by_modality_and_key(dataset, source, tmp_path):
    table = features(dataset, source, tmp_path / "f.parquet")
    assert table.schema.field("features").type.list_size == source.network.feature_dim
    assert b'"backbone": "resnet-tiny"' in table.schema.metadata[b"medswav_encoder"]
    start = 0
    for modality, intensity in (("ct", source.info.intensity["ct"]), ("us", {}), ("xr", {})):
        keys, images, rows = eval_images(dataset, modality, source.info.size, intensity)
        part = table.slice(start, len(keys))
        start += len(keys)
        assert part["key"].to_pylist() == list(keys) == sorted(keys)
        assert part["modality"].to_pylist() == [modality] * len(keys)
        assert part["split"].to_pylist() == rows["split"].to_pylist()
        found = np.stack(part["features"].to_numpy())
        assert np.allclose(found, extract(source.network, images), rtol=1e-5, atol=1e-6)
    assert start == table.num_rows == sum(COUNTS.values()) + 2 * len(COUNTS)


def test_a_value_depends_on_its_image_alone_and_equal_runs_give_equal_bytes(dataset, source, tmp_path):
    whole = features(dataset, source, tmp_path / "a.parquet", threads=1)
    features(dataset, source, tmp_path / "b.parquet", threads=3)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    some = features(dataset, source, tmp_path / "c.parquet", split="test", chosen=["xr", "ct"])
    assert set(some["modality"].to_pylist()) == {"ct", "xr"} and set(some["split"].to_pylist()) == {"test"}
    by_key = dict(zip(whole["key"].to_pylist(), whole["features"].to_pylist(), strict=True))
    for key, values in zip(some["key"].to_pylist(), some["features"].to_pylist(), strict=True):
        assert values == by_key[key]


def test_float16_is_half_the_size_and_duckdb_reads_both(dataset, source, tmp_path):
    full = features(dataset, source, tmp_path / "full.parquet")
    half = features(dataset, source, tmp_path / "half.parquet", dtype="float16")
    assert half.schema.field("features").type.value_type == pa.float16()
    expected = np.stack(full["features"].to_numpy())
    for name in ("full", "half"):
        query = f"select key, features from '{tmp_path}/{name}.parquet'"
        found = np.array([row[1] for row in duckdb.sql(query).fetchall()], np.float32)
        assert np.allclose(found, expected, rtol=2e-3, atol=1e-4)


def test_decoding_stays_a_few_batches_ahead(dataset, source, monkeypatch):
    read = []
    real = embedding.whole_sample
    monkeypatch.setattr(embedding, "whole_sample", lambda *given: (read.append(1), real(*given))[1])
    (part,) = open_parts(dataset, {}, ("ct",))
    taken = 0
    for first, count, images in image_batches(dataset, part, 16, 2, threads=2):
        assert first == taken and images.shape == (2, 1, 16, 16)
        taken += count
        assert len(read) <= taken + 2 * 2
    assert taken == len(read) == 13 and not images[1].any()


def test_an_error_leaves_no_file(dataset, source, tmp_path, monkeypatch):
    real, seen = embedding.whole_sample, []

    def broken(*given):
        seen.append(1)
        if len(seen) > 20:
            raise UserError("shard 7 is missing")
        return real(*given)

    monkeypatch.setattr(embedding, "whole_sample", broken)
    with pytest.raises(UserError, match="shard 7 is missing"):
        features(dataset, source, tmp_path / "f.parquet")
    assert not list(tmp_path.iterdir())


def test_row_groups_do_not_depend_on_the_portions(tmp_path):
    schema = pa.schema([pa.field("x", pa.int64())])
    rows = pa.table({"x": range(25)}, schema=schema)
    for name, size in (("a", 1), ("b", 7), ("c", 25)):
        with table_writer(tmp_path / name, schema, 10) as write:
            for start in range(0, 25, size):
                write(rows.slice(start, size))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert pq.ParquetFile(tmp_path / "a").metadata.num_row_groups == 3
    assert pq.read_table(tmp_path / "a").equals(rows)


class Large(nn.Module):
    """Features beyond float16, of images of 58 px only."""

    feature_dim = 2

    def forward(self, x):
        if x.shape[-1] != 58:
            raise ValueError("58 px only")
        return x.mean((2, 3)).expand(-1, 2) + 1e6


def test_what_cannot_be_done_is_said_before_or_at_once(dataset, source, tmp_path):
    with pytest.raises(UserError, match=r"no mr images .modalities there: ct, us, xr"):
        features(dataset, source, tmp_path / "f.parquet", chosen=["mr"])
    with pytest.raises(
        UserError, match="no images of ct, us, xr in split val, which the encoder was trained on"
    ):
        features(dataset, source, tmp_path / "f.parquet", split="val")
    with pytest.raises(UserError, match="ct_volumes holds volumes"):
        features(dataset, source, tmp_path / "f.parquet", chosen=["ct_volumes"])
    parts = open_parts(dataset, {}, ("ct",))
    with pytest.raises(UserError, match=r"cannot take images of 57 px \(58 px only\): give another --size"):
        embed(dataset, Large(), source.info, tmp_path / "f.parquet", parts, size=57)
    with pytest.raises(UserError, match="not a finite float16: use --dtype float32"):
        embed(dataset, Large(), source.info, tmp_path / "f.parquet", parts, size=58, dtype="float16")
    assert not list(tmp_path.iterdir())
