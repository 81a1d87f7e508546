"""The parallel header scan finds what the serial one finds, in its order, and outlives lost processes."""

import os
import zipfile

import pytest

from ingest import discover, scan
from ingest.discover import inventory
from ingest.inventory import input_id
from shards.errors import UserError
from shards.schema import Reason
from tests.ingest.files import NAMES, config, grey, write


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "s"
    for number in range(5):
        write(
            folder / f"d{number % 2}" / f"{number}",
            grey(seed=number),
            number=number,
            patient=f"P{number % 3}",
        )
    (folder / "note.txt").write_text("x")
    (folder / "empty").write_bytes(b"")
    (folder / os.fsdecode(b"no-utf8-\xff")).write_bytes(b"y")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "d0" / "0", "inside/é")
        archive.writestr("../unsafe", b"z")
    (folder / "images.csv").write_text("file,modality,patient\nlisted.png,xr,P9\nmissing.png,xr,P8\n")
    (folder / "listed.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(discover, "PARALLEL_FILES", 1)
    monkeypatch.setattr(scan, "BATCH_FILES", 2)


def parallel(settings, workers=2):
    return list(discover.scan(settings, None, None, scan.scanner(settings, workers)))


def test_the_entries_and_their_order_are_those_of_one_process(source, tmp_path):
    settings = config(source, tmp_path / "out")
    found = parallel(settings)
    assert found == list(discover.scan(settings))
    assert {entry.kind for entry in found} == {"dicom", "raster", "other"} and any(e.member for e in found)


@pytest.mark.parametrize("name", ["fatal", "stuck"])
def test_a_file_that_ends_or_holds_up_its_process_is_an_input_that_is_refused(
    source, tmp_path, monkeypatch, name
):
    write(source / "d1" / name, grey(seed=9), number=9)
    settings = config(source, tmp_path / "out", file_seconds=2)
    expected = {entry.relative: entry for entry in inventory(settings)}
    monkeypatch.setattr(scan, "CHILD", "tests.ingest.fatal_scan")
    found = {entry.relative: entry for entry in parallel(settings)}
    lost = found.pop(f"d1/{name}")
    assert lost.hint == Reason.CRASHED and lost.modality == "none"
    # The same input as ever: a later scan that gets through it does not make it another one.
    assert input_id(lost, NAMES) == input_id(expected.pop(f"d1/{name}"), NAMES)
    assert found == expected


def test_children_end_with_the_scan(source, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        scan.subprocess,
        "Popen",
        lambda *a, _make=scan.subprocess.Popen, **k: started.append(_make(*a, **k)) or started[-1],
    )
    settings = config(source, tmp_path / "out")
    entries = discover.scan(settings, None, None, scan.scanner(settings, 2))
    next(entries)
    entries.close()
    assert started and all(process.returncode is not None for process in started)


def test_a_memory_limit_that_no_process_starts_with_is_a_clear_mistake(source, tmp_path):
    settings = config(source, tmp_path / "out").model_copy(update={"memory_mib": 16})
    with pytest.raises(UserError, match="memory_mib"):
        parallel(settings)
