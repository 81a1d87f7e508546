"""How batches are read: ahead, joined, through a node cache; equal whatever is set; damage named."""

import numpy as np
import pyarrow as pa
import pytest

from shards import catalog
from shards.errors import UserError
from shards.tar import ShardReader, list_members
from tests.batches import make
from tests.batches.test_batches import same
from trainer.batches import BatchMaker, eval_images, whole_image
from trainer.config import DataConfig, OrderConfig, TrainConfig
from trainer.pool import cache_warning
from trainer.prepare import prepare
from trainer.rows import Modality


def with_data(config: TrainConfig, **changes) -> TrainConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


@pytest.mark.parametrize(
    "changes",
    [
        {"read_threads": 0},
        {"read_threads": 3},
        {"read_ahead_bytes": 0},
        {"cache_bytes": 60_000},
        {"cache": True},
    ],
)
def test_batches_do_not_depend_on_how_they_are_read(root, bands, changes, tmp_path):
    if changes.pop("cache", False):
        changes = {"node_cache": str(tmp_path / "cache")}
    order = OrderConfig(block_samples=2, group_blocks=2)
    plain = BatchMaker(with_data(make.config(root), order=order, read_threads=0), 0, 1, bands)
    other = BatchMaker(with_data(make.config(root), order=order, **changes), 0, 1, bands)
    for step in (0, 2, 4, 3):  # on in twos, as one of two workers, then out of order
        assert same(plain(step), other(step)), step


def test_a_sample_that_is_twice_in_a_batch_is_read_once_and_given_twice(root, bands):
    large = make.config(root, batch_size=24)  # 8 of each modality, of which one has 7 images
    batch = BatchMaker(large, 0, 1, bands)(0)
    us = batch.keys[8:16]
    assert len(set(us)) == 7 and batch.reads["store_bytes"] > 0


@pytest.mark.parametrize("layout", ["blocks", "keys"])
def test_a_second_process_of_the_node_reads_from_its_cache(root, bands, tmp_path, layout):
    config = with_data(
        make.config(root), node_cache=str(tmp_path / "cache"), order=OrderConfig(layout=layout)
    )
    first, second = (BatchMaker(config, 0, 1, bands) for _ in range(2))
    steps = range(3)
    cost = [first(step).reads for step in steps]
    assert sum(c["requests"] for c in cost) >= 3 and sum(c["cache_misses"] for c in cost) >= 3
    for batch in map(second, steps):
        assert batch.reads["requests"] == 0 and batch.reads["cache_hits"] == len(set(batch.keys))


def test_a_flipped_bit_ends_a_run_with_the_name_of_the_shard(tmp_path, bands):
    root = make.dataset(tmp_path / "data", tmp_path / "scratch")
    shard = next((tmp_path / "data").glob("shards/xr/*.tar"))
    _, offset, size = next(m for m in list_members(shard) if m[0].endswith(".j2c"))
    raw = bytearray(shard.read_bytes())
    raw[offset + size // 2] ^= 4
    shard.write_bytes(raw)
    config = with_data(make.config(root), split="all")  # so that the sample is among those read
    maker = BatchMaker(config, 0, 1, bands)
    with pytest.raises(UserError, match=rf"shard {shard.name} holds other bytes .*--deep .*ingest repair$"):
        for step in range(3):  # a pass over its 11 images
            maker(step)


def test_damage_in_a_catalogue_without_crc32_is_named_where_the_codec_finds_it(tmp_path, bands):
    root = make.dataset(tmp_path / "data", tmp_path / "scratch", codec="png16")
    maker = BatchMaker(make.config(root), 0, 1, bands)
    maker(0)
    for modality in maker._opened.values():
        modality._columns["crc32"] = pa.nulls(len(modality), pa.int64())
    for shard in (tmp_path / "data").glob("shards/*/*.tar"):
        raw = shard.read_bytes()
        shard.write_bytes(raw.replace(b"IDAT", b"IDAX"))
    with pytest.raises(UserError, match=r"shard .* holds other bytes than were committed"):
        for step in (1, 2, 3):
            maker(step)


def test_a_node_cache_smaller_than_what_is_mixed_is_told_with_the_fix(root, tmp_path, caplog):
    data = DataConfig(
        modalities=("ct",), batch_size=8, node_cache=str(tmp_path / "c"), node_cache_bytes=1 << 30
    )
    text = cache_warning(data, {"ct": 10**9}, {"ct": 152e3})  # 8 virtual ranks mix 1024 images each
    assert text is not None and "1.2 GB of encoded samples" in text
    needed = int(text.partition("data.node_cache_bytes to ")[2].split()[0])
    enough = data.model_copy(update={"node_cache_bytes": needed})
    assert cache_warning(enough, {"ct": 10**9}, {"ct": 152e3}) is None
    assert cache_warning(data, {"ct": 5000}, {"ct": 152e3}) is None  # there are no more to mix
    assert cache_warning(data.model_copy(update={"node_cache": None}), {"ct": 10**9}, {"ct": 152e3}) is None

    sizes = catalog.mean_bytes(root)
    assert sizes["ct"] == np.mean(catalog.load(root, "ct", ["size"])["size"].to_pylist())
    own = make.config(root, energy_probability=0.0)
    small = own.data.model_copy(update={"node_cache": str(tmp_path / "c"), "node_cache_bytes": 1000})
    prepare(own.model_copy(update={"data": small}), tmp_path / "run")
    assert "mixed at a time" in caplog.text


def test_whole_images_are_read_in_blocks_and_are_those_of_one_read_each(root, monkeypatch):
    own = make.config(root).data.intensity["ct"]
    table, reader = catalog.load(root, "ct"), ShardReader(root)
    rows = Modality("ct", table)
    one_by_one = [whole_image(reader, "ct", rows.row(n), 48, own) for n in range(len(rows))]
    asked = []

    def counted(*of):
        asked.append(of)
        return read(*of)

    read = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", counted)
    keys, images, found = eval_images(root, "ct", 48, own)
    assert np.array_equal(images[:, 0], one_by_one) and list(keys) == found["key"].to_pylist()
    assert len(asked) < len(rows) / 2
