"""Generated patients from several processes, in the order of the patients."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import cv2

Task = TypeVar("Task")
Written = TypeVar("Written")


def in_order(
    write: Callable[[Task], Written], tasks: Sequence[Task], workers: int, chunk: int = 4
) -> Iterator[Written]:
    """What `write`, a function of a module, gives for each task, whatever the order in which they end."""
    if workers <= 1:
        yield from map(write, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from pool.map(write, tasks, chunksize=chunk)


def _one_thread() -> None:
    cv2.setNumThreads(1)
