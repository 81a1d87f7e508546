"""Metrics of a run: settled among the ranks, written to metrics.jsonl, handed to the caller."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, journal
from trainer.attempts import Attempt
from trainer.config import TrainConfig
from trainer.distributed import mean_and_any
from trainer.step import is_logged

OnMetrics = Callable[[dict[str, float]], None]


class NotFiniteError(RuntimeError):
    """The loss or a weight is nan or infinite: going on is useless, the last good checkpoint is kept."""


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
    ) -> None:
        self.losses: list[float] = []
        self._config, self._attempt, self._rank, self._world = config, attempt, rank, world
        self._run_dir = attempt.run_dir
        self._device, self._on_metrics = device, on_metrics
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._wait_seconds, self._since, self._steps = 0.0, time.perf_counter(), 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.perf_counter()
        yield
        self._wait_seconds += time.perf_counter() - begin

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        self._pending.append((step, metrics))
        self._steps += 1

    def is_due(self, steps_done: int) -> bool:
        return self._device.type == "cpu" or is_logged(steps_done - 1, self._config)

    def settle(self, stop: bool) -> bool:
        """Write and report the pending steps; whether any rank wants to stop. Raises NotFiniteError."""
        local = [float(metrics["loss"]) for _, metrics in self._pending]
        losses, stopping = mean_and_any(local, stop, world=self._world, device=self._device)
        rows: list[dict[str, float]] = []
        for (step, metrics), loss in zip(self._pending, losses, strict=True):
            if not math.isfinite(loss):
                self._write(rows)
                raise not_finite("the loss", step, self._run_dir)
            numbers = {name: float(value) for name, value in metrics.items()}
            rows.append({"step": step, **numbers, "loss": loss})
        self._pending.clear()
        self._write(rows)
        self.losses += [row["loss"] for row in rows]
        for row in rows:
            if is_logged(int(row["step"]), self._config):
                self._report(row)
        return stopping

    def _write(self, rows: list[dict[str, float]]) -> None:
        if self._rank == 0:
            self._attempt.check()
            journal.append(journal.journal_path(self._run_dir), rows)

    def _report(self, row: dict[str, float]) -> None:
        now = time.perf_counter()
        steps = max(self._steps, 1)
        timing = {
            "step_seconds": (now - self._since) / steps,
            "wait_seconds": self._wait_seconds / steps,
            "samples": float(self._steps * self._config.data.batch_size),
        }
        self._since, self._wait_seconds, self._steps = now, 0.0, 0
        if self._on_metrics is not None:
            self._on_metrics({**row, **timing})


def not_finite(what: str, step: int, run_dir: Path) -> NotFiniteError:
    steps = checkpoint.list_steps(run_dir)
    kept = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
    return NotFiniteError(
        f"{what} is not finite after step {step}; {kept}. "
        "Start another run folder with a lower optim.learning_rate, more optim.warmup_steps or precision=fp32"
    )
