"""How batches are read: ahead, joined, through a node cache; equal whatever is set; damage named."""

import pyarrow as pa
import pytest

from shards.errors import UserError
from shards.tar import list_members
from tests.batches import make
from tests.batches.test_batches import same
from trainer.batches import BatchMaker
from trainer.config import OrderConfig, TrainConfig


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
