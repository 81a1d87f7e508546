"""Metrics of a run: settled among the ranks, written to metrics.jsonl, handed to the caller."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import alarms, checkpoint, journal, run_state, trackers
from trainer.attempts import Attempt
from trainer.config import TrainConfig
from trainer.distributed import mean_and_any
from trainer.saver import Saver
from trainer.step import is_logged

log = logging.getLogger(__name__)
OnMetrics = Callable[[dict[str, float]], None]


class NotFiniteError(RuntimeError):
    """The loss, a gradient or a weight is nan or infinite: going on is useless, the last good checkpoint is
    kept."""


class Meter:
    """Metrics of steps that are not settled yet: on a GPU reading a number would wait for the step.

    On a CPU every step is settled at once; on a GPU the logged ones settle those before them.
    """

    def __init__(
        self,
        config: TrainConfig,
        attempt: Attempt,
        rank: int,
        world: int,
        device: torch.device,
        on_metrics: OnMetrics | None,
        start: int = 0,
    ) -> None:
        """start: the first step of this attempt; metrics.jsonl ends before it."""
        self.losses: list[float] = []
        self._config, self._attempt, self._rank, self._world = config, attempt, rank, world
        self._run_dir = attempt.run_dir
        self._device, self._on_metrics = device, on_metrics
        self._pending: list[tuple[int, dict[str, Any]]] = []
        # Rank 0 alone writes anything.
        self._watch = alarms.watch_of(self._run_dir, config) if rank == 0 else alarms.Watch(config)
        works = rank == 0 and start < config.max_steps
        self._journal = journal.Writer(journal.journal_path(self._run_dir)) if works else None
        # What is not the same when a run is repeated stands in a file of its own.
        self._timing = journal.Writer(run_state.timing_path(self._run_dir)) if works else None
        self._made: dict[str, float] = {}  # seconds of the makers of batches, by stage
        # Of rank 0: saves checkpoints, each when the rows that lead up to it are on the disk.
        self.saver = Saver(attempt, config.checkpoint, self._sync) if works else None
        self._trackers = trackers.open_trackers(config, self._run_dir, start) if works else []
        self._wait_seconds, self._since, self._steps = 0.0, time.perf_counter(), 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.perf_counter()
        yield
        self._wait_seconds += time.perf_counter() - begin

    def add(self, step: int, metrics: dict[str, Any], made: Mapping[str, float] | None = None) -> None:
        """made: seconds that the batch of this step took its maker, by stage."""
        self._pending.append((step, metrics))
        self._steps += 1
        for stage, seconds in (made or {}).items():
            self._made[stage] = self._made.get(stage, 0.0) + seconds

    def is_due(self, steps_done: int) -> bool:
        return self._device.type == "cpu" or is_logged(steps_done - 1, self._config)

    def settle(self, stop: bool) -> bool:
        """Write and report the pending steps; whether any rank wants to stop. Raises NotFiniteError, on every
        rank, that names the first step whose loss or gradient was not finite on any of them."""
        steps, numbers = [step for step, _ in self._pending], _on_host([m for _, m in self._pending])
        self._pending.clear()
        local = [m.pop(name) for name in ("loss", "bad_gradient") for m in numbers]
        shared, stopping = mean_and_any(local, stop, world=self._world, device=self._device)
        losses, bad = shared[: len(steps)], shared[len(steps) :]
        rows: list[dict[str, float]] = []
        for step, metrics, loss, bad_gradient in zip(steps, numbers, losses, bad, strict=True):
            if not math.isfinite(loss) or bad_gradient > 0:
                self._write(rows)
                if self.saver is not None:
                    self.saver.wait()  # the message names the last good checkpoint
                what = "a gradient" if math.isfinite(loss) else "the loss"
                raise not_finite(what, step, self._run_dir)
            rows.append({"step": step, **metrics, "loss": loss})
        self._write(rows)
        self.losses += [row["loss"] for row in rows]
        for row in rows:
            if is_logged(int(row["step"]), self._config):
                self._report(row)
        return stopping

    def _write(self, rows: list[dict[str, float]]) -> None:
        if self._journal is not None:
            self._attempt.check()
            self._journal.append(rows)
            events = [event for row in rows for event in self._watch.add(row)]
            for event in events:
                log.warning("%s", event.text())
            if events:
                journal.append(alarms.alarms_path(self._run_dir), [event.row() for event in events])

    def _report(self, row: dict[str, float]) -> None:
        now = time.perf_counter()
        steps = max(self._steps, 1)
        timing = {
            "step_seconds": (now - self._since) / steps,
            "wait_seconds": self._wait_seconds / steps,
            "samples": float(self._steps * self._config.data.batch_size),
        }
        if self.saver is not None:
            timing |= self.saver.figures()
        if self._timing is not None:
            made = {f"{stage}_seconds": seconds / steps for stage, seconds in self._made.items()}
            told = {"step": row["step"], "time": run_state.utc_now(), **timing, **made}
            self._timing.append([told])
        self._since, self._wait_seconds, self._steps, self._made = now, 0.0, 0, {}
        if self._on_metrics is not None:
            self._on_metrics({**row, **timing})
        for tracker in self._trackers:
            tracker.log(int(row["step"]), {**row, **timing})

    def _sync(self) -> None:
        if self._journal is not None:
            self._journal.sync()

    def close(self) -> None:
        if self.saver is not None:
            self.saver.close()
        if self._journal is not None:
            self._journal.close()
        if self._timing is not None:
            self._timing.close()
        for tracker in self._trackers:
            tracker.close()


def _on_host(steps: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The metrics of several steps as floats: one copy from the device, and one wait for it."""
    tensors = [value for metrics in steps for value in metrics.values() if isinstance(value, Tensor)]
    read = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else ())
    return [{n: next(read) if isinstance(v, Tensor) else float(v) for n, v in m.items()} for m in steps]


def not_finite(what: str, step: int, run_dir: Path) -> NotFiniteError:
    steps = checkpoint.list_steps(run_dir)
    kept = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
    return NotFiniteError(
        f"{what} is not finite after step {step}; {kept}. "
        "Start another run folder with a lower optim.learning_rate, more optim.warmup_steps or precision=fp32"
    )
