"""G11 without Ray: kill -9 of the training process at random moments, also while a checkpoint is written.

The moment is drawn in time and not in steps, so it falls into a step, into the copy of the state, or into any
write of the background thread. `MEDSWAV_CHAOS_SEED` draws other ones.
"""

import hashlib
import multiprocessing as mp
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.trainer.fake import FakeBatches, tiny
from tests.trainer.test_resume import encoder_bytes, losses, run
from trainer import checkpoint
from trainer.attempts import ReplacedError
from trainer.config import TrainConfig

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
STEPS, KILLS, DEADLINE_SECONDS = 400, 20, 300


def config() -> TrainConfig:
    return tiny(max_steps=STEPS, checkpoint__every_steps=4, log_every_steps=10)


def _train(run_dir: str, sender: Connection | None = None) -> None:
    torch.set_num_threads(1)
    try:
        run(Path(run_dir), config(), FakeBatches(config()))
    except ReplacedError as error:
        assert sender is not None
        sender.send(str(error))


def start(run_dir: Path, sender: Connection | None = None) -> BaseProcess:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trainer.loop"])
    process = context.Process(target=_train, args=(str(run_dir), sender), daemon=True)
    process.start()
    return process


def done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(run_dir: Path, steps: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while done(run_dir) < steps:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    process = start(run_dir)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0
    return run_dir


def test_twenty_kills_at_random_moments_change_no_loss(tmp_path, straight):
    seed = int(os.environ.get("MEDSWAV_CHAOS_SEED", "1"))
    draw, halfway = random.Random(seed), 0
    steps = sorted(draw.sample(range(2, STEPS - 50), KILLS))
    process = start(tmp_path)
    for step in steps:
        wait_for(tmp_path, step, process)
        time.sleep(draw.random() * 0.2)  # some steps long
        process.kill()
        process.join()
        halfway += any(".tmp-" in path.name for path in checkpoint.folder(tmp_path).glob("*"))
        process = start(tmp_path)
    process.join(DEADLINE_SECONDS)
    print(f"seed {seed}: killed after steps {steps}, {halfway} times in the middle of a checkpoint")
    assert process.exitcode == 0
    assert losses(tmp_path) == losses(straight) and len(losses(tmp_path)) == STEPS
    assert encoder_bytes(tmp_path) == encoder_bytes(straight)


def test_an_attempt_that_was_asleep_while_another_went_on_writes_nothing(tmp_path, straight):
    """As on a node that was cut off and comes back."""
    receiver, sender = mp.Pipe(duplex=False)
    older = start(tmp_path, sender)
    wait_for(tmp_path, 21, older)
    assert older.pid is not None
    os.kill(older.pid, signal.SIGSTOP)
    newer = start(tmp_path)
    newer.join(DEADLINE_SECONDS)
    assert newer.exitcode == 0
    before = contents(tmp_path)
    os.kill(older.pid, signal.SIGCONT)
    older.join(DEADLINE_SECONDS)
    assert older.exitcode == 0 and receiver.poll()
    assert "another process has continued this run (attempt 2, this is attempt 1)" in receiver.recv()
    assert contents(tmp_path) == before
    assert losses(tmp_path) == losses(straight) and encoder_bytes(tmp_path) == encoder_bytes(straight)


def contents(run_dir: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file()
    }
