"""Small real runs for the tests of `medswav report` and `ls`: seconds of training on made-up batches."""

import dataclasses
import errno
from pathlib import Path

import numpy as np

from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import journal, run_state
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.loop import train


class OneImage(FakeBatches):
    """A detector that is dead: every image is the same grey."""

    def __call__(self, step: int) -> Batch:
        batch = super().__call__(step)
        return dataclasses.replace(batch, crops=tuple(np.full_like(crop, 128) for crop in batch.crops))


def config(**changes) -> TrainConfig:
    return tiny(**{"max_steps": 24, "log_every_steps": 2, "checkpoint__every_steps": 12, **changes})


def run(run_dir: Path, batches: type[FakeBatches] = FakeBatches, stop_after: int = 0, **changes) -> Path:
    """Train; stop_after: as on SIGTERM, after so many steps."""
    chosen, steps = config(**changes), iter(range(1, 1000))
    stop = (lambda: next(steps) >= stop_after) if stop_after else None
    train(chosen, batches(chosen), run_dir, dataset_fingerprint=FINGERPRINT, should_stop=stop)
    return run_dir


def starve(run_dir: Path, stage: str = "decode") -> Path:
    """As if `stage` of making a batch had taken most of each step."""
    path = run_state.timing_path(run_dir)
    rows = journal.read(path)
    slow = {"step_seconds": 2.0, "wait_seconds": 1.5, "read_seconds": 0.1, "decode_seconds": 0.1}
    changed = [{**row, **slow, "augment_seconds": 0.1, f"{stage}_seconds": 1.7} for row in rows]
    path.unlink()
    journal.append(path, changed)
    return run_dir


def full(operation: str, path: Path) -> None:
    """In place of trainer.files.before: nothing can be written any more."""
    if operation in ("write", "append"):
        raise OSError(errno.ENOSPC, "No space left on device")
