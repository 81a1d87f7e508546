"""A decoder process that dies, hangs or runs out of memory costs one file, never the run."""

import os
import signal

import numpy as np
import pytest

from ingest.config import ReadRules
from ingest.frames import Frame, Refusal, from_message, to_message
from ingest.sandbox import InlineReader, ProcessReader
from shards.schema import Reason
from tests.ingest.files import grey, write


@pytest.fixture
def reader():
    made = ProcessReader(ReadRules(allow_burned_in=True), 60, 4096)
    yield made
    made.close()


def test_what_the_child_reads_is_what_is_read_inline(tmp_path, reader):
    path = str(
        write(tmp_path / "f", np.stack([grey("uint8", 8, seed=s) for s in range(3)]), "US", 8, frames=True)
    )
    here = list(InlineReader(ReadRules(allow_burned_in=True)).read(path, "dicom", "none"))
    there = list(reader.read(path, "dicom", "none"))
    for a, b in zip(here, there, strict=True):
        assert np.array_equal(a.pixels, b.pixels) and a.pixels.dtype == b.pixels.dtype
        assert (a.columns, a.identifiers, a.texts) == (b.columns, b.identifiers, b.texts)


def test_a_killed_child_refuses_its_file_and_the_next_one_is_read(tmp_path, reader):
    clip = np.stack([grey("uint8", 8, (1200, 1200), seed=s) for s in range(4)])  # more than a pipe holds
    path = str(write(tmp_path / "f", clip, "US", 8, frames=True))
    items = reader.read(path, "dicom", "none")
    assert isinstance(next(items), Frame)
    os.kill(reader._child.pid, signal.SIGKILL)
    assert list(items)[-1] == Refusal(Reason.CRASHED, modality="none")
    assert len(list(reader.read(path, "dicom", "none"))) == 4


def test_a_child_that_died_between_two_files_costs_neither(tmp_path, reader):
    path = str(write(tmp_path / "f"))
    assert isinstance(next(iter(list(reader.read(path, "dicom", "none")))), Frame)
    os.kill(reader._child.pid, signal.SIGKILL)
    assert isinstance(next(iter(list(reader.read(path, "dicom", "none")))), Frame)


def test_a_late_child_is_ended(tmp_path):
    late = ProcessReader(ReadRules(), 0.01, 4096)  # less than a child takes to start
    items = list(late.read(str(write(tmp_path / "f")), "dicom", "none"))
    assert items == [Refusal(Reason.CRASHED, modality="none")]
    assert late._child is None


def test_memory_has_a_limit(tmp_path):
    pixels = np.zeros((6000, 6000), np.uint16)
    pixels[0, 0] = 1
    path = str(write(tmp_path / "f", pixels, "CR", 16))
    small = ProcessReader(ReadRules(), 60, 700)
    try:
        items = list(small.read(path, "dicom", "none"))
        assert [item.reason for item in items] in ([Reason.TOO_LARGE], [Reason.CRASHED])
        assert isinstance(next(iter(small.read(str(write(tmp_path / "g")), "dicom", "none"))), Frame)
    finally:
        small.close()


def test_a_reader_left_half_way_is_not_misread_by_the_next_file(tmp_path, reader):
    clip = np.stack([grey("uint8", 8, seed=s) for s in range(3)])
    first = str(write(tmp_path / "f", clip, "US", 8, frames=True))
    items = reader.read(first, "dicom", "none")
    next(items)
    items.close()
    second = list(reader.read(str(write(tmp_path / "g", grey(seed=9))), "dicom", "none"))
    assert len(second) == 1 and np.array_equal(second[0].pixels, grey(seed=9))


def test_messages_that_do_not_add_up_are_no_items():
    frame = Frame(0, "mr", grey(), {})
    header, pixels = to_message(frame)
    assert np.array_equal(from_message(header, bytes(pixels)).pixels, frame.pixels)
    for change in ({"shape": [9, 9]}, {"dtype": "object"}, {"shape": [0, 0]}):
        with pytest.raises(ValueError):
            from_message(header | change, bytes(pixels))
