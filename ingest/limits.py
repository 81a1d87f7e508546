"""A limit on bytes per second over a whole job: who reads first reserves, waits, then reads."""

from collections.abc import Callable


class TokenBucket:
    """Reservations one after the other at `rate` bytes per second of `clock` (seconds).

    Nothing is saved up while idle: over any window the granted bytes are at most rate x window + one read.
    """

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        if rate <= 0:
            raise ValueError("a rate is above 0 bytes per second")
        self._rate, self._clock = rate, clock
        self._free = clock()

    def reserve(self, count: int) -> float:
        """Seconds to wait before reading `count` bytes."""
        now = self._clock()
        self._free = max(now, self._free) + max(0, count) / self._rate
        return self._free - now
