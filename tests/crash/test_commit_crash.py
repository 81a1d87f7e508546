"""A writer that is killed, or whose disk fails, at any point changes nothing: a later run puts it right."""

import errno
import itertools
import multiprocessing
from pathlib import Path

import pytest

from shards import catalog
from shards.commit import commit_unit, list_commits, orphans, sweep
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.ids import digest
from shards.plan import PlannedUnit, write_plan
from shards.store import Store
from shards.verify import verify
from tests.crash.killer import failing, killed, short_writes
from tests.shards import make

UNIT = digest("unit", "crash")


@pytest.fixture(scope="module")
def unit_samples():
    return make.samples(UNIT, "ct", 0, 2) + make.samples(UNIT, "us", 7, 1)


@pytest.fixture
def job(unit_samples):
    """The whole life of a small dataset, as a function of its folder."""

    def run(root: Path, scratch: Path) -> None:
        store = Store(root)
        open_or_create(store, make.info())
        write_plan(store, [PlannedUnit(UNIT, "ct", ("a", "b"))], 0)
        commit_unit(store, UNIT, unit_samples, make.refused(), scratch, 4)

    return run


def assert_nothing_half_done(root: Path) -> None:
    """What a reader sees after a crash: all of the unit or nothing, and no fault."""
    if not (root / "dataset.json").exists():
        return
    report = verify(root, deep=True)
    assert report.clean, report.problems
    assert catalog.load(root).num_rows == report.samples in (0, 3)


@pytest.mark.parametrize("torn", [False, True], ids=["between", "torn-write"])
def test_killed_after_any_operation_the_rerun_is_byte_identical(tmp_path, job, torn):
    job(tmp_path / "whole", tmp_path / "scratch")
    whole = make.tree(tmp_path / "whole")
    operations = 0
    for n in itertools.count():
        root, scratch = tmp_path / f"{n}", tmp_path / f"scratch{n}"
        was_killed = killed(lambda root=root, scratch=scratch: job(root, scratch), n, torn)
        assert_nothing_half_done(root)
        if n % 2 and was_killed:
            sweep(Store(root))
        job(root, tmp_path / "scratch")
        sweep(Store(root))
        assert orphans(Store(root)) == []
        assert make.tree(root) == whole
        if not was_killed:
            break
        operations = n + 1
    assert operations > 40, "the hooks did not see the operations"
    assert_nothing_half_done(root)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["disk-full", "io-error"])
def test_disk_error_at_any_operation_is_one_clear_line_and_the_retry_is_right(tmp_path, job, number):
    job(tmp_path / "whole", tmp_path / "scratch")
    whole = make.tree(tmp_path / "whole")
    words = {errno.ENOSPC: "disk is full", errno.EIO: "input/output error"}[number]
    for n in itertools.count():
        root = tmp_path / f"{n}"
        with failing(n, number) as begun:
            try:
                job(root, tmp_path / "scratch")
                failed = False
            except UserError as error:
                failed = True
                assert words in str(error) and "\n" not in str(error)
        if len(begun) <= n:
            break
        # Only the removal of a temporary file may fail without a word: nothing depends on it.
        assert failed or begun[n] == "unlink"
        assert_nothing_half_done(root)
        job(root, tmp_path / "scratch")
        sweep(Store(root))
        assert make.tree(root) == whole
    assert n > 40


def test_short_writes_are_completed(tmp_path, job):
    job(tmp_path / "whole", tmp_path / "scratch")
    with short_writes(100):
        job(tmp_path / "short", tmp_path / "scratch")
    assert make.tree(tmp_path / "short") == make.tree(tmp_path / "whole")


def test_scratch_is_left_empty_also_by_a_failed_commit(tmp_path, job):
    with failing(30, errno.ENOSPC), pytest.raises(UserError):
        job(tmp_path / "root", tmp_path / "scratch")
    assert make.tree(tmp_path / "scratch") == {}


def _write_when_all_are_ready(barrier, job_samples, root, scratch, units):
    barrier.wait(30)
    commit_unit(Store(root), UNIT, job_samples, make.refused(), scratch, 4)
    units.put([c.unit for c in list_commits(Store(root))])


def test_two_writers_of_one_unit_give_one_commit_and_the_same_bytes(tmp_path, job, unit_samples):
    job(tmp_path / "alone", tmp_path / "scratch")
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        root = tmp_path / f"both{attempt}"
        job_plan_only = Store(root)
        open_or_create(job_plan_only, make.info())
        write_plan(job_plan_only, [PlannedUnit(UNIT, "ct", ("a", "b"))], 0)
        barrier, units = context.Barrier(2), context.Queue()
        arguments = (barrier, unit_samples, root, tmp_path / "scratch", units)
        writers = [context.Process(target=_write_when_all_are_ready, args=arguments) for _ in range(2)]
        for writer in writers:
            writer.start()
        assert [units.get(timeout=60) for _ in writers] == [[UNIT], [UNIT]]
        for writer in writers:
            writer.join(60)
            assert writer.exitcode == 0
        assert make.tree(root) == make.tree(tmp_path / "alone")
        assert verify(root, deep=True).clean
