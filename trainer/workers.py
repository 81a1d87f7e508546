"""Batches made ahead of time by processes of this machine: the feed of a run without Ray. Imports no torch.

A batch is a pure function of its step, so a worker holds no state worth saving: one that dies is started
again and makes the batches it owed. Pixels travel through shared memory, the rest of a batch through a pipe
of each worker's own; that pipe is multiprocessing's and carries its pickles, between this process and its own
children only. (A multiprocessing.Queue is shared by all: a worker killed inside it would block the others.)
"""

import atexit
import multiprocessing as mp
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from trainer.augment.bands import BandStatistics
from trainer.batches import Batch, BatchMaker
from trainer.config import TrainConfig
from trainer.feeding import Allocate, copied, new_array
from trainer.labels import LabelSet

MakeBatch = Callable[[int], Batch]
MAX_DEATHS = 3  # in a row, at the same step
_SHARED_MEMORY = Path("/dev/shm")


def make_batches(
    config: TrainConfig,
    rank: int,
    world: int,
    bands: Mapping[str, BandStatistics] | None,
    fingerprint: str | None = None,
    labels: Sequence[LabelSet] | None = None,
) -> MakeBatch:
    return BatchMaker(config, rank, world, bands, fingerprint, labels)


class BatchWorkers:
    """`feed(step)` gives the batch of `step`; after the first call, steps are asked for one after the other.

    factory(*args) gives step -> Batch inside each of `workers` spawned processes, each of which is asked for
    up to `depth` batches ahead; all start at the first call, and `grow` adds some. stop: the first step never
    asked for. allocate(shape): the uint8 array that pixels are copied to, once. Use it as a context manager.
    Raises UserError of the factory or a batch, and when /dev/shm is too small; RuntimeError when a worker
    dies again and again.
    """

    def __init__(
        self,
        config: TrainConfig,
        rank: int,
        world: int,
        bands: Mapping[str, BandStatistics] | None,
        *,
        workers: int,
        stop: int,
        depth: int = 2,
        factory: Callable[..., MakeBatch] = make_batches,
        allocate: Allocate = new_array,
        say: Callable[[str], None] = print,
    ) -> None:
        n = config.data.batch_size // world
        self._shapes = config.views.stack_shapes(n)
        self._task = (factory, (config, rank, world, bands), self._shapes)
        self._count, self._depth, self._stop = workers, depth, stop
        self._allocate, self._say = allocate, say
        self._workers: list[_Worker] = []
        self._owed: deque[tuple[int, _Worker]] = deque()  # steps in order, and who makes them
        self._next = self._unasked = -1

    def __enter__(self) -> "BatchWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def __call__(self, step: int) -> Batch:
        if not self._workers:
            self._start(step)
        if step != self._next:
            raise ValueError(f"batch {step} was asked for, {self._next} is next")
        _, worker = self._owed[0]
        batch = worker.take(step, self._allocate)
        self._owed.popleft()
        self._next += 1
        self._ask()
        return batch

    def grow(self, makers: int) -> None:
        """Start processes up to that number, as far as /dev/shm has room for their batches."""
        while len(self._workers) < makers:
            if not _has_room(self._depth * _nbytes(self._shapes)):
                self._say(f"{len(self._workers)} processes make batches: /dev/shm has no room for more")
                break
            self._workers.append(_Worker(self._task, self._depth))
        self._ask()

    def interrupt(self) -> None:
        for worker in self._workers:
            worker.interrupt()

    def close(self) -> None:
        """End the processes and free the shared memory; may be called twice."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _start(self, step: int) -> None:
        self._next = self._unasked = step
        needed = self._count * self._depth * _nbytes(self._shapes)
        if not _has_room(needed):
            raise UserError(
                f"/dev/shm has no room for {needed >> 20} MiB of batches: use fewer --workers, "
                "or give the container more (docker run --shm-size)"
            )
        atexit.register(self.close)  # before multiprocessing joins children that wait for us
        self.grow(self._count)

    def _ask(self) -> None:
        """Keep every worker busy: the next step is asked of the one that owes the fewest."""
        while self._workers and self._unasked < self._stop:
            worker = min(self._workers, key=lambda one: one.owes)
            if worker.owes >= self._depth:
                return
            worker.ask(self._unasked)
            self._owed.append((self._unasked, worker))
            self._unasked += 1


class _Worker:
    """One process, its pipe, its shared blocks (one a batch), and the steps that it owes."""

    def __init__(self, task: tuple[Any, ...], depth: int) -> None:
        self._task, self._shapes = task, task[2]
        self._blocks = [SharedMemory(create=True, size=_nbytes(self._shapes)) for _ in range(depth)]
        self._free = list(range(depth))
        self._owed: dict[int, int] = {}  # step: block, in order
        self._deaths, self._interrupted = 0, False
        self._spawn()

    @property
    def pid(self) -> int:
        return self._process.pid or -1

    @property
    def owes(self) -> int:
        return len(self._owed)

    def ask(self, step: int) -> None:
        block = self._free.pop()
        self._owed[step] = block
        self._send(step, block)

    def take(self, step: int, allocate: Allocate) -> Batch:
        """The oldest batch that is owed, which is `step`'s."""
        while True:
            try:
                kind, value = self._connection.recv()
            except (EOFError, ConnectionError):
                self._revive(step)
                continue
            if kind == "mistake":
                raise UserError(value)
            assert value.step == step
            block = self._owed.pop(step)
            self._deaths = 0
            crops = tuple(copied(view, allocate) for view in _views(self._blocks[block], self._shapes))
            self._free.append(block)
            return replace(value, crops=crops)

    def interrupt(self) -> None:
        self._interrupted = True
        self._process.kill()

    def close(self) -> None:
        self._connection.close()  # the worker sees the end of its pipe
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        for block in self._blocks:
            block.close()
            block.unlink()

    def _spawn(self) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        names = [block.name for block in self._blocks]
        self._process = context.Process(target=_work, args=(theirs, names, *self._task), daemon=True)
        self._process.start()
        theirs.close()  # ours must be the only other end, or its death would go unnoticed

    def _revive(self, step: int) -> None:
        if self._interrupted:
            raise RuntimeError(f"batch {step} was interrupted")
        self._deaths += 1
        self._process.join()
        self._connection.close()
        if self._deaths >= MAX_DEATHS:
            raise RuntimeError(
                f"a batch worker died {self._deaths} times on step {step}, "
                f"at last with exit code {self._process.exitcode}"
            )
        self._spawn()
        for owed, block in self._owed.items():
            self._send(owed, block)

    def _send(self, step: int, block: int) -> None:
        with suppress(ConnectionError):  # it died: `take` will notice and send all that is owed again
            self._connection.send((step, block))


def _work(
    connection: Connection,
    block_names: Sequence[str],
    factory: Callable[..., MakeBatch],
    args: tuple[Any, ...],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    """The body of a worker: it ends when its parent closes the pipe or dies. The parent answers signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    blocks = [SharedMemory(name) for name in block_names]
    try:
        make = factory(*args)
        while True:
            step, block = connection.recv()
            began = time.perf_counter()
            batch = make(step)
            for view, crop in zip(_views(blocks[block], shapes), batch.crops, strict=True):
                view[:] = crop
            seconds = batch.seconds | {"make": time.perf_counter() - began}
            connection.send(("batch", replace(batch, crops=(), seconds=seconds)))
    except UserError as error:
        connection.send(("mistake", str(error)))
    except (EOFError, ConnectionError):
        pass


def _views(block: SharedMemory, shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.uint8]]:
    """The arrays of one batch, one after the other in a block."""
    views, offset = [], 0
    for shape in shapes:
        views.append(np.ndarray(shape, np.uint8, buffer=block.buf, offset=offset))
        offset += int(np.prod(shape))
    return views


def _nbytes(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def _has_room(nbytes: int) -> bool:
    return not _SHARED_MEMORY.is_dir() or shutil.disk_usage(_SHARED_MEMORY).free >= nbytes
