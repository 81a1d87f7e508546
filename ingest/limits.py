"""Limits on how a whole job reads its sources: bytes per second, and how many files are open at a time.

One TokenBucket grants all bytes of a job; each process takes small leases of it through a Meter and reads no
byte without one. Over any window of W seconds the reads that begin are at most rate x (W + 1) + one lease,
whatever the number of processes: a lease is void a second after its grant, and nothing is saved up. A killed
process takes its lease with it. Open files need no bookkeeping that a killed process could spoil: under
limits a process has one source file open at a time, and no more than `open_files` of them run at once.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LEASE_SECONDS = 1.0  # how long a lease holds
_LEASES_PER_SECOND = 256  # of the whole job: what the bucket has to answer, whatever the rate
_SMALLEST_LEASE, _LARGEST_LEASE = 4096, 8 << 20  # bytes
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?|)b?(?:/s|ps)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of `50MB`, `1.5GB`, `64KiB`, `200000`. Raises ValueError."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError("an amount of bytes is a number with B, KB, MB, GB, KiB, MiB or GiB, as 50MB")
    return round(float(match[1]) * _UNITS[match[2].lower()])


class TokenBucket:
    """Reservations one after the other at `rate` bytes per second of `clock` (seconds).

    Nothing is saved up while idle: over any window the granted bytes are at most rate x window + one read.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        if rate <= 0:
            raise ValueError("a rate is above 0 bytes per second")
        self._rate, self._clock = rate, clock
        self._began = self._free = clock()
        self._granted = 0

    def reserve(self, count: int) -> float:
        """Seconds to wait before reading `count` bytes."""
        now = self._clock()
        self._granted += max(0, count)
        self._free = max(now, self._free) + max(0, count) / self._rate
        return self._free - now

    def ledger(self) -> tuple[int, float]:
        """(bytes granted so far, seconds from the start to the last grant)."""
        return self._granted, self._free - self._began


class Meter:
    """What this process may read: leases of a bucket, spent read by read. Safe between threads.

    lease(bytes) -> seconds to wait, of a bucket anywhere; None: any number of bytes (a limit on open files
    alone). rate: bytes per second of the whole job.
    """

    def __init__(
        self,
        lease: Callable[[int], float] | None,
        rate: float = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._lease, self._clock, self._sleep = lease, clock, sleep
        wanted = _LARGEST_LEASE if lease is None else rate / _LEASES_PER_SECOND
        self.lease_bytes = int(min(_LARGEST_LEASE, max(_SMALLEST_LEASE, wanted)))
        self._left, self._void = 0, clock()
        self._lock = threading.Lock()

    def take(self, most: int) -> int:
        """Wait until something may be read; how many bytes, 1 to `most` (0 for 0)."""
        if self._lease is None or most <= 0:
            return max(0, most)
        with self._lock:
            if self._left <= 0 or self._clock() >= self._void:
                wait = self._lease(self.lease_bytes)
                if wait > 0:
                    self._sleep(wait)
                self._left, self._void = self.lease_bytes, self._clock() + LEASE_SECONDS
            taken = min(most, self._left)
            self._left -= taken
            return taken

    def give_back(self, count: int) -> None:
        """Bytes that were taken and not there to be read (the end of a file)."""
        with self._lock:
            self._left += count


_meter: Meter | None = None  # of this process


def current() -> Meter | None:
    """The meter that reads of sources go through; None: they are not limited."""
    return _meter


@contextmanager
def metered(meter: Meter | None) -> Iterator[None]:
    """Within it all reads of sources in this process go through `meter` (ingest.sources)."""
    global _meter
    before, _meter = _meter, meter
    try:
        yield
    finally:
        _meter = before


def own_meter(bytes_per_second: int | None, open_files: int | None) -> Meter | None:
    """The meter of a process that reads alone, as the header scan; None without limits."""
    if bytes_per_second is not None:
        return Meter(TokenBucket(bytes_per_second).reserve, bytes_per_second)
    return Meter(None) if open_files is not None else None
