"""Under limits every byte is counted, one source file is open at a time, and the dataset is the same."""

import os
import shutil
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest

from ingest.convert import SourceChangedError, read_entry, run_unit
from ingest.discover import inventory
from ingest.limits import Meter
from ingest.sandbox import open_reader
from ingest.sources import limited
from shards import catalog
from shards.schema import Reason
from tests.ingest.files import NAMES, config, grey, ingest, tree, units, write


@pytest.fixture
def source(tmp_path) -> Path:
    """Files of every kind, plain and in archives, and what is no image."""
    root = tmp_path / "source"
    for number in range(3):
        write(root / "a" / f"m{number}", grey(seed=number, size=(200, 150)), number=number)
    nibabel.save(nibabel.Nifti1Image(grey("int16", 12, (90, 90, 80)), np.eye(4)), root / "v.nii")
    nibabel.save(nibabel.Nifti1Pair(grey("int16", 12, (80, 90, 10)), np.eye(4)), root / "w.img")
    cv2.imwrite(str(root / "p.png"), grey("uint8", 8))
    cv2.imwrite(str(root / "unlisted.png"), grey("uint8", 8))
    (root / "images.csv").write_text("file,modality,patient\np.png,CR,P1\n")
    (root / "note.txt").write_bytes(b"no image" * 3000)
    for number in range(3):
        write(tmp_path / "more" / f"c{number}", grey("int16", 12, seed=number), "CT", number=7 + number)
    (tmp_path / "more" / "note").write_text("x")
    for kind in ("zip", "gztar", "tar"):
        shutil.make_archive(str(root / f"of_{kind}"), kind, tmp_path / "more")
    return root


class Ledger:
    """Grants everything at once; notes how much, and which source files this process has open then."""

    def __init__(self, source: Path) -> None:
        self.source, self.bytes, self.most_open = str(source), 0, 0

    def __call__(self, count: int) -> float:
        self.bytes += count
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        names = [str(link.readlink()) for link in links]
        self.most_open = max(self.most_open, sum(name.startswith(self.source) for name in names))
        return 0.0


def test_limits_change_no_byte_and_every_byte_is_counted(source, tmp_path):
    ingest(source, tmp_path / "plain")
    ledger = Ledger(source)
    with limited(Meter(ledger, 4096)):
        settings = config(source, tmp_path / "limited", sandbox="process")
        todo = units(settings)
        scanned = ledger.bytes
        for unit in todo:
            run_unit(unit, settings, NAMES, settings.output, tmp_path / "scratch")
    assert tree(tmp_path / "plain") == tree(tmp_path / "limited")
    read = sum(entry.size for unit in todo for entry in unit.entries if entry.kind in ("dicom", "nifti"))
    assert ledger.bytes - scanned > 0.8 * read  # what gzip saves
    assert ledger.bytes < 6 * read
    assert ledger.most_open == 1


def test_the_decoder_process_opens_no_source_under_limits(source, tmp_path):
    """It gets copies; only of what is no image it gets the path, to say whether it can be opened."""
    settings = config(source, tmp_path / "out", sandbox="process")
    reader = open_reader(settings)
    seen = []
    try:
        with limited(Meter(None)):
            for entry in inventory(settings):
                for _ in read_entry(entry, _Noting(reader, seen)):
                    pass
    finally:
        reader.close()
    copies = [path for path, kind in seen if kind in ("dicom", "nifti")]
    assert len(copies) >= 7 and all(path.startswith("/proc/") for path in copies)
    assert all(path.startswith(str(source)) for path, kind in seen if kind == "other")


class _Noting:
    def __init__(self, reader, seen) -> None:
        self.reader, self.seen = reader, seen

    def read(self, path, kind, modality, member="", partner=""):
        self.seen.append((path, kind))
        assert not member
        return self.reader.read(path, kind, modality, partner=partner)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("change", ["gone", "longer", "shorter", "other"])
def test_a_file_that_changes_before_its_copy_leaves_the_unit_uncommitted(tmp_path, change):
    path = write(tmp_path / "s" / "f")
    settings = config(tmp_path / "s", tmp_path / "out")
    (unit,) = units(settings)
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        other = data.replace(b"1.2.3.1", b"1.2.3.9")
        path.write_bytes({"longer": data + b"\0\0", "shorter": data[:-2], "other": other}[change])
    with limited(Meter(None)), pytest.raises(SourceChangedError):
        run_unit(unit, settings, NAMES, settings.output, tmp_path / "scratch")
    assert not list((tmp_path / "out").glob("commits/*"))


def test_a_file_without_an_end_is_not_copied_for_ever(tmp_path):
    """One that another process keeps writing to: the copy ends a byte behind the size that was planned."""
    path = write(tmp_path / "s" / "f")
    settings = config(tmp_path / "s", tmp_path / "out")
    (unit,) = units(settings)

    def grows(count: int) -> float:
        with path.open("ab") as file:
            file.write(bytes(count))
        return 0.0

    with limited(Meter(grows, 4096)), pytest.raises(SourceChangedError):
        run_unit(unit, settings, NAMES, settings.output, tmp_path / "scratch")
    assert path.stat().st_size < 20 << 20


def test_pipes_and_devices_are_refused_under_limits_and_block_nothing(tmp_path):
    write(tmp_path / "s" / "f")
    os.mkfifo(tmp_path / "s" / "pipe")
    (tmp_path / "s" / "zero").symlink_to("/dev/zero")
    with limited(Meter(None)):
        ingest(tmp_path / "s", tmp_path / "out")

    reasons = [row["reason"] for row in catalog.quarantine(tmp_path / "out").to_pylist()]
    assert reasons == [Reason.NOT_AN_IMAGE.value] * 2
