"""Archives that ask for much: each ends in reason codes, in a process that stays below 1 GB."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.ingest.files import write

ZEROS = bytes(1 << 20)


def zip_of_zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("f", "w") as file:
        for _ in range(100):
            file.write(ZEROS)


def zip_that_declares_a_terabyte(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f", b"x" * 1000)
    data = path.read_bytes()
    at = data.rindex(b"PK\1\2")
    extra = struct.pack("<HHQ", 1, 8, 1 << 40)  # zip64: the size
    entry = data[at : at + 24] + b"\xff\xff\xff\xff" + data[at + 28 : at + 30] + struct.pack("<H", len(extra))
    entry += data[at + 32 : at + 46] + b"f" + extra
    end = data.rindex(b"PK\5\6")
    tail = data[end : end + 12] + struct.pack("<II", len(entry), at) + b"\0\0"
    path.write_bytes(data[:at] + entry + tail)


def zip_that_declares_too_little(path: Path) -> None:
    zip_of_zeros(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 100 << 20), struct.pack("<I", 100)))


def zip_of_overlapping_members(path: Path, number: int = 5000) -> None:
    """Thousands of entries of the directory share one member (Fifield, 2019)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f", ZEROS * 10)
    data = path.read_bytes()
    at, end = data.rindex(b"PK\1\2"), data.rindex(b"PK\5\6")
    directory = data[at:end] * number
    tail = data[end : end + 8] + struct.pack("<HHII", number, number, len(directory), at) + b"\0\0"
    path.write_bytes(data[:at] + directory + tail)


def zip_of_few_overlapping_members(path: Path) -> None:
    zip_of_overlapping_members(path, 50)


def zip_with_an_endless_directory(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f", b"x")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\5\6")
    data[at + 12 : at + 16] = b"\xf0\xff\xff\xff"
    path.write_bytes(data)


def zip_in_zips(path: Path) -> None:
    """As a quine, which holds itself: an archive in an archive is never opened."""
    inner = b"x" * 1000
    for _ in range(20):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for copy in range(3):
                archive.writestr(f"{copy}.zip", inner)
        inner = packed.getvalue()
        if len(inner) > 400_000:
            break
    path.write_bytes(inner)


def zip_with_a_huge_dictionary(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("f", b"x" * 5000)
    data = bytearray(path.read_bytes())
    at = 30 + 1 + 4 + 1  # local header, name, version and length of the properties, their first byte
    data[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)


def tar_of_zeros(path: Path, mode: str) -> None:
    with tarfile.open(path, mode) as tar:
        info = tarfile.TarInfo("f")
        info.size = 100 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))


def gzip_tar_of_zeros(path: Path) -> None:
    tar_of_zeros(path, "w:gz")


def xz_tar_of_zeros(path: Path) -> None:
    tar_of_zeros(path, "w:xz")


def tar_that_declares_a_terabyte(path: Path) -> None:
    info = tarfile.TarInfo("f")
    info.size = 1 << 40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(5000))


def tar_with_a_huge_extended_header(path: Path) -> None:
    info = tarfile.TarInfo("f")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(5000))


BOMBS = [
    zip_of_zeros,
    zip_that_declares_a_terabyte,
    zip_that_declares_too_little,
    zip_of_overlapping_members,
    zip_of_few_overlapping_members,
    zip_with_an_endless_directory,
    zip_in_zips,
    zip_with_a_huge_dictionary,
    gzip_tar_of_zeros,
    xz_tar_of_zeros,
    tar_that_declares_a_terabyte,
    tar_with_a_huge_extended_header,
]

# Scan and read in a process of its own: seconds and peak of resident bytes (VmHWM) of each bomb.
CHILD = """
import json, re, sys, time
from pathlib import Path
from ingest.config import load_config
from ingest.convert import read_entry
from ingest.discover import inventory
from ingest.frames import Refusal
from ingest.sandbox import open_reader

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = load_config({"sources": [str(folder)], "output": sys.argv[2], "sandbox": "inline"})
    reader = open_reader(config)
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    items = [item for entry in inventory(config) if entry.member for item in read_entry(entry, reader)]
    seconds = time.perf_counter() - began
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    assert items and all(isinstance(item, Refusal) for item in items)
    found[folder.name] = [sorted({item.reason.value for item in items}), seconds, peak]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[list[str], float, int]]:
    root = tmp_path_factory.mktemp("bombs")
    for make in BOMBS:
        write(root / make.__name__ / "good")
        make(root / make.__name__ / "bomb")
    command = [sys.executable, "-c", CHILD, str(root), str(root.parent / "none")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for name, (reasons, seconds, peak) in found.items():
        size = (root / name / "bomb").stat().st_size
        print(f"{name:34} {size:8} bytes  {seconds:6.3f} s  {peak / 1e6:6.0f} MB  {', '.join(reasons)}")
    return found


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_an_archive_bomb_ends_in_a_reason_below_a_gigabyte(outcomes, make):
    reasons, _, peak = outcomes[make.__name__]
    assert reasons and set(reasons) <= {"too_large", "unreadable", "nested_archive", "not_an_image"}
    if "terabyte" in make.__name__ or "zeros" in make.__name__ or make is zip_of_overlapping_members:
        assert "too_large" in reasons
    assert peak < 1e9


def test_a_tar_cut_inside_or_between_members_is_seen_as_cut_off(tmp_path):
    from ingest.discover import inventory
    from tests.ingest.files import config

    source = tmp_path / "s"
    write(source / "good", number=99)
    starts = []
    with tarfile.open(source / "x.tar", "w") as tar:
        for number in range(4):
            path = write(tmp_path / f"m{number}", number=number)
            starts.append(tar.offset)
            tar.add(path, f"m{number}")
        starts.append(tar.offset)
    data = (source / "x.tar").read_bytes()
    for start in starts[1:]:
        inside = () if start == starts[-1] else (start + 100, start + 512)
        for cut in (start, start - 1, start - 700, *inside):
            (source / "x.tar").write_bytes(data[:cut])
            found = [entry for entry in inventory(config(source, tmp_path / "out")) if entry.member]
            assert "unreadable" in {entry.hint for entry in found}, cut
    (source / "x.tar").write_bytes(data)
    found = [entry for entry in inventory(config(source, tmp_path / "out")) if entry.member]
    assert [entry.hint for entry in found] == [""] * 4
