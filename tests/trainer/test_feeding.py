"""One batch ahead, pinned copies, and the number of makers from the rates; without processes."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shards.errors import UserError
from tests.trainer.fake import FakeBatches, tiny
from trainer.batches import Batch
from trainer.compute import host_arrays, upload
from trainer.feeding import HEADROOM, WINDOW, Ahead, Pace, copied, most_makers, parse_count


class Recorded:
    """A feed without processes that notes what is asked of it."""

    def __init__(self, hangs_at: int = -1) -> None:
        self.count, self.asked, self.closed = 1, list[int](), list[str]()
        self._hangs_at, self._ended = hangs_at, threading.Event()
        self._make = FakeBatches(tiny())

    def __call__(self, step: int) -> Batch:
        self.asked.append(step)
        if step == self._hangs_at:
            assert self._ended.wait(30)
            raise RuntimeError("interrupted")
        return self._make(step)

    def grow(self, makers: int) -> None:
        self.count = makers

    def interrupt(self) -> None:
        self.closed.append("interrupted")
        self._ended.set()

    def close(self) -> None:
        self.closed.append("closed")


def test_the_next_batch_is_read_while_the_trainer_works_and_never_one_beyond_the_end():
    feed = Recorded()
    with Ahead(feed, stop=5) as ahead:
        for step in range(2, 5):
            assert ahead(step).step == step
            assert len(feed.asked) <= step - 2 + 2
    assert feed.asked == [2, 3, 4]
    assert feed.closed == ["interrupted", "closed"]


def test_steps_are_asked_for_one_after_the_other():
    with Ahead(Recorded(), stop=9) as ahead:
        ahead(3)
        with pytest.raises(ValueError, match="batch 5 was asked for, 4 is next"):
            ahead(5)


def test_a_close_ends_a_read_that_hangs_and_a_users_mistake_comes_through():
    feed = Recorded(hangs_at=1)
    with Ahead(feed, stop=9) as ahead:
        ahead(0)
    assert feed.closed == ["interrupted", "closed"]

    class Mistaken(Recorded):
        def __call__(self, step: int) -> Batch:
            raise UserError("shard x is missing")

    with Ahead(Mistaken(), stop=9) as ahead, pytest.raises(UserError, match="shard x is missing"):
        ahead(0)


def run(pace: Pace, clock: list[float], makers: int, *, step: float, making: float, n: int) -> Iterator[int]:
    """A trainer of `step` seconds and so many makers of `making` seconds each; what the pace asks for."""
    for _ in range(n):
        clock[0] += step
        pace.asked()
        clock[0] += max(0.0, making / makers - step)
        wanted = pace.given(making, makers)
        if wanted is not None:
            yield wanted


def test_the_number_of_makers_follows_from_the_rates_of_the_first_steps():
    clock, said = [0.0], list[str]()
    pace = Pace(16, said.append, lambda: clock[0])
    assert list(run(pace, clock, 1, step=0.1, making=0.5, n=WINDOW + 8)) == [6]  # 0.5 / 0.1 with headroom
    assert said == [
        "0.500 s a batch, 0.100 s a step, 80 % of the time waited: 6 instead of 1 make batches now"
    ]
    assert list(run(pace, clock, 1, step=0.1, making=0.5, n=20)) == []  # they are on their way
    assert list(run(pace, clock, 6, step=0.1, making=0.5, n=1000)) == []
    assert pace.done and len(said) == 1
    assert -(-HEADROOM * 0.5 // 0.1) == 6


def test_makers_are_bounded_and_added_one_by_one_where_the_rates_do_not_tell_why_the_trainer_waits():
    clock, said = [0.0], list[str]()
    pace = Pace(3, said.append, lambda: clock[0])
    assert list(run(pace, clock, 1, step=0.1, making=5.0, n=40)) == [3]
    assert list(run(pace, clock, 3, step=0.1, making=5.0, n=40)) == []
    assert pace.done and said[-1].endswith("3 make batches, and there is no place for more")
    other = Pace(9, said.append, lambda: clock[0])
    for _ in range(WINDOW + 8):  # a slow way to the trainer: making a batch costs nothing
        clock[0] += 0.1
        other.asked()
        clock[0] += 0.1
        wanted = other.given(0.001, 1)
        if wanted is not None:
            break
    assert wanted == 2


def test_makers_that_find_no_place_are_not_waited_for_for_ever():
    clock, said = [0.0], list[str]()
    pace = Pace(8, said.append, lambda: clock[0])
    assert list(run(pace, clock, 1, step=0.1, making=0.3, n=20)) == [4]
    assert list(run(pace, clock, 2, step=10.0, making=30.0, n=40)) == []
    assert pace.done and said[-1].endswith("2 make batches, and there is no place for more")


def test_the_cpus_of_a_node_are_shared_by_its_ranks():
    assert [most_makers(*given) for given in ((2, 2), (16, 1), (128, 8), (1000, 1))] == [1, 15, 15, 32]
    assert [parse_count(text, "--workers", 0) for text in ("auto", "0", "7")] == [None, 0, 7]
    for text in ("0", "-1", "many", "1.5", ""):
        with pytest.raises(UserError, match=r"--feeders .*: give a number from 1 on, or auto"):
            parse_count(text, "--feeders")


def test_a_batch_is_copied_once_on_its_way_to_the_device():
    cpu = torch.device("cpu")
    allocate = host_arrays(cpu)
    source = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    source.flags.writeable = False  # as in the object store
    ours = copied(source, allocate)
    tensor = upload(ours, cpu)
    assert tensor.data_ptr() == ours.ctypes.data != source.ctypes.data
    assert (tensor.numpy() == source).all()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it(kind):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device(kind)
    allocate, shape = host_arrays(device), (2, 8, 64, 64)
    held = [copied(np.full(shape, i, np.uint8), allocate) for i in range(3)]
    on_device = [upload(array, device) for array in held]
    if kind == "cuda":
        assert all(torch.from_numpy(array).is_pinned() for array in held)
    del held  # the copies to a GPU may still be under way
    later = [copied(np.full(shape, 100 + i, np.uint8), allocate) for i in range(3)]
    assert [int(t.unique()) for t in on_device] == [0, 1, 2]
    assert [int(array.max()) for array in later] == [100, 101, 102]
