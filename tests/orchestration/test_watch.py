"""`ingest watch` turns what lands into units, leaves alone what is being written, and loses nothing."""

import os
import signal

import pytest

from ingest.config import load_config
from ingest.discover import NothingToIngestError, inventory
from orchestration.watch import settled, watch
from shards import catalog
from shards.errors import UserError
from shards.ids import create_key
from shards.store import Store
from shards.verify import verify
from tests.ingest.files import grey, write
from tests.orchestration import jobs

INGEST = str(jobs.BIN / "ingest")


def config(source, out, **settings):
    return load_config({"sources": [str(source)], "output": str(out)} | settings)


def test_a_file_that_may_still_be_written_is_left_to_a_later_run(tmp_path):
    source = tmp_path / "landing"
    write(source / "one", grey(seed=1))
    assert len(inventory(config(source, tmp_path / "out", settle_seconds=0))) == 1
    waiting = config(source, tmp_path / "out", settle_seconds=3600)
    assert settled(waiting) == frozenset()
    with pytest.raises(NothingToIngestError):
        inventory(waiting)
    before = tuple(tmp_path.iterdir())
    assert watch(waiting, 1.0, once=True) == 0
    assert tuple(tmp_path.iterdir()) == before  # no key, no dataset


def test_an_old_modification_time_does_not_settle_a_new_file(tmp_path):
    source = tmp_path / "landing"
    path = write(source / "one", grey(seed=1)) or source / "one"
    os.utime(path, (0, 0))  # as cp -p and rsync do
    assert settled(config(source, tmp_path / "out", settle_seconds=3600)) == frozenset()


def test_a_landing_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        watch(config(tmp_path / "none", tmp_path / "out"), 1.0, once=True)


@pytest.mark.ray
def test_new_files_become_new_units_and_sigterm_ends_the_watch_with_0(ray_cluster, tmp_path):
    source, out, log, key = (tmp_path / name for name in ("landing", "out", "log", "key"))
    source.mkdir()
    create_key(key)
    settings = ["--settle", "0.3", "--every", "0.2", "--workers", "2", "--address", ray_cluster.address]
    command = [INGEST, "watch", str(source), str(out), "--key", str(key), *settings]

    def commits() -> int:
        return len(list((out / "commits").glob("*.json")))

    with jobs.child(command, log, ray_cluster.env) as process:
        jobs.poll("the watch", lambda: "watching" in log.read_text(), process)
        (source / "notes").write_text("nothing to convert")
        write(source / "a" / "one", grey(seed=1), number=1, patient="P1")
        jobs.poll("a first unit", lambda: commits() >= 1, process)
        write(source / "b" / "two", grey(seed=2), number=2, patient="P2")
        jobs.poll("its unit", lambda: commits() and catalog.load(out).num_rows == 2, process)
        jobs.poll("the end of the pass", lambda: "has 2 images" in log.read_text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, 130), log.read_text()
    assert "Traceback" not in log.read_text()
    assert verify(Store(out), deep=True).clean
