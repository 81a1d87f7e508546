"""Saving while training goes on: a copy of the state now, the files of it in a thread.

One save at most is in the making: the next one waits for it, and so do the end of a run and a stop. What a
save meets is raised at the next step, in the thread that trains.

A full disk does not end a run of weeks at once, as long as there is an older checkpoint to fall back on: the
save is tried again at its next interval, and after `checkpoint.full_disk_saves` of them in a row, or at the
last one, the run ends with one clear line.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, checkpoint_files
from trainer.attempts import Attempt
from trainer.config import CheckpointConfig
from trainer.files import DiskFullError

log = logging.getLogger(__name__)


class Stage:
    """Copies of a state in memory of the host, pinned where the state is on a GPU.

    The copies are those of the work that was queued before, whatever is queued after; they are there when
    wait() returns. The memory is used again by the next copy.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._event: torch.cuda.Event | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        old, self._buffers, on_gpu = self._buffers, {}, False
        for name, value in tensors.items():
            buffer = old.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            buffer.copy_(value.detach(), non_blocking=True)
            self._buffers[name] = buffer
            on_gpu |= value.is_cuda
        self._event = None
        if on_gpu:
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()
        return self._buffers

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Saver:
    """Of rank 0. before_commit: run when a checkpoint is written, before it gets its name."""

    def __init__(
        self, attempt: Attempt, config: CheckpointConfig, before_commit: Callable[[], None] = lambda: None
    ) -> None:
        self._attempt, self._config, self._before_commit = attempt, config, before_commit
        self._stage = Stage()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step, self._last = 0, False
        self._began, self._blocked, self._total = 0.0, 0.0, 0.0
        self._figures: dict[str, float] = {}
        self.failures = 0  # saves in a row that a full disk has failed

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, last: bool) -> None:
        """Checkpoint `step` of the state as it is now. last: returns when it is there, for no later one will
        make up for it. Raises what this save, or the one before, has met."""
        began = time.perf_counter()
        self.wait()
        self._attempt.check()
        self._began, self._step, self._last = began, step, last
        if self._config.async_save and not last:
            staged = self._stage.copy(tensors)
            self._thread = threading.Thread(target=self._write, args=(staged, state), name="checkpoint")
            self._thread.start()
            self._blocked = time.perf_counter() - began
            return
        self._write(tensors, state)
        self._blocked = time.perf_counter() - began
        self._settle()

    def check(self) -> None:
        """At each step: raise what a save has met that has ended since."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is in the making. Raises what it met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle()

    def close(self) -> None:
        """At the end of a run that may have failed: what is in the making gets done; nothing is raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is not None:
                log.warning("the checkpoint of step %d was not saved: %s", self._step, self._error)

    def figures(self) -> dict[str, float]:
        """For the metrics: seconds of a save that ended since the last call; saves in a row that failed."""
        found, self._figures = self._figures, {}
        return found | {"checkpoint_failures": float(self.failures)}

    def _write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        try:
            self._stage.wait()
            checkpoint.save(
                self._attempt.run_dir,
                self._step,
                tensors,
                state,
                keep=self._config.keep,
                keep_every=self._config.keep_every_steps,
                attempt=self._attempt,
                before_commit=self._before_commit,
            )
        except Exception as error:  # noqa: BLE001 - raised again in the thread that trains
            self._error = error
        self._total = time.perf_counter() - self._began

    def _settle(self) -> None:
        """Book a save that has ended. Raises what it met, but for a full disk that a later save may find
        mended."""
        error, self._error = self._error, None
        if error is None:
            self.failures = 0
            self._figures = {"checkpoint_seconds": self._total, "checkpoint_blocked_seconds": self._blocked}
            log.info(
                "checkpoint of step %d saved in %.2f s; training stood still for %.2f s",
                self._step,
                self._total,
                self._blocked,
            )
            return
        if not isinstance(error, DiskFullError):
            raise error
        self.failures += 1
        older = checkpoint_files.list_steps(self._attempt.run_dir)
        limit = self._config.full_disk_saves
        if self._last or not older or self.failures >= limit:
            which = f"{self.failures} in a row" if older else "there is none yet"
            raise DiskFullError(f"{error} (step {self._step}; {which})") from None
        log.warning(
            "WARNING: the checkpoint of step %d was NOT saved, the disk is full (%d in a row; the run ends "
            "after %d); training goes on, the newest checkpoint is step %d: free some space",
            self._step,
            self.failures,
            limit,
            older[-1],
        )
