"""G11 and the promises of the loop: an interrupted run gives exactly the losses of one that was not."""

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from shards.errors import UserError
from tests.dist import exit_code, run_ranks
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import checkpoint, files, journal
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.distributed import RankZeroError, from_rank_zero
from trainer.loop import TrainResult, train
from trainer.meter import NotFiniteError

ROOT = Path(__file__).parents[2]


def run(run_dir: Path, config: TrainConfig | None = None, next_batch=None, **options) -> TrainResult:
    config = config or tiny()
    options = {"dataset_fingerprint": FINGERPRINT, **options}
    return train(config, next_batch or FakeBatches(config), run_dir, **options)


def losses(run_dir: Path) -> list[float]:
    rows = journal.read(journal.journal_path(run_dir))
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def stop_after(n: int):
    """A should_stop that says yes when it is asked for the n-th time."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= n


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    run(run_dir)
    return run_dir


def _killed_at(run_dir: str, victim: int) -> None:
    batches = FakeBatches(tiny())

    def next_batch(step: int) -> Batch:
        if step == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(step)

    run(Path(run_dir), next_batch=next_batch)


@pytest.mark.parametrize("step", [1, 7])
def test_killed_trainer_goes_on_with_exactly_the_same_losses(tmp_path, straight, step):
    assert exit_code(_killed_at, str(tmp_path), step) == -signal.SIGKILL
    assert len(losses(tmp_path)) == step
    run(tmp_path)
    assert losses(tmp_path) == losses(straight)
    assert encoder_bytes(tmp_path) == encoder_bytes(straight)


def test_one_sinkhorn_for_all_goes_on_exactly_and_reports_under_one_name(tmp_path):
    config, seen = tiny(swav__groups="shared"), []
    run(tmp_path / "straight", config, on_metrics=seen.append)
    run(tmp_path / "stopped", config, should_stop=stop_after(5))
    run(tmp_path / "stopped", config)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert encoder_bytes(tmp_path / "stopped") == encoder_bytes(tmp_path / "straight")
    names = {name.split("/")[1] for metrics in seen for name in metrics if name.startswith("m/")}
    assert names == {"all"}
    with pytest.raises(UserError, match=r"swav\.groups was"):
        run(tmp_path / "straight")


def encoder_bytes(run_dir: Path) -> bytes:
    return (run_dir / "encoder.safetensors").read_bytes()


def test_one_of_two_ranks_killed_and_the_job_goes_on_exactly(tmp_path):
    run_ranks(_rank, 2, str(tmp_path / "straight"), 1000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.trainer.driver", str(tmp_path / "killed"), "8", "1"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=200, check=False).returncode != 0
    assert checkpoint.list_steps(tmp_path / "killed") in ([3], [3, 6])  # 6: it may be in the making
    run_ranks(_rank, 2, str(tmp_path / "killed"), 1000)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert encoder_bytes(tmp_path / "killed") == encoder_bytes(tmp_path / "straight")


def test_a_stop_saves_that_step_and_goes_on_exactly(tmp_path, straight):
    stopped = run(tmp_path, should_stop=stop_after(5))
    assert (stopped.step, stopped.finished) == (5, False)
    assert checkpoint.list_steps(tmp_path)[-1] == 5
    resumed = run(tmp_path)
    assert (resumed.started_at, resumed.finished) == (5, True)
    assert stopped.losses + resumed.losses == losses(tmp_path) == losses(straight)


def test_a_corrupted_newest_checkpoint_falls_back_to_the_one_before(tmp_path, straight):
    run(tmp_path, should_stop=stop_after(7))
    tensors = checkpoint.path_of(tmp_path, 7) / checkpoint.TENSORS
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    assert run(tmp_path).started_at == 6
    assert losses(tmp_path) == losses(straight)


def test_a_complete_run_returns_at_once_and_says_so(straight):
    def never(step: int) -> Batch:
        raise AssertionError("a batch was asked for")

    before = encoder_bytes(straight)
    result = run(straight, next_batch=never)
    assert (result.finished, result.was_complete, result.step) == (True, True, 12)
    assert encoder_bytes(straight) == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny(optim__learning_rate=1e30, optim__optimizer="larc-sgd", optim__larc_trust=1e30)
    with pytest.raises(NotFiniteError, match="not finite after step"):
        run(tmp_path, config)
    for step in checkpoint.list_steps(tmp_path):
        tensors = checkpoint.load(tmp_path, step).part("model")
        assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("every", [1, 5])
def test_a_loss_that_is_not_finite_on_a_logged_step_is_told_as_such(tmp_path, every):
    config = tiny(
        log_every_steps=every,
        optim__learning_rate=1e30,
        optim__optimizer="larc-sgd",
        optim__larc_trust=1e30,
    )
    with pytest.raises(NotFiniteError, match="not finite after step"):
        run(tmp_path, config)


def test_settings_that_change_no_sample_may_change_on_resume(tmp_path, straight):
    run(tmp_path, should_stop=stop_after(4))
    run(
        tmp_path,
        tiny(log_every_steps=3, checkpoint__every_steps=5, checkpoint__keep=1, data__dataset="moved"),
    )
    assert losses(tmp_path) == pytest.approx(losses(straight), abs=1e-6)
    assert checkpoint.list_steps(tmp_path) == [12]


@pytest.mark.parametrize(
    ("config", "fingerprint", "text"),
    [
        (
            tiny(optim__learning_rate=0.5, seed=3),
            FINGERPRINT,
            r"learning_rate was 0\.002, now 0\.5; seed was 0",
        ),
        (tiny(), "other", "another dataset: fingerprint was madeup, now other"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_name(tmp_path, config, fingerprint, text):
    run(tmp_path, should_stop=stop_after(2))
    before = losses(tmp_path)
    with pytest.raises(UserError, match=text):
        run(tmp_path, config, dataset_fingerprint=fingerprint)
    assert losses(tmp_path) == before


def test_metrics_hold_all_names_on_logged_steps_and_count_every_sample(tmp_path):
    seen: list[dict[str, float]] = []
    run(tmp_path, on_metrics=seen.append)
    assert [m["step"] for m in seen] == [0, 4, 8, 11]
    assert sum(m["samples"] for m in seen) == 12 * 8
    names = {"loss", "loss_minus_ln_k", "learning_rate", "step_seconds", "wait_seconds"}
    assert all(names | {"m/ct/dead_prototypes", "m/xr/effective_rank"} <= m.keys() for m in seen)


def test_a_batch_of_another_shape_is_not_trained_on(tmp_path):
    with pytest.raises(ValueError, match="batch 0 is not as configured"):
        run(tmp_path, next_batch=FakeBatches(tiny(data__batch_size=16)))


def test_threads_and_determinism_are_put_back(tmp_path):
    def arrangement() -> tuple[int, bool]:
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    before, seen, batches = arrangement(), [], FakeBatches(tiny())

    def next_batch(step: int) -> Batch:
        seen.append(arrangement())
        return batches(step)

    run(tmp_path, tiny(max_steps=1, threads=before[0] + 1), next_batch)
    assert seen == [(before[0] + 1, True)] and arrangement() == before


def _rank(rank: int, world: int, run_dir: str, stop_step: int) -> tuple[int, bool, list[str]]:
    """Rank 1 alone sees the signal, after stop_step steps."""
    config = tiny()
    keys: list[str] = []
    batches = FakeBatches(config, rank, world)

    def next_batch(step: int) -> Batch:
        batch = batches(step)
        keys.extend(batch.keys)
        return batch

    should_stop = stop_after(stop_step) if rank == world - 1 else None
    result = run(Path(run_dir), config, next_batch, rank=rank, world=world, should_stop=should_stop)
    return result.step, result.finished, keys


def test_all_ranks_stop_after_the_same_step_and_another_world_size_goes_on(tmp_path):
    first = run_ranks(_rank, 2, str(tmp_path), 5)
    assert [(step, finished) for step, finished, _ in first] == [(5, False), (5, False)]
    keys = first[0][2] + first[1][2]
    more: list[str] = []
    batches = FakeBatches(tiny())

    def next_batch(step: int) -> Batch:
        more.extend(batches(step).keys)
        return batches(step)

    resumed = run(tmp_path, next_batch=next_batch)
    assert (resumed.started_at, resumed.finished) == (5, True)
    assert sorted(keys + more) == sorted(f"{m}{i}" for m in ("ct", "xr") for i in range(12 * 4))
    assert len(losses(tmp_path)) == 12


def _counted_rank(rank: int, world: int, run_dir: str, stop_step: int) -> tuple[list[float], list[Counter]]:
    config = tiny(max_steps=7, checkpoint__every_steps=2, data__batch_size=12, swav__queue_length=24)
    batches, counts = FakeBatches(config, rank, world), []

    def next_batch(step: int) -> Batch:
        batch = batches(step)
        counts.append(Counter(key[:2] for key in batch.keys))
        return batch

    should_stop = stop_after(stop_step)
    result = run(Path(run_dir), config, next_batch, rank=rank, world=world, should_stop=should_stop)
    return result.losses, counts


def test_three_ranks_go_on_exactly_with_equal_parts_of_each_modality(tmp_path):
    straight = run_ranks(_counted_rank, 3, str(tmp_path / "straight"), 1000)
    first = run_ranks(_counted_rank, 3, str(tmp_path / "stopped"), 3)
    rest = run_ranks(_counted_rank, 3, str(tmp_path / "stopped"), 1000)
    assert (len(first[0][0]), len(rest[0][0])) == (3, 4)
    assert first[0][0] + rest[0][0] == straight[0][0]
    for _, counts in first + rest:  # G14, before and after the resume, on every rank
        assert counts and all(count == {"ct": 2, "xr": 2} for count in counts)


def _refused_rank(rank: int, world: int, run_dir: str) -> str:
    with pytest.raises(UserError) as caught:
        run(Path(run_dir), tiny(seed=9), rank=rank, world=world)
    return type(caught.value).__name__ + str(caught.value)


def test_rank_zero_refuses_for_all(tmp_path):
    run(tmp_path, should_stop=stop_after(1))
    texts = run_ranks(_refused_rank, 2, str(tmp_path))
    assert texts[0].startswith("UserError") and texts[1].startswith("ReportedError")
    assert all("seed was 0, now 9" in text for text in texts)


@pytest.mark.parametrize("at", [5, 11])
def test_an_older_attempt_writes_nothing_once_a_newer_one_has_begun(tmp_path, straight, at):
    batches = FakeBatches(tiny())
    newer: list[TrainResult] = []

    def next_batch(step: int) -> Batch:
        if step == at and not newer:
            newer.append(run(tmp_path))
        return batches(step)

    with pytest.raises(UserError, match="another process has continued this run"):
        run(tmp_path, next_batch=next_batch)
    assert newer[0].finished and newer[0].started_at == at // 3 * 3
    assert losses(tmp_path) == losses(straight)
    assert encoder_bytes(tmp_path) == encoder_bytes(straight)
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == ["000001", "000002"]


def test_a_refused_command_does_not_stop_the_attempt_that_is_at_work(tmp_path):
    batches = FakeBatches(tiny())

    def next_batch(step: int) -> Batch:
        if step == 5:
            with pytest.raises(UserError, match="other settings"):
                run(tmp_path, tiny(seed=3))
        return batches(step)

    assert run(tmp_path, next_batch=next_batch).finished


def test_other_band_statistics_are_refused_on_resume(tmp_path):
    run(tmp_path, should_stop=stop_after(4), bands_digest="a")
    with pytest.raises(UserError, match="band statistics are not those that the run began with"):
        run(tmp_path, bands_digest="b")
    assert run(tmp_path, bands_digest="a").started_at == 4


def test_a_full_disk_on_resume_is_one_clear_line_and_leaves_nothing(tmp_path, straight, monkeypatch):
    run(tmp_path, should_stop=stop_after(4))
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(operation: str, path: Path) -> None:
        if operation == "fsync" and "metrics" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "before", full)
        with pytest.raises(UserError, match="disk full while writing metrics"):
            run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "metrics.jsonl.tmp-0123").touch()  # of a process that was killed
    run(tmp_path)
    assert not list(tmp_path.glob("*.tmp-*"))
    assert losses(tmp_path) == losses(straight)


def _failed_rank(rank: int, world: int) -> str:
    def decide() -> dict[str, int]:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises((OSError, RankZeroError)) as caught:
        from_rank_zero(decide, rank=rank, world=world, device=torch.device("cpu"))
    return type(caught.value).__name__


def test_a_failure_of_rank_zero_reaches_every_rank():
    assert run_ranks(_failed_rank, 2) == ["OSError", "RankZeroError"]
