"""The bandwidth limit holds over every window and over all workers together."""

import itertools

import numpy as np
import pytest

from ingest.limits import TokenBucket


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_no_window_gets_more_than_its_rate_whoever_asks(workers):
    clock, rate, rng = Clock(), 1000.0, np.random.default_rng(workers)
    bucket = TokenBucket(rate, clock)
    grants, ready = [], [clock.now] * workers
    for _ in range(300):
        worker = int(np.argmin(ready))
        clock.now = max(clock.now, ready[worker])
        count = int(rng.integers(0, 3000))
        at = clock.now + bucket.reserve(count)
        grants.append((at, count))
        ready[worker] = at + float(rng.choice([0, 0, 7]))
    for first, last in itertools.combinations(range(len(grants)), 2):
        window = grants[last][0] - grants[first][0]
        assert sum(n for _, n in grants[first + 1 : last + 1]) <= rate * window * (1 + 1e-9) + 1e-3


def test_time_without_reads_saves_nothing_up():
    clock = Clock()
    bucket = TokenBucket(10, clock)
    clock.now += 1000
    assert bucket.reserve(100) == pytest.approx(10)
    assert bucket.reserve(100) == pytest.approx(20)
    assert bucket.reserve(0) == pytest.approx(20)


def test_a_rate_is_positive():
    with pytest.raises(ValueError):
        TokenBucket(0, Clock())
