"""The catalogue that processes of a node share: the same batches, never of another state of the dataset."""

import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards import catalog, exclusions, row_cache
from shards.commit import commit_unit
from shards.duplicates import Excluded
from shards.errors import UserError
from shards.ids import digest
from shards.store import OPS, Store
from tests.batches import make
from trainer import rows
from trainer.batches import BatchMaker, fit_bands
from trainer.config import OrderConfig, TrainConfig
from trainer.rows import NEEDED_COLUMNS, MappedModality, Modality, open_modality


def config(root: str, cache: str | Path, layout: str = "blocks", **data: object) -> TrainConfig:
    order = OrderConfig(layout=layout, block_samples=2, group_blocks=2)
    own = make.config(root)
    update = {"catalogue_cache": str(cache), "order": order, **data}
    return own.model_copy(update={"data": own.data.model_copy(update=update)})


def grow(root: str, scratch: Path, number: int) -> None:
    unit = digest("unit", str(number))
    commit_unit(
        Store(Path(root)),
        unit,
        [make.sample(unit, "ct", number, make.image("ct", number), "train", "htj2k")],
        [],
        scratch,
        1,
    )


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "scratch").mkdir()
    return make.dataset(tmp_path / "data", tmp_path / "scratch")


def open_ct(root: str, cache: Path) -> rows.Rows:
    return open_modality(config(root, cache).data, "ct")


def in_table(root: str) -> list[dict[str, object]]:
    return catalog.load(root, "ct", list(NEEDED_COLUMNS), "train").to_pylist()


def values(modality: rows.Rows) -> list[dict[str, object]]:
    return [modality.row(n) for n in range(len(modality))]


@pytest.mark.parametrize("layout", ["blocks", "keys"])
def test_batches_and_bands_are_the_same_as_of_a_table(root, bands, tmp_path, layout):
    shared, table = config(root, tmp_path / "cache", layout), config(root, "none", layout)
    assert isinstance(open_modality(shared.data, "ct"), MappedModality)
    assert isinstance(open_modality(table.data, "ct"), Modality)
    assert fit_bands(shared) == bands
    makers = [BatchMaker(one, 1, 2, bands) for one in (shared, table)]
    for step in (0, 7):
        one, other = (maker(step) for maker in makers)
        assert (one.keys, one.passes, one.reads) == (other.keys, other.passes, other.reads)
        for mine, theirs in zip(one.crops, other.crops, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_dataset_that_changed_is_never_read_from_an_old_file(own, tmp_path):
    cache = tmp_path / "cache"
    before = open_ct(own, cache)
    was = values(before)
    grow(own, tmp_path / "scratch", 50)
    assert values(open_ct(own, cache)) == in_table(own) != was
    store, units = Store(Path(own)), [c.unit for c in catalog.list_commits(Store(Path(own)))]
    left_out = Excluded(units[0], str(was[0]["key"]), "ct", "train", "duplicate")
    name = exclusions._name_of(data := exclusions.to_bytes(units, [left_out]), len(units))
    store.put(name, data)
    found = open_ct(own, cache)
    assert values(found) == in_table(own) and was[0] not in values(found)
    assert values(before) == was  # who has mapped a file keeps it
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1  # and the folder keeps the last state alone


def test_of_processes_that_come_together_one_builds(own, tmp_path, monkeypatch):
    built = []

    def counted(*args):
        built.append(args)
        return write(*args)

    write = row_cache.write
    monkeypatch.setattr(row_cache, "write", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: values(open_ct(own, tmp_path / "cache")), range(8)))
    assert len(built) == 1 and all(one == in_table(own) for one in found)


def test_killed_at_any_write_the_next_process_builds_it_whole(own, tmp_path):
    cache, killed = tmp_path / "cache", 0
    while True:
        child = os.fork()
        if child == 0:
            left = [killed]

            def die(operation: str, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

            try:
                OPS.before = die
                open_ct(own, cache)
                os._exit(0)
            finally:
                os._exit(1)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert values(open_ct(own, cache)) == in_table(own)
        assert sorted(p.suffix for p in cache.iterdir()) == ["", ".lock"]
        if done == 0:
            break
        assert done == 9
        killed += 1
        for path in cache.glob("*-*"):  # the next one has to build again
            row_cache.shutil.rmtree(path)
    assert killed > 12


def test_what_is_no_longer_whole_is_built_again_and_a_damaged_row_is_named(own, tmp_path):
    cache = tmp_path / "cache"
    open_ct(own, cache)
    (path,) = cache.glob("*/rows.npy")
    path.write_bytes(path.read_bytes()[:-7])
    found = open_ct(own, cache)
    assert values(found) == in_table(own)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="holds other bytes than were written: remove that folder"):
        values(open_ct(own, cache))


def full(operation: str) -> None:
    if operation == "write":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_a_run_that_named_the_folder_and_leaves_nothing(own, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(OPS, "before", full)
    with pytest.raises(UserError, match=r"data\.catalogue_cache: .*no space left"):
        open_ct(own, cache)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    with pytest.raises(UserError, match=r"data\.catalogue_cache: .*not a directory"):
        open_ct(own, Path(own) / "dataset.json" / "cache")
    usage = row_cache.shutil.disk_usage(cache)._replace(free=100)
    monkeypatch.setattr(row_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"0\.0 GB free, and the catalogue of ct takes"):
        open_ct(own, cache)


def test_without_a_setting_many_rows_are_shared_and_a_full_disk_is_told(own, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert isinstance(open_modality(config(own, "auto").data, "ct"), Modality)
    monkeypatch.setattr(rows, "SHARED_ROWS", 8)
    found = open_modality(config(own, "auto").data, "ct")
    assert isinstance(found, MappedModality) and values(found) == in_table(own)
    (folder,) = tmp_path.glob(f"medswav-{os.getuid()}")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # somebody else could have put files there
    with monkeypatch.context() as few:
        few.setattr(rows, "SHARED_ROWS", 10**6)  # then no folder is needed, and nothing is said
        assert isinstance(open_modality(config(own, "auto").data, "ct"), Modality) and not caplog.messages
    assert isinstance(open_modality(config(own, "auto").data, "ct"), Modality)
    folder.chmod(0o700)
    row_cache.shutil.rmtree(folder)
    monkeypatch.setattr(OPS, "before", full)
    table = open_modality(config(own, "auto").data, "ct")
    assert isinstance(table, Modality) and values(table) == in_table(own)
    assert "can be written by others" in caplog.messages[0] and "no space left" in caplog.messages[1]


def test_a_folder_of_several_users_holds_a_lock_and_files_of_each(own, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    open_ct(own, cache)
    mine = set(cache.iterdir())
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert values(open_ct(own, cache)) == in_table(own)
    theirs = set(cache.iterdir()) - mine
    assert len(theirs) == len(mine) == 2 and mine < set(cache.iterdir())


def test_a_selection_without_rows_is_said_as_ever(own, tmp_path):
    with pytest.raises(UserError, match="no mr images in split train"):
        open_modality(config(own, tmp_path / "cache").data.model_copy(), "mr")
    assert isinstance(open_modality(config(own, tmp_path / "cache", split="all").data, "ct"), MappedModality)
