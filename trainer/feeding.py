"""Between the makers of batches and the training loop: one batch ahead, and how many makers are enough.

The same for Ray actors (orchestration.feed) and for worker processes (trainer.workers). A batch is a pure
function of its step, so neither the number of makers nor who makes what changes a batch. No torch.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

if TYPE_CHECKING:
    from trainer.batches import Batch

MAXIMUM = 32  # makers of one rank, where they are counted automatically
WAIT_SHARE = 0.05  # of a step: below it there are enough makers
HEADROOM = 1.15  # makers that are never idle let the trainer wait whenever a batch takes a little longer
WINDOW, SETTLING = 8, 4  # steps measured together; steps left out after the number has changed
WINDOWS = 25  # then the number stays as it is
START_SECONDS = 60.0  # for a maker that was asked for: after that it has no place
AUTO = "auto"


Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]


def new_array(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.empty(shape, np.uint8)


def copied(array: NDArray[np.uint8], allocate: Allocate) -> NDArray[np.uint8]:
    """A copy in memory that `allocate` gives: never memory that somebody still holds."""
    copy = allocate(array.shape)
    np.copyto(copy, array)
    return copy


class Feed(Protocol):
    """Gives the batches of one step after the other; `count` makers are at work, `grow` asks for more."""

    @property
    def count(self) -> int: ...

    def __call__(self, step: int) -> "Batch": ...

    def grow(self, makers: int) -> None: ...

    def interrupt(self) -> None:
        """End the makers, from another thread than the one that reads: the read in progress fails."""

    def close(self) -> None: ...


def parse_count(text: str, option: str, at_least: int = 1) -> int | None:
    """A number, or None for `auto`. Raises UserError."""
    if text == AUTO:
        return None
    if not text.isdecimal() or int(text) < at_least:
        raise UserError(f"{option} {text!r}: give a number from {at_least} on, or {AUTO}")
    return int(text)


def most_makers(cpus: int, ranks: int) -> int:
    """Makers of each rank that the CPUs of a node are good for beside its `ranks`; one there always is."""
    return max(1, min(MAXIMUM, cpus // ranks - 1))


def own_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pace:
    """Finds the number of makers from the rates of the first steps.

    Every WINDOW steps: seconds that a maker takes for a batch over seconds that the trainer takes for a step,
    with some HEADROOM, where the trainer waits for more than WAIT_SHARE of its time; never above `most`.
    clock: seconds, read when the trainer asks for a batch (where steps run on a GPU it waits for them first)
    and when it has got it. say: takes one line for each change.
    """

    def __init__(
        self, most: int, say: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._most, self._say, self._clock = most, say, clock
        self._windows, self._makers, self._target = 0, 0, 0
        self._grown_at = 0.0
        self._asked_at: float | None = None
        self._given_at: float | None = None
        self._rows: list[tuple[float, float, float]] = []  # seconds: of the step, waited, of the maker
        self._skip = 0

    @property
    def done(self) -> bool:
        return self._windows >= WINDOWS

    def asked(self) -> None:
        """The trainer asks for its next batch: its step is over."""
        self._asked_at = self._clock()

    def given(self, making_seconds: float, makers: int) -> int | None:
        """The trainer got its batch from one of `makers`; a larger number of them where one is wanted."""
        now, before = self._clock(), self._given_at
        self._given_at = now
        if makers != self._makers:
            self._makers, self._skip = makers, SETTLING
            self._target = max(self._target, makers)
            self._rows.clear()
        if self._asked_at is None or before is None or self._skip > 0:
            self._skip -= 1
            return None
        self._rows.append((self._asked_at - before, now - self._asked_at, making_seconds))
        if len(self._rows) < WINDOW:
            return None
        rows, self._rows = self._rows, []
        if makers < self._target:  # those that were asked for are not at work yet
            if now - self._grown_at < START_SECONDS:
                return None
            self._most = self._target = makers
        self._windows += 1
        wanted = self._judge(rows)
        if wanted is not None:
            self._target, self._grown_at = wanted, now
        return wanted

    def _judge(self, rows: list[tuple[float, float, float]]) -> int | None:
        step, _, making = (statistics.median(column) for column in zip(*rows, strict=True))
        waited = sum(row[1] for row in rows)
        share = waited / max(waited + sum(row[0] for row in rows), 1e-9)
        if share <= WAIT_SHARE:
            return None
        now = self._makers
        wanted = min(self._most, max(now + 1, math.ceil(HEADROOM * making / max(step, 1e-6))))
        rates = f"{making:.3f} s a batch, {step:.3f} s a step, {100 * share:.0f} % of the time waited"
        if wanted <= now:
            self._windows = WINDOWS
            self._say(f"{rates}: {now} make batches, and there is no place for more")
            return None
        self._say(f"{rates}: {wanted} instead of {now} make batches now")
        return wanted


class Ahead:
    """`ahead(step)`: the feed's batch of that step, read (and copied) by a thread while the trainer works.

    So two batches are on the host beside those that the feed holds. Steps are asked for one after the other,
    from any first one; none from `stop` on. With a pace the feed grows as that one says. Closes the feed.
    Raises what the feed raises.
    """

    def __init__(self, feed: Feed, stop: int, pace: Pace | None = None) -> None:
        self._feed, self._stop, self._pace = feed, stop, pace
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next: deque[tuple[int, Future[Batch]]] = deque()
        self._growing: Future[None] | None = None

    def __call__(self, step: int) -> "Batch":
        pace = self._pace if self._pace is not None and not self._pace.done else None
        if pace is not None:
            pace.asked()
        if not self._next:
            self._read(step)
        first, future = self._next[0]
        if first != step:
            raise ValueError(f"batch {step} was asked for, {first} is next")
        batch = future.result()
        self._next.popleft()
        if self._growing is not None and self._growing.done():
            self._growing.result()
        if pace is not None:
            wanted = pace.given(batch.seconds.get("make", 0.0), self._feed.count)
            if wanted is not None:
                self._growing = self._pool.submit(self._feed.grow, wanted)
        if step + 1 < self._stop:
            self._read(step + 1)
        return batch

    def _read(self, step: int) -> None:
        self._next.append((step, self._pool.submit(self._feed, step)))

    def close(self) -> None:
        self._feed.interrupt()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._feed.close()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
