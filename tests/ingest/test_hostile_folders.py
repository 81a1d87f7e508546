"""What a folder may hold besides good files: nothing of it blocks, escapes, is lost or ends a run."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage

from ingest.convert import SourceChangedError, run_unit
from ingest.discover import inventory
from ingest.frames import Item
from ingest.sandbox import open_reader
from orchestration.ingest_job import plan_job
from shards import catalog
from shards.ids import create_key
from tests.ingest.files import NAMES, config, grey, ingest, units, write


def reasons(out: Path) -> list[str]:
    return sorted(row["reason"] for row in catalog.quarantine(out).to_pylist())


@pytest.fixture
def odd(tmp_path) -> Iterator[Path]:
    """A good file among loops of links, pipes, sockets, devices, broken links, a file that cannot be read."""
    root = tmp_path / "s"
    write(root / "a" / "good")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "one").symlink_to(root / "two")
    (root / "two").symlink_to(root / "one")
    (root / "broken").symlink_to("/nonexistent/file")
    (root / "null").symlink_to("/dev/null")
    (root / "zero").symlink_to("/dev/zero")
    (root / "memory").symlink_to("/proc/self/mem")  # a regular file whose first read fails
    os.mkfifo(root / "pipe")
    where = Path.cwd()
    os.chdir(root)  # the path of a socket is short
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    os.chdir(where)
    yield root
    listener.close()


@pytest.mark.parametrize("sandbox", ["inline", "process"])
def test_nothing_in_a_folder_blocks_a_run_or_is_lost(odd, tmp_path, sandbox):
    ingest(odd, tmp_path / "out", sandbox=sandbox)
    assert catalog.load(tmp_path / "out").num_rows == 1
    found = reasons(tmp_path / "out")
    assert len(found) == 9 and set(found) <= {"not_an_image", "unreadable"}
    assert "unreadable" in found


def test_names_that_are_no_utf8_are_inputs_like_others(tmp_path):
    folder = os.fsencode(tmp_path / "s")
    write(tmp_path / "s" / "plain")
    for number, name in enumerate((b"\xff\xfe", b"M\xfcller", b"a\nb", b"\xed\xa0\x80")):
        data = write(tmp_path / "other", grey(seed=1 + number), number=20 + number).read_bytes()
        with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH118 - bytes
            file.write(data)
    create_key(tmp_path / "key")
    settings = config(
        tmp_path / "s", tmp_path / "out", key_file=str(tmp_path / "key"), path_map=str(tmp_path / "map")
    )
    job = plan_job(settings)
    for unit in job.units:
        run_unit(unit, settings, job.pseudonymizer, settings.output, tmp_path / "scratch")
    assert catalog.load(tmp_path / "out").num_rows == 5
    assert len((tmp_path / "map").read_text().splitlines()) == 5


def test_the_references_of_a_dicomdir_lead_nowhere(tmp_path):
    """It is a hint at most: what it names is found by walking the source, and nothing else is."""
    write(tmp_path / "outside" / "secret", number=77, patient="P7")
    write(tmp_path / "s" / "inside")
    record = {"DirectoryRecordType": "IMAGE", "OffsetOfTheNextDirectoryRecord": 0}
    directory = Dataset()
    directory.DirectoryRecordSequence = []
    places = (
        ["..", "outside", "secret"],
        [str(tmp_path / "outside" / "secret")],
        ["..\\outside\\secret"],
        ["INSIDE"],
    )
    for place in places:
        item = Dataset()
        for name, value in record.items():
            setattr(item, name, value)
        item.add_new(0x00041500, "CS", place)
        directory.DirectoryRecordSequence.append(item)
    directory.file_meta = FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.save_as(tmp_path / "s" / "DICOMDIR", enforce_file_format=True)
    assert {e.relative for e in inventory(config(tmp_path / "s", tmp_path / "out"))} == {"DICOMDIR", "inside"}
    ingest(tmp_path / "s", tmp_path / "out")
    assert catalog.load(tmp_path / "out").num_rows == 1
    assert reasons(tmp_path / "out") == ["dicomdir"]


class _WrittenTo:
    """A reader during whose reading somebody writes to the file."""

    def __init__(self, settings, path: Path, data: bytes) -> None:
        self.reader, self.path, self.data = open_reader(settings), path, data

    def read(
        self, path: str, kind: str, modality: str, member: str = "", partner: str = ""
    ) -> Iterator[Item]:
        yield from self.reader.read(path, kind, modality, member, partner)
        self.path.write_bytes(self.data)
        os.utime(self.path, ns=(1, 1))  # whatever the resolution of the clock

    def close(self) -> None:
        self.reader.close()


def test_a_file_that_changes_while_it_is_read_leaves_its_unit_uncommitted(tmp_path):
    """Even where its beginning and its size stay: its pixels may be half of each."""
    path = write(tmp_path / "s" / "f", grey(size=(100, 100)))
    data = path.read_bytes()
    settings = config(tmp_path / "s", tmp_path / "out")
    (unit,) = units(settings)
    other = data[:-2000] + bytes(2000)
    with pytest.raises(SourceChangedError):
        run_unit(
            unit, settings, NAMES, settings.output, tmp_path / "scratch", _WrittenTo(settings, path, other)
        )
    assert not list((tmp_path / "out").glob("commits/*"))
