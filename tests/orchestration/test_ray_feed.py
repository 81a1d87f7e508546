"""Augmentation actors: the right batches in order, whatever dies."""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest

from orchestration.bench_images import write_dataset
from orchestration.cluster import connected
from orchestration.feed import Feed, Feeders, make_batches, rank_resources
from shards.errors import UserError
from tests.batches import make
from tests.orchestration import jobs
from tests.trainer.fake import tiny
from tests.volumes import make as volumes
from trainer import journal
from trainer.batches import Batch, BatchMaker
from trainer.feeding import Ahead, Pace
from trainer.workers import BatchWorkers

pytestmark = pytest.mark.ray
STEPS = 40
STORE, LARGE = 150 * 2**20, 4 * 2**20


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected(cpus=4, object_store_bytes=STORE):
        yield


class Holder:
    def here(self) -> bool:
        return True


def counting(offset: int) -> Callable[[int], Batch]:
    """step -> a batch that tells its step; runs inside the actors."""

    def make(step: int) -> Batch:
        if step == 33 and offset == 7:
            raise UserError("shard 5 is missing: run ingest verify")
        crops = np.full((2, 3, 64, 64), (step + offset) % 251, np.uint8)
        return Batch(step, (crops,), ("ct",), ("a", "b", "c"), (0, 0, 0), {"read": 0.1})

    return make


def check(batch: Batch, step: int, offset: int = 0) -> None:
    assert batch.step == step
    assert (batch.crops[0] == (step + offset) % 251).all()


def test_batches_come_in_order_from_actors_without_torch(local_ray):
    with Feed(counting, (0,), feeders=2, stop=STEPS, cpus=0.5) as feed:
        assert [actor["torch"] for actor in feed.ready()] == [False, False]
        for step in range(5, STEPS):  # as after a resume
            check(feed(step), step)
            assert feed.depth == min(4, STEPS - 1 - step)


def test_killed_actors_change_nothing(local_ray):
    with Feed(counting, (0,), feeders=2, stop=STEPS, cpus=0.5) as feed:
        before = {actor["pid"] for actor in feed.ready()}
        for step in range(STEPS):
            if step in (10, 20):
                for actor in feed.ready():
                    os.kill(actor["pid"], signal.SIGKILL)
            check(feed(step), step)
        assert not before & {actor["pid"] for actor in feed.ready()}


def test_batches_of_volumes_are_those_made_here_whatever_dies(local_ray, tmp_path):
    root = volumes.dataset(tmp_path / "data", tmp_path / "scratch", train=4, held_out=0)
    config = volumes.config(root, views__energy_probability=0)
    here = BatchMaker(config, 0, 1, None)
    with Feed(make_batches, (config.model_dump_json(), 0, 1, None), feeders=1, stop=4, cpus=0.5) as feed:
        for step in range(4):
            if step == 2:
                os.kill(feed.ready()[0]["pid"], signal.SIGKILL)
            there, expected = feed(step), here(step)
            assert there.keys == expected.keys
            pairs = zip(there.crops, expected.crops, strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)


def test_actors_start_on_a_node_whose_cpus_are_all_taken(local_ray):
    import ray  # after `connected`, which sets what it reads

    # By the ranks, which reserve those of their actors as well.
    holder: Any = ray.remote(Holder).options(num_cpus=4).remote()
    try:
        assert ray.get(holder.here.remote(), timeout=60)
        with Feed(counting, (0,), feeders=2, stop=3) as feed:
            assert len(feed.ready(timeout=60)) == 2
    finally:
        ray.kill(holder)
    assert rank_resources(2, False) == {"CPU": 3} and rank_resources(1, True) == {"CPU": 2, "GPU": 1}


def test_a_batch_is_a_copy_that_may_be_written_to(local_ray):
    with Feed(counting, (0,), feeders=1, stop=3, cpus=0.5) as feed:
        batch = feed(0)
        batch.crops[0][:] = 200
        check(feed(1), 1)


def test_a_users_mistake_in_an_actor_stays_one_line(local_ray):
    with (
        Feed(counting, (7,), feeders=1, stop=STEPS, cpus=0.5) as feed,
        pytest.raises(UserError, match=r"^shard 5 is missing: run ingest verify$"),
    ):
        feed(33)


def test_more_actors_join_when_they_run_and_one_without_a_place_holds_up_nothing(local_ray):
    with Feed(counting, (0,), Feeders(1, 3), stop=10**6, cpus=3.0) as feed:  # of four
        check(feed(0), 0)
        feed.grow(3)
        steps = count(1)
        jobs.poll("one more actor", lambda: check(feed(step := next(steps)), step) or feed.count == 2)
        for step in range(next(steps), next(steps) + 30):
            check(feed(step), step)
        assert feed.count == 2 and feed.overflowing == 0


def test_a_training_that_waits_for_its_batches_grows_actors_and_keeps_its_losses(local_ray, tmp_path):
    """Four radiographs of 1200 px are decoded for each batch of eight, for a tiny network on small crops."""
    from trainer.loop import train  # torch

    write_dataset(tmp_path / "data", tmp_path / "scratch", 4, 1200, 1, "xr")
    data = {"dataset": str(tmp_path / "data"), "modalities": ["xr"], "batch_size": 8, "cache_bytes": 0}
    config = tiny(max_steps=3000, log_every_steps=1, data=data, views__geometry="paper")
    said: list[str] = []
    late: list[int] = []
    done: list[int] = []

    def several_made_the_last_batches() -> bool:
        late.extend([feed.count] * (feed.count > 1))
        return len(late) > 5

    feed = Feed(make_batches, (config.model_dump_json(), 0, 1, None), Feeders(1, 3), config.max_steps)
    with Ahead(feed, config.max_steps, Pace(3, said.append)) as ahead:
        grown = train(
            config,
            ahead,
            tmp_path / "auto",
            dataset_fingerprint="d",
            should_stop=several_made_the_last_batches,
        )
    print(*said, sep="\n")
    assert "instead of 1 make batches now" in said[0] and max(late) > 1
    maker = BatchMaker(config, 0, 1, None)

    def counted(step: int) -> Batch:
        done.append(step)
        return maker(step)

    alone = train(
        config,
        counted,
        tmp_path / "alone",
        dataset_fingerprint="d",
        should_stop=lambda: len(done) >= grown.step,
    )
    losses = [
        [row["loss"] for row in journal.read(journal.journal_path(tmp_path / name))]
        for name in ("auto", "alone")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == grown.step == alone.step


def test_memory_stays_bounded_with_a_consumer_that_stops(local_ray):
    """Of 10^6 batches that may be made, those in flight lie in the object store; nothing is spilled, though
    more bytes pass than it holds."""
    before, _ = store_bytes()
    with Feed(large, (), feeders=1, stop=10**6, cpus=0.5) as feed:
        for step in range(45):
            assert feed(step).step == step
            assert store_bytes()[0] < STORE
        # Ray gives back what is no longer held once a second.
        jobs.poll("three batches", lambda: 3 * LARGE <= store_bytes()[0] - before < 4 * LARGE)
        assert {store_bytes()[0] - before < 4 * LARGE for _ in range(20)} == {True}
        assert feed.depth == 3
    jobs.poll("an empty object store", lambda: store_bytes()[0] <= before)
    assert store_bytes()[1] == 0


def large() -> Callable[[int], Batch]:
    crops = np.zeros((LARGE,), np.uint8)  # small ones do not go through the object store
    return lambda step: Batch(step, (crops,), ("ct",), ("a",), (0,), {})


def store_bytes() -> tuple[int, int]:
    """In the object store of this node, and spilled so far."""
    import ray
    from ray._private.internal_api import node_stats

    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return stats.store_stats.object_store_bytes_used, stats.store_stats.spilled_bytes_total


def test_ray_actors_and_worker_processes_make_the_same_batches(local_ray, tmp_path):
    config = make.config(make.dataset(tmp_path / "data", tmp_path / "scratch"), energy_probability=0)
    plain = BatchMaker(config, 0, 1, None)
    with (
        Feed(make_batches, (config.model_dump_json(), 0, 1, None), feeders=1, stop=9, cpus=0.5) as feed,
        BatchWorkers(config, 0, 1, None, workers=1, stop=9) as workers,
    ):
        for step in range(5, 9):
            expected = plain(step)
            for batch in (feed(step), workers(step)):
                assert (batch.keys, batch.passes) == (expected.keys, expected.passes)
                for ours, theirs in zip(batch.crops, expected.crops, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
