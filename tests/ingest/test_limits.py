"""The bandwidth limit holds over every window and over all workers together."""

import itertools
from functools import partial

import numpy as np
import pytest

from ingest.limits import LEASE_SECONDS, Meter, TokenBucket, parse_bytes
from shards.errors import UserError
from tests.ingest.files import config


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


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_reads_of_all_processes_together_stay_below_the_rate(workers):
    """Workers read in pieces as they like; a lease that is left lying is void a second later."""
    clock, rate, rng = Clock(), 1_000_000.0, np.random.default_rng(workers)
    bucket = TokenBucket(rate, clock)
    waits = [0.0] * workers  # what a worker was told to wait; its sleep lets the others go on
    meters = [Meter(bucket.reserve, rate, clock, partial(waits.__setitem__, w)) for w in range(workers)]
    ready, reads = [clock.now] * workers, []
    for _ in range(600):
        worker = int(np.argmin(ready))
        clock.now = max(clock.now, ready[worker])
        waits[worker] = 0.0
        got = meters[worker].take(int(rng.integers(1, 9000)))
        assert 0 < got <= meters[worker].lease_bytes
        reads.append((clock.now + waits[worker], got))
        ready[worker] = reads[-1][0] + float(rng.choice([0, 0, 0, 0.5, 3]))
    reads.sort()
    lease = meters[0].lease_bytes
    for first, last in itertools.combinations(range(len(reads)), 2):
        window = reads[last][0] - reads[first][0]
        total = sum(n for _, n in reads[first : last + 1])
        assert total <= rate * (window + LEASE_SECONDS) + lease
    granted, seconds = bucket.ledger()
    assert sum(n for _, n in reads) <= granted <= rate * seconds * (1 + 1e-9)


def test_a_lease_is_void_after_a_second_and_what_was_not_there_is_given_back():
    clock, leases = Clock(), []
    meter = Meter(lambda count: leases.append(count) or 0.0, 256 * 10_000, clock)
    assert (meter.take(0), leases) == (0, [])
    assert meter.take(6000) == 6000 and meter.take(6000) == 4000 and leases == [10_000]
    meter.take(1000)
    meter.give_back(400)
    assert meter.take(20_000) == 9400 and len(leases) == 2
    meter.take(1)
    clock.now += LEASE_SECONDS
    assert meter.take(20_000) == 10_000 and len(leases) == 4


@pytest.mark.parametrize(
    ("text", "count"),
    [("50MB", 50_000_000), ("1.5 GiB", 3 << 29), ("200", 200), ("64k", 64_000), ("8MB/s", 8_000_000)],
)
def test_amounts_are_written_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "fast", "-1", "50 apples", "1e9", "0"])
def test_a_wrong_amount_is_one_clear_line(tmp_path, text):
    with pytest.raises(UserError, match="bytes_per_second"):
        config(tmp_path, tmp_path / "out", bytes_per_second=text)


def test_the_limits_do_not_shape_the_dataset(tmp_path):
    plain = config(tmp_path, tmp_path / "out")
    limited = config(tmp_path, tmp_path / "out", bytes_per_second="50MB", open_files=3)
    assert plain.fingerprint() == limited.fingerprint()
