"""Jobs of several processes, a few at a time: what `medswav compare` and `medswav evaluate experiment` run.

A job is made of commands, one after the other, each a process with one thread; their output goes to the job's
log. A job that fails does not stop the others; asked to stop, all processes are told to end and waited for.
"""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from orchestration.cluster import StopFlag
from orchestration.progress import Progress

POLL_SECONDS = 0.5
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class Job(Protocol):
    """steps: of work in all, for the progress; trained(): those done so far. commands(): each is asked for
    when the one before has ended well, and may then write what it needs."""

    @property
    def name(self) -> str: ...
    @property
    def log(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    def trained(self) -> int: ...
    def commands(self) -> Iterator[list[str]]: ...


def run_jobs(
    waiting: Sequence[Job],
    at_a_time: int,
    stop: StopFlag,
    stream: TextIO | None,
    *,
    what: str = "compare",
    unit: str = "steps",
    ended: str = "judged",
) -> list[str]:
    """Names of the jobs that failed. Ends its processes when asked to stop."""
    if not waiting:
        return []
    todo, running, failed = list(waiting), list[_Running](), list[str]()
    start = sum(job.trained() for job in waiting)
    total = sum(job.steps for job in waiting)
    told = (start, "")
    with Progress(what, total, unit, start=start, stream=stream, interval=30.0) as progress:
        while todo or running:
            while todo and len(running) < at_a_time and not stop:
                running.append(_Running(todo.pop(0)))
            for process in list(running):
                if process.ended():
                    running.remove(process)
                    failed += [process.name] if process.failed and not stop else []
            if stop:
                todo = []
                for process in running:
                    process.stop()
            done = len(waiting) - len(todo) - len(running)
            now = sum(job.trained() for job in waiting), f"{done} of {len(waiting)} {ended}"
            if now != told:
                progress.update(*now)
                told = now
            time.sleep(POLL_SECONDS)
    return failed


class _Running:
    """The processes of a job, one after the other."""

    def __init__(self, job: Job) -> None:
        self.name, self.failed = job.name, False
        self._left = job.commands()
        self._log = job.log.open("ab")
        self._process = self._started(next(self._left))

    def _started(self, command: list[str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,  # Ctrl-C reaches it once, through us; Linux shares cores by session
        )

    def ended(self) -> bool:
        """Whether everything is done, or one failed; goes on to the next command."""
        code = self._process.poll()
        if code is None:
            return False
        self.failed = code != 0
        command = None if self.failed else next(self._left, None)
        if command is not None:
            self._process = self._started(command)
            return False
        self._log.close()
        return True

    def stop(self) -> None:
        """A training writes a checkpoint first."""
        self._left = iter(())
        self._process.terminate()
