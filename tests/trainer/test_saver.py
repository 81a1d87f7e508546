"""A save in the background: the values of its step, errors told at the next one, a full disk survived."""

import errno
import json
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shards.errors import UserError
from tests.dist import run_ranks
from tests.trainer.fake import FakeBatches, tiny
from tests.trainer.test_resume import encoder_bytes, losses, run, stop_after
from trainer import attempts, checkpoint, checkpoint_files, files, journal
from trainer.batches import Batch
from trainer.config import CheckpointConfig
from trainer.distributed import tensors_from_rank_zero
from trainer.files import DiskFullError
from trainer.saver import Saver

DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Saved while training waits."""
    run_dir = tmp_path_factory.mktemp("straight")
    run(run_dir, tiny(checkpoint__async_save=False, checkpoint__keep=9))
    return run_dir


def fill_disk(monkeypatch, times: int = 1000, name: str = "state.safetensors") -> list[Path]:
    """The next `times` writes of a file of this name fail; the paths that were tried."""
    tried: list[Path] = []

    def before(operation: str, path: Path) -> None:
        if operation == "write" and path.name == name:
            tried.append(path)
            if len(tried) <= times:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "before", before)
    return tried


def test_a_save_in_the_background_holds_the_values_of_its_step_bit_for_bit(tmp_path, straight, monkeypatch):
    """The save of step 3 writes nothing before step 5 is done, and the step goes on meanwhile."""
    released, threads = threading.Event(), set()

    def before(operation: str, path: Path) -> None:
        if operation == "write" and path.name == checkpoint.TENSORS:
            threads.add(threading.current_thread().name)
            assert released.wait(DEADLINE_SECONDS)

    batches = FakeBatches(tiny())

    def next_batch(step: int) -> Batch:
        if step == 5:
            assert checkpoint.list_steps(tmp_path) == []
            released.set()
        return batches(step)

    monkeypatch.setattr(files, "before", before)
    assert run(tmp_path, tiny(checkpoint__keep=9), next_batch).finished
    assert "checkpoint" in threads and checkpoint.list_steps(tmp_path) == [3, 6, 9, 12]
    for step in (3, 6, 9, 12):
        mine, reference = (checkpoint.load(path, step).tensors for path in (tmp_path, straight))
        assert mine.keys() == reference.keys()
        assert all(torch.equal(value, reference[name]) for name, value in mine.items())
    assert losses(tmp_path) == losses(straight) and encoder_bytes(tmp_path) == encoder_bytes(straight)


def test_what_a_save_in_the_background_meets_is_raised_by_the_loop(tmp_path, monkeypatch):
    def before(operation: str, path: Path) -> None:
        if path.name == checkpoint.TENSORS and "step-00000006" in str(path):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "before", before)
    with pytest.raises(OSError, match="Input/output error"):
        run(tmp_path)
    assert checkpoint.list_steps(tmp_path) == [3]
    assert 6 <= len(losses(tmp_path)) < 12


def test_a_saver_has_one_save_in_the_making_and_its_end_waits_for_it(tmp_path, monkeypatch):
    running, most = [0], [0]

    def save(*given, **options) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        done.append(given[1])
        running[0] -= 1

    done: list[int] = []
    monkeypatch.setattr(checkpoint, "save", save)
    saver = Saver(attempts.begin(tmp_path), CheckpointConfig())
    for step in range(20):
        saver.save(step, {"a": torch.zeros(3)}, {}, last=False)
    saver.wait()
    assert done == list(range(20)) and most[0] == 1
    assert {"checkpoint_seconds", "checkpoint_blocked_seconds"} <= saver.figures().keys()
    assert saver.figures() == {"checkpoint_failures": 0.0}


def test_a_full_disk_costs_one_checkpoint_and_no_step(tmp_path, straight, monkeypatch, caplog):
    reported: list[dict[str, float]] = []
    run(tmp_path, should_stop=stop_after(4))
    fill_disk(monkeypatch, times=1)
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, on_metrics=reported.append).finished
    (line,) = [r.getMessage() for r in caplog.records if "NOT saved" in r.getMessage()]
    assert "the checkpoint of step 6 was NOT saved, the disk is full (1 in a row" in line
    assert "the newest checkpoint is step 4" in line
    assert checkpoint.list_steps(tmp_path) == [9, 12]
    assert losses(tmp_path) == losses(straight)
    assert {row["checkpoint_failures"] for row in reported} >= {1.0, 0.0}


@pytest.mark.parametrize(("before", "steps_done"), [(4, 12), (0, 4)])
def test_a_disk_that_stays_full_ends_the_run_after_so_many_saves_or_at_the_first(
    tmp_path, monkeypatch, before, steps_done
):
    """With a checkpoint to fall back on two saves may fail; without one the first is the last."""
    config = tiny(max_steps=40, checkpoint__full_disk_saves=2)
    if before:
        run(tmp_path, config, should_stop=stop_after(before))
    fill_disk(monkeypatch)
    with pytest.raises(DiskFullError, match="disk full while saving a checkpoint: free some space and run"):
        run(tmp_path, config)
    assert checkpoint.list_steps(tmp_path) == ([3, before] if before else [])
    assert len(losses(tmp_path)) <= steps_done
    assert not list(checkpoint.folder(tmp_path).glob("*.tmp-*"))
    monkeypatch.undo()
    assert run(tmp_path, config, should_stop=stop_after(1)).started_at == before


def test_the_last_checkpoint_must_be_saved(tmp_path, monkeypatch):
    run(tmp_path, should_stop=stop_after(4))
    fill_disk(monkeypatch)
    with pytest.raises(UserError, match="disk full"):
        run(tmp_path, should_stop=stop_after(1))
    assert checkpoint.list_steps(tmp_path) == [3, 4]


def test_rows_that_a_full_disk_did_not_take_are_written_later_and_before_the_checkpoint(
    tmp_path, straight, monkeypatch, caplog
):
    """Metrics of steps 4 to 7 find no room; a checkpoint whose rows are missing does not get its name."""
    full = [True]

    def before(operation: str, path: Path) -> None:
        if operation == "append" and full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    batches = FakeBatches(tiny())

    def next_batch(step: int) -> Batch:
        full[0] = 4 <= step < 8
        if step == 8:
            assert checkpoint.list_steps(tmp_path)[-1] == 4
            assert len(losses(tmp_path)) == 4
        return batches(step)

    run(tmp_path, should_stop=stop_after(4), next_batch=next_batch)
    monkeypatch.setattr(files, "before", before)
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, next_batch=next_batch).finished
    assert sum("rows of metrics.jsonl wait in memory" in r.getMessage() for r in caplog.records) == 1
    assert losses(tmp_path) == losses(straight)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("only root may mount a small tmpfs, where the kernel allows it")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_loses_no_step_and_no_good_checkpoint(small_disk, straight, caplog):
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    batches = FakeBatches(tiny())
    run(run_dir, should_stop=stop_after(4))

    def next_batch(step: int) -> Batch:
        if step == 5:  # what is left is less than a checkpoint, then nothing
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"x" * 4096)
        if step == 8:
            ballast.unlink()
        return batches(step)

    with caplog.at_level(logging.WARNING):
        assert run(run_dir, next_batch=next_batch).finished
    assert any("step 6 was NOT saved, the disk is full" in r.getMessage() for r in caplog.records)
    assert checkpoint.list_steps(run_dir) == [9, 12]
    assert losses(run_dir) == losses(straight) and encoder_bytes(run_dir) == encoder_bytes(straight)
    ballast.touch()


def test_an_attempt_that_is_replaced_while_it_writes_does_not_commit(tmp_path, straight, monkeypatch):
    """The newer attempt begins when all files of the older one's checkpoint are written."""
    newer: list[attempts.Attempt] = []

    def before(operation: str, path: Path) -> None:
        if operation == "write" and path.name == checkpoint.MANIFEST and "step-00000006" in str(path):
            newer.append(attempts.begin(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "before", before)
        text = r"continued this run \(attempt 2, this is attempt 1\): this one stops and writes nothing more"
        with pytest.raises(attempts.ReplacedError, match=text):
            run(tmp_path)
    assert len(newer) == 1 and checkpoint.list_steps(tmp_path) == [3]
    assert not list(checkpoint.folder(tmp_path).glob("*.tmp-*"))
    assert not (tmp_path / "encoder.safetensors").exists()
    assert run(tmp_path).started_at == 3 and losses(tmp_path) == losses(straight)


def test_a_commit_in_the_very_moment_in_which_a_newer_attempt_begins_does_not_count(
    tmp_path, straight, monkeypatch
):
    """The older one has looked, and renames after the newer one has chosen step 3 to go on from, and has not
    seen (and swept away) what the older one has written."""
    newer: list[int] = []

    def before(operation: str, path: Path) -> None:
        if operation == "rename" and path.name == "step-00000006" and not newer:
            newer.append(0)
            newer[0] = run(tmp_path, config, should_stop=stop_after(1)).step

    config = tiny(checkpoint__keep=9)
    monkeypatch.setattr(files, "before", before)
    monkeypatch.setattr(checkpoint, "sweep", lambda run_dir: None)
    with pytest.raises(attempts.ReplacedError):
        run(tmp_path, config)
    monkeypatch.undo()
    assert newer == [4] and checkpoint.list_steps(tmp_path) == [3, 4, 6]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 4
    assert len(losses(tmp_path)) == 4
    rows = checkpoint_files.listing(tmp_path, 9, None, 0.0, deep=True)
    assert rows[2].trouble == "of an attempt that attempt 2 had replaced" and rows[2].attempt == 1
    resumed = run(tmp_path, config)
    assert resumed.started_at == 4 and losses(tmp_path) == losses(straight)
    assert checkpoint_files.read_manifest(checkpoint.path_of(tmp_path, 6)).attempt == 3


def test_rows_of_a_replaced_attempt_reach_no_file_that_is_read(tmp_path):
    path = journal.journal_path(tmp_path)
    older = journal.Writer(path)
    older.append([{"step": 0}, {"step": 1}])
    journal.truncate(path, 1)
    newer = journal.Writer(path)
    older.append([{"step": 2}])
    newer.append([{"step": 1}])
    assert [row["step"] for row in journal.read(path)] == [0, 1]
    older.close()
    newer.close()


def test_of_two_that_begin_at_once_each_gets_a_number_of_its_own(tmp_path, monkeypatch):
    other: list[attempts.Attempt] = []

    def before(operation: str, path: Path) -> None:
        if operation == "create" and not other:
            other.append(attempts.Attempt(tmp_path, 0))
            other[0] = attempts.begin(tmp_path)

    monkeypatch.setattr(files, "before", before)
    mine = attempts.begin(tmp_path)
    assert (other[0].number, mine.number) == (1, 2)
    mine.check()
    with pytest.raises(attempts.ReplacedError):
        other[0].check()
    assert attempts.starts(tmp_path) == {}
    mine.begin_from(7)
    (tmp_path / "attempts" / "000001").write_text("{")  # cut off
    assert attempts.starts(tmp_path) == {2: 7}


def _blind_rank(rank: int, world: int, run_dir: str) -> tuple[int, dict[str, torch.Tensor], list[float]]:
    """What the file system shows to the other rank is an empty folder."""
    place = Path(run_dir) if rank == 0 else Path(run_dir) / "elsewhere"
    mine = checkpoint.load(place, 5).tensors if rank == 0 else {}
    read = tensors_from_rank_zero(mine, rank=rank, world=world, device=torch.device("cpu"))
    batches = FakeBatches(tiny(), rank, world)
    stop = stop_after(2)
    result = run(place, tiny(), batches, rank=rank, world=world, should_stop=stop)
    return result.started_at, read, result.losses


def test_all_ranks_go_on_from_what_rank_zero_has_read(tmp_path):
    run(tmp_path, should_stop=stop_after(5))
    saved = checkpoint.load(tmp_path, 5).tensors
    for started_at, read, found in run_ranks(_blind_rank, 2, str(tmp_path)):
        assert started_at == 5 and len(found) == 2
        assert read.keys() == saved.keys()
        for name, value in saved.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value)


@pytest.mark.parametrize(
    ("keep", "every", "left"), [(2, None, [50, 60]), (1, 20, [20, 40, 60]), (3, 30, [30, 40, 50, 60])]
)
def test_the_newest_and_every_nth_are_kept(tmp_path, keep, every, left):
    for step in range(10, 70, 10):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(2)}, {}, keep=keep, keep_every=every)
    assert checkpoint.list_steps(tmp_path) == left
    rows = checkpoint_files.listing(tmp_path, keep, every, 0.0, deep=False)
    assert rows[-1].why == "the newest" and all(row.trouble is None for row in rows)
    assert every is None or rows[0].why == f"every {every} steps"


def test_an_interval_at_which_nothing_is_saved_is_refused():
    with pytest.raises(ValueError, match="keep_every_steps=25 is no multiple of every_steps=10"):
        CheckpointConfig(every_steps=10, keep_every_steps=25)


def test_the_tensors_are_a_plain_safetensors_file(tmp_path):
    import safetensors.torch

    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    tensors = {f"t{i}": torch.arange(i, 3 * i + 1).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "turned": torch.rand(3, 5).T}
    path = checkpoint.save(tmp_path, 1, tensors, {}, keep=1) / checkpoint.TENSORS
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    header = path.read_bytes()[8:]
    offsets = json.loads(header[: header.rindex(b"}") + 1].split(b"}}")[0] + b"}}")
    assert sorted(offsets) == sorted(tensors)
