"""Stop or fail a writer at its N-th disk operation (write, fsync, rename, link, unlink, mkdir).

`killed(work, n)` runs `work()` in a forked child that gets SIGKILL when n operations are done, so that a
test can walk through n = 0, 1, 2, ... until the child completes. Forking from a warm process makes a child
cost milliseconds. `failing` and `short_writes` change the operations in this process.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shards.store import OPS


def killed(work: Callable[[], object], n: int, torn: bool = False) -> bool:
    """Run work() in a child, killed ahead of its operation number n (from 0). True: killed; False: completed.

    torn: if that operation is a write, half of its bytes are written first. Raises AssertionError where the
    child ended in any other way.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _arm(n, torn)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must never return into the caller's test runner
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, f"the child failed: status {status}"
    return False


def _arm(n: int, torn: bool) -> None:
    done = 0
    write = OPS.write

    def before(operation: str) -> None:
        nonlocal done
        if done == n:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    def torn_write(fd: int, data: bytes | memoryview) -> int:
        if done == n:
            os.write(fd, data[: len(data) // 2])
        return write(fd, data)

    OPS.before = before
    if torn:
        OPS.write = torn_write  # type: ignore[method-assign]


@contextmanager
def failing(n: int, number: int) -> Iterator[list[str]]:
    """Operation n (from 0) raises OSError(number), once. Gives the list of the operations that were begun."""
    begun: list[str] = []
    before = OPS.before

    def fail(operation: str) -> None:
        begun.append(operation)
        if len(begun) == n + 1:
            raise OSError(number, os.strerror(number))

    OPS.before = fail
    try:
        yield begun
    finally:
        OPS.before = before


@contextmanager
def short_writes(limit: int = 1000) -> Iterator[None]:
    """Every write takes at most `limit` bytes, as the system call may."""
    write = OPS.write
    OPS.write = lambda fd, data: write(fd, data[:limit])  # type: ignore[method-assign]
    try:
        yield
    finally:
        OPS.write = write  # type: ignore[method-assign]
