"""Batches from processes: in order, the same bytes, whatever dies."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UserError
from tests.trainer.fake import FakeBatches, tiny
from trainer import workers
from trainer.batches import Batch
from trainer.workers import BatchWorkers

ROOT = Path(__file__).parents[2]


def feed(factory, n: int = 2, stop: int = 12, bands=None) -> BatchWorkers:
    return BatchWorkers(tiny(), 0, 1, bands, workers=n, stop=stop, factory=factory)


class NoTorch(FakeBatches):
    """Tells in the batch whether torch was imported in the worker."""

    def __call__(self, step: int) -> Batch:
        batch = super().__call__(step)
        batch.seconds["torch"] = float("torch" in sys.modules)
        return batch


class DiesOnce(FakeBatches):
    """The worker is killed at step 5, the first time; `bands` carries the folder that remembers it."""

    def __init__(self, config, rank, world, bands) -> None:
        super().__init__(config, rank, world)
        self.mark = Path(bands) / "died"

    def __call__(self, step: int) -> Batch:
        if step == 5 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(step)


class AlwaysDies(FakeBatches):
    def __call__(self, step: int) -> Batch:
        os._exit(7)


class Mistaken(FakeBatches):
    def __call__(self, step: int) -> Batch:
        if step == 1:
            raise UserError("shard x is missing: run ingest verify")
        return super().__call__(step)


def check_same(batch: Batch, expected: Batch) -> None:
    assert (batch.step, batch.keys) == (expected.step, expected.keys)
    for ours, theirs in zip(batch.crops, expected.crops, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("grown", [1, 3])
def test_batches_come_in_order_from_any_first_step_without_torch_in_the_workers(grown):
    plain = FakeBatches(tiny())
    with feed(NoTorch, 1) as next_batch:
        batches = [next_batch(step) for step in range(3, 5)]
        next_batch.grow(grown)
        batches += [next_batch(step) for step in range(5, 12)]
        pids = next_batch.pids
    for step, batch in enumerate(batches, start=3):
        check_same(batch, plain(step))
        assert batch.seconds["torch"] == 0 and batch.seconds["make"] > 0
    assert len(set(pids)) == grown
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_worker_is_replaced_and_its_batches_are_made_again(tmp_path):
    plain = FakeBatches(tiny())
    with feed(DiesOnce, bands=str(tmp_path)) as next_batch:
        for step in range(12):
            check_same(next_batch(step), plain(step))
    assert (tmp_path / "died").exists()


def test_a_worker_that_dies_again_and_again_stops_the_run():
    with (
        feed(AlwaysDies) as next_batch,
        pytest.raises(RuntimeError, match=r"died 3 times on step 0, .* code 7"),
    ):
        next_batch(0)


def test_a_mistake_in_a_worker_is_the_same_one_line():
    with feed(Mistaken) as next_batch:
        next_batch(0)
        with pytest.raises(UserError, match="run ingest verify"):
            next_batch(1)


PARENT = """
import sys
from tests.trainer.test_workers import FakeBatches, feed
next_batch = feed(FakeBatches)
next_batch(0)
print(*next_batch.pids, flush=True)
sys.stdin.read()
"""


def test_workers_of_a_killed_parent_end():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        handles = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(handles) == 2
    for handle in handles:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(60_000), "a worker lives on"
        os.close(handle)


def test_steps_are_asked_for_in_order():
    with feed(FakeBatches) as next_batch:
        next_batch(0)
        with pytest.raises(ValueError, match="batch 2 was asked for, 1 is next"):
            next_batch(2)


def test_too_little_shared_memory_is_told_before_a_worker_dies_of_it(monkeypatch):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with feed(FakeBatches) as next_batch, pytest.raises(UserError, match="/dev/shm has no room"):
        next_batch(0)
    said: list[str] = []
    with BatchWorkers(
        tiny(), 0, 1, None, workers=1, stop=12, factory=FakeBatches, say=said.append
    ) as growing:
        growing.grow(4)  # of its own accord a run does with less
    assert said == ["0 processes make batches: /dev/shm has no room for more"]
