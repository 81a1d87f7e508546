"""The order by blocks: every pass a permutation, reads near each other, the same batches on any world."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.order import Blocks, lane_draws, lane_steps, permute, permute_blocks, sample_at
from tests.batches import make
from trainer import checkpoint
from trainer.batches import BatchMaker, in_order, open_modality, plan_batch
from trainer.config import DataConfig, OrderConfig, TrainConfig, check_world

SIZES = st.integers(1, 40)
KEYS = st.integers(0, 2**64 - 1)


def whole_pass(n, key, blocks):
    return permute_blocks(np.arange(n), n, np.full(n, key, np.uint64), blocks)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 2000), b=SIZES, group=SIZES, key=KEYS)
def test_every_block_size_and_group_gives_a_permutation(n, b, group, key):
    assert np.array_equal(np.sort(whole_pass(n, key, Blocks(b, group))), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 3000), b=SIZES, group=SIZES, key=KEYS)
def test_a_group_of_positions_lies_in_its_own_blocks_but_for_the_ragged_tail(n, b, group, key):
    blocks = Blocks(b, group)
    found = whole_pass(n, key, blocks)
    if blocks.shuffle_all(n):
        assert np.array_equal(found, permute(np.arange(n), n, np.full(n, key, np.uint64)))
        return
    strays = 0
    for first in range(0, n, blocks.window):
        touched = np.bincount(found[first : first + blocks.window] // b)
        strays += max(0, np.count_nonzero(touched) - group)
    assert strays <= -n % b  # what walked on from behind n


@settings(max_examples=150, deadline=None)
@given(lanes=st.integers(1, 12), part=st.integers(1, 9), steps=st.integers(1, 40), windows=st.integers(1, 3))
def test_lanes_are_a_bijection_on_every_window_of_steps(lanes, part, steps, windows):
    per_step = lanes * part
    draws = np.arange(windows * steps * per_step)
    found = lane_draws(draws, per_step, lanes, steps)
    for one in found.reshape(windows, -1):
        assert np.array_equal(np.sort(one), np.arange(one.min(), one.min() + steps * per_step))
    of_a_lane = found.reshape(windows, steps, lanes, part).transpose(0, 2, 1, 3).reshape(windows, lanes, -1)
    assert (np.diff(of_a_lane) == 1).all()
    assert np.array_equal(lane_draws(draws, per_step, lanes, 1), draws)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), per_step=st.integers(1, 64), b=SIZES, group=SIZES)
def test_a_batch_holds_no_sample_twice_but_where_a_pass_ends(n, per_step, b, group):
    blocks = Blocks(b, group)
    steps = lane_steps(n, per_step, per_step, blocks)
    assert steps == 1 or steps * per_step <= n  # a window of lanes is no more than a pass
    draws = lane_draws(np.arange(per_step * 40), per_step, per_step, steps)
    index, passes = sample_at(draws, n, 3, "ct", blocks)
    assert len(set(zip(index.tolist(), passes.tolist(), strict=True))) == len(index)
    for t in range(40):
        assert np.ptp(passes[t * per_step : (t + 1) * per_step]) <= -(-per_step // n)


def test_golden_values_of_the_order_by_blocks_hold_over_versions():
    assert whole_pass(11, 7, Blocks(2, 2)).tolist() == [8, 9, 4, 10, 6, 7, 2, 3, 1, 0, 5]
    assert sample_at(10**12 + 7, 105_006_320, 42, "xr", Blocks(16, 64)) == (38397871, 9523)
    data = DataConfig(modalities=("ct",), batch_size=4, order=OrderConfig(block_samples=2, group_blocks=2))
    assert plan_batch(5, {"ct": 23}, data, 1, 0, 1)["ct"][0].tolist() == [15, 17, 13, 18]


def touched(data, n, steps, world, rank, per_shard):
    """Mean number of different shards that a rank reads in `steps` steps."""
    shards = set()
    for step in range(steps):
        shards |= set((plan_batch(step, {"ct": n}, data, 0, rank, world)["ct"][0] // per_shard).tolist())
    return len(shards)


def test_a_rank_reads_few_shards_at_a_time():
    n, world, steps = 1_000_000, 8, 64
    by_blocks = DataConfig(
        modalities=("ct",),
        batch_size=64,
        virtual_ranks=8,
        order=OrderConfig(block_samples=16, group_blocks=32),
    )
    by_key = by_blocks.model_copy(update={"order": OrderConfig(layout="keys")})
    near, far = (touched(data, n, steps, world, 3, 240) for data in (by_blocks, by_key))
    assert far > 450  # 512 draws, nearly all from a shard of their own
    assert near <= 2 * 33  # one group of 32 blocks, or two; a block may lie in two shards


COUNTS = {"ct": 299, "mr": 63, "us": 11}
LATTICE = [(16, None, (8, 2, 8), 1), (16, 8, (8, 2, 8), 3), (12, 4, (4, 1, 2), 2), (6, 6, (3, 6, 2), 1)]


@pytest.mark.parametrize(("share", "virtual", "worlds", "workers"), LATTICE)
def test_a_run_that_goes_on_with_other_ranks_and_workers_loses_and_repeats_no_sample(
    share, virtual, worlds, workers
):
    data = DataConfig(
        modalities=tuple(COUNTS),
        batch_size=3 * share,
        virtual_ranks=virtual,
        order=OrderConfig(block_samples=5, group_blocks=4),
    )
    seen = {m: Counter() for m in COUNTS}
    steps = 2 * (299 // share) + 9
    stops = [0, 7, steps // 2 + 1, steps]  # in no relation to windows or passes
    for world, first, end in zip(worlds, stops, stops[1:], strict=False):
        # Each of `workers` makers takes every workers-th step, on each rank.
        order = sorted(range(first, end), key=lambda s: ((s - first) % workers, s))
        for step in order:
            parts = [plan_batch(step, COUNTS, data, 9, rank, world) for rank in range(world)]
            alone = plan_batch(step, COUNTS, data, 9, 0, 1)
            for m in COUNTS:
                assert {len(part[m][0]) for part in parts} == {share // world}
                pairs = [p for part in parts for p in zip(*map(np.ndarray.tolist, part[m]), strict=True)]
                assert pairs == list(zip(*map(np.ndarray.tolist, alone[m]), strict=True))
                seen[m].update(pairs)
    for m, n in COUNTS.items():
        assert set(seen[m].values()) == {1}
        window = share * max(1, min(20 * data.lanes // share, n // share))
        complete = steps * share // window * window // n  # passes that lie in whole windows of lanes
        assert complete >= 1
        assert all((i, p) in seen[m] for p in range(complete) for i in range(n))


def test_virtual_ranks_that_do_not_fit_are_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"virtual_ranks=5 does not divide the 12 images of each modality"):
        DataConfig(modalities=("ct", "us"), batch_size=24, virtual_ranks=5)
    config = TrainConfig(
        data=DataConfig(modalities=("ct", "us"), batch_size=24, virtual_ranks=4), swav={"queue_length": 0}
    )
    with pytest.raises(UserError, match=r"3 ranks cannot share data.virtual_ranks=4 .* start 1, 2, 4 ranks"):
        check_world(config, 3)
    check_world(config, 2)


def test_a_run_from_before_there_were_blocks_goes_on_by_key_and_not_by_blocks():
    now = TrainConfig(swav={"queue_length": 0})
    old = now.model_dump(mode="json")
    del old["data"]["order"], old["data"]["virtual_ranks"]
    state = {"config": old, "dataset_fingerprint": "f"}
    with pytest.raises(UserError, match=r'data\.order\.layout was "keys", now "blocks"'):
        checkpoint.check_same_run(state, now, "f")
    by_key = now.model_copy(update={"data": DataConfig(order=OrderConfig(layout="keys"))})
    checkpoint.check_same_run(state, by_key, "f")


def test_samples_are_numbered_as_they_lie_in_the_shards(root):
    data = make.config(root).data
    placed = in_order(open_modality(data, "ct"), data)
    rows = [placed.row(i) for i in range(len(placed))]
    assert [(r["shard"], r["offset"]) for r in rows] == sorted((r["shard"], r["offset"]) for r in rows)
    by_key = data.model_copy(update={"order": OrderConfig(layout="keys")})
    assert in_order(placed, by_key) is placed


def test_batches_by_blocks_are_the_same_for_every_number_of_ranks(root, bands):
    small = OrderConfig(block_samples=2, group_blocks=2)
    config = make.config(root)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"order": small, "virtual_ranks": 4})}
    )
    one, two = BatchMaker(config, 0, 1, bands), [BatchMaker(config, r, 2, bands) for r in range(2)]
    for step in (0, 3):
        whole, parts = one(step), [maker(step) for maker in two]
        for m in range(3):
            keys = [k for part in parts for k in part.keys[2 * m : 2 * m + 2]]
            assert keys == list(whole.keys[4 * m : 4 * m + 4])
