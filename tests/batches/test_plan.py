"""G14 and the elastic plan: pure functions of (seed, step, world)."""

from collections import Counter

import numpy as np
import pytest

from shards.errors import UserError
from trainer.batches import choose_reduce, plan_batch, plan_steps
from trainer.config import DataConfig, TrainConfig, ViewConfig, check_world

COUNTS = {"ct": 37, "mr": 8, "us": 5, "xr": 100}
DATA = DataConfig(modalities=tuple(COUNTS), batch_size=48)


def global_batch(step, world, seed=0):
    """{modality: [(index, pass), ...]} over all ranks, in rank order."""
    parts = [plan_batch(step, COUNTS, DATA, seed, rank, world) for rank in range(world)]
    return {
        m: [pair for part in parts for pair in zip(*(a.tolist() for a in part[m]), strict=True)]
        for m in COUNTS
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("step", [0, 1, 999_983])
def test_every_rank_holds_exactly_its_share_of_every_modality(world, step):
    for rank in range(world):
        plan = plan_batch(step, COUNTS, DATA, 0, rank, world)
        assert list(plan) == list(COUNTS)
        for m, (index, passes) in plan.items():
            assert len(index) == len(passes) == 48 // 4 // world
            assert index.min() >= 0 and index.max() < COUNTS[m]


@pytest.mark.parametrize("step", [0, 7, 123_456])
def test_the_global_batch_does_not_depend_on_the_world_size(step):
    one = global_batch(step, 1)
    assert all(global_batch(step, world) == one for world in (2, 3, 4, 6, 12))


@pytest.mark.parametrize("worlds", [(1,), (4, 2, 3), (12, 1)])
def test_every_sample_comes_once_per_pass_also_when_the_world_size_changes(worlds):
    steps = 37 * 4
    seen = {m: Counter() for m in COUNTS}
    for step in range(steps):
        for m, pairs in global_batch(step, worlds[step % len(worlds)]).items():
            seen[m].update(pairs)
    for m, n in COUNTS.items():
        draws = steps * 12
        assert set(seen[m].values()) == {1}  # no (sample, pass) twice
        complete = [(i, p) for p in range(draws // n) for i in range(n)]
        assert set(complete) <= set(seen[m])  # none missing


@pytest.mark.parametrize("seed", [0, 1, 2**31])
@pytest.mark.parametrize("first", [0, 5, 999_983])
@pytest.mark.parametrize("world", [1, 4, 12])
def test_steps_planned_together_are_those_planned_one_by_one(seed, first, world):
    for rank in {0, world - 1}:
        many = plan_steps(range(first, first + 6), COUNTS, DATA, seed, rank, world)
        for row in range(6):
            one = plan_batch(first + row, COUNTS, DATA, seed, rank, world)
            assert list(one) == list(many)
            assert all(np.array_equal(one[m][i], many[m][i][row]) for m in COUNTS for i in (0, 1))


def test_passes_are_shuffled_anew_and_seeds_differ():
    orders = [[i for s in range(37) for i, p in global_batch(s, 1)["ct"] if p == number] for number in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(37))
    assert orders[0] != orders[1]
    assert global_batch(0, 1, seed=0) != global_batch(0, 1, seed=1)


def test_batch_sizes_that_do_not_divide_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="use 48 or 52"):
        DataConfig(modalities=tuple(COUNTS), batch_size=50)
    with pytest.raises(UserError, match="multiple of 20"):
        check_world(TrainConfig(data=DATA, swav={"queue_length": 0}), 5)
    with pytest.raises(ValueError, match="equal part"):
        plan_batch(0, COUNTS, DATA, 0, 0, 5)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        plan_batch(0, COUNTS, DATA, 0, 2, 2)


def test_decoding_goes_only_as_far_as_the_finest_view_needs():
    table = ViewConfig()
    # 92 px for 5 % of the inner area of a square image: 514 px a side; 224 px for 14 %: 748 px
    assert choose_reduce((512, 512), table, (600, 1200)) == 0
    assert choose_reduce((1400, 1400), table, (600, 1200)) == 0
    assert choose_reduce((1500, 1500), table, (600, 1200)) == 1
    assert choose_reduce((3000, 3000), table, (600, 1200)) == 2
    assert choose_reduce((9000, 9000), table, (600, 1200)) == 2
    paper = ViewConfig(geometry="paper")
    assert choose_reduce((2399, 1000), paper, (600, 1200)) == 0
    assert choose_reduce((2400, 1000), paper, (600, 1200)) == 1
    for side in np.arange(300, 4000, 77).tolist():
        reduce = choose_reduce((side, side), table, (600, 1200))
        assert reduce == 0 or side / 2**reduce >= 748
