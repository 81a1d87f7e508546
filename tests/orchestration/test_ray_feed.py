"""Augmentation actors: the right batches in order, whatever dies."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from orchestration.cluster import connected
from orchestration.feed import Feed, rank_resources
from shards.errors import UserError
from trainer.batches import Batch

pytestmark = pytest.mark.ray
STEPS = 40


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected(cpus=4, object_store_bytes=150 * 2**20):
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
            assert feed.depth == min(3, STEPS - 1 - step)


def test_killed_actors_change_nothing(local_ray):
    with Feed(counting, (0,), feeders=2, stop=STEPS, cpus=0.5) as feed:
        before = {actor["pid"] for actor in feed.ready()}
        for step in range(STEPS):
            if step in (10, 20):
                for actor in feed.ready():
                    os.kill(actor["pid"], signal.SIGKILL)
            check(feed(step), step)
        assert not before & {actor["pid"] for actor in feed.ready()}


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
