"""The node cache: whole entries or none, a limit, several processes, damage that is never served."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.cache import NodeCache
from shards.errors import UserError

REPOSITORY = Path(__file__).parents[2]
DATA = bytes(range(256)) * 1000  # four chunks


def entries(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_range_of_an_entry_comes_back_and_nothing_that_is_not_there(tmp_path):
    cache = NodeCache(tmp_path, 100 << 20)
    assert cache.get("a", 0, 5) is None
    cache.put("a", DATA)
    for offset, size in ((0, 5), (70_000, 90_000), (len(DATA) - 3, 3), (0, len(DATA)), (65_536, 65_536)):
        assert cache.get("a", offset, size) == DATA[offset : offset + size]
    assert (cache.usage.hits, cache.usage.misses) == (5, 1)
    assert cache.get("b", 0, 5) is None


@pytest.mark.parametrize("place", [0, 9, 21, 30, 50, 60_000, len(DATA) // 2, -1])
def test_a_flipped_bit_anywhere_in_an_entry_is_never_served(tmp_path, place):
    cache = NodeCache(tmp_path, 100 << 20)
    cache.put("a", DATA)
    (path,) = entries(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    assert cache.get("a", 0, len(DATA)) is None and cache.usage.damaged == 1
    assert entries(tmp_path) == []  # it went, and can be put again
    cache.put("a", DATA)
    assert cache.get("a", 0, len(DATA)) == DATA


@pytest.mark.parametrize("length", [0, 10, 30, 40, 70_000, len(DATA)])
def test_a_half_written_entry_is_never_served(tmp_path, length):
    cache = NodeCache(tmp_path, 100 << 20)
    cache.put("a", DATA)
    (path,) = entries(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert cache.get("a", 0, 100) is None and entries(tmp_path) == []


def test_the_limit_holds_and_the_oldest_go_first(tmp_path):
    limit = 2 << 20
    cache = NodeCache(tmp_path, limit)
    for number in range(100):
        cache.put(str(number), bytes([number]) * 50_000)
        assert cache.size() <= limit
    kept = [n for n in range(100) if cache.get(str(n), 0, 1) is not None]
    assert kept == list(range(kept[0], 100)) and 30 <= len(kept) <= 42
    cache.put("large", bytes(limit // 16))  # more than a 32nd of the limit
    assert cache.get("large", 0, 1) is None


def test_what_killed_writers_left_goes_and_what_live_ones_write_stays(tmp_path):
    cache = NodeCache(tmp_path, 1 << 20)
    (tmp_path / "00").mkdir()
    old, new = (tmp_path / "00" / f".tmp-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"x" * 100)
    import os

    os.utime(old, (time.time() - 4000,) * 2)
    cache.put("a", b"data")
    assert not old.exists() and new.exists()


WRITER = """
import sys
from pathlib import Path
from shards.cache import NodeCache
cache, largest = NodeCache(Path(sys.argv[1]), int(sys.argv[2])), 0
for n in range(300):
    name = str(n % 60)
    wanted = name.encode() * 20_000
    found = cache.get(name, 100, 9_000)
    assert found in (None, wanted[100:9_100]), n
    if found is None:
        cache.put(name, wanted)
    if n % 10 == 0:
        largest = max(largest, cache.size())
print(largest, cache.usage.damaged)
"""


def test_two_processes_share_it_and_both_keep_the_limit(tmp_path):
    limit = 1 << 20
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(limit)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(2)]
    found = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert all(int(largest) <= limit and damaged == "0" for largest, damaged in found)
    assert not [p for p in entries(tmp_path) if p.name.startswith(".tmp-")]


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.node_cache=.*cannot be written"):
        NodeCache(tmp_path / "file" / "below", 1 << 20)
