"""`medswav bench list`: the commits of a generated dataset read with a snapshot, against one by one.

Only the records are generated, no shard: a CT unit of 240 images with a shard, a catalogue part and a
quarantine each. The whole of them is parsed on both sides.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from orchestration.bench import Figure, figure, take_turns
from shards.commit import Commit, CommittedFile, list_commits
from shards.dataset import DatasetInfo, open_or_create, to_json
from shards.errors import UserError
from shards.ids import digest
from shards.objects import open_store
from shards.records import record_name
from shards.snapshot import take
from shards.store import Store

COMMITS = 20_000
_WRITERS = 16  # of an object store


def measure(seconds: float, commits: float = COMMITS, place: str | None = None) -> Iterator[Figure]:
    """Seconds to read all commits. place: an empty s3:// or gs:// prefix, which is emptied at the end.

    Raises UserError where the place is not empty.
    """
    count = int(commits)
    if count < 1:
        raise UserError("--commits: give a positive number")
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:
        store = open_store(place or folder)
        if store.list():
            raise UserError(f"{store.root} is not empty: give a prefix that nobody uses")
        try:
            yield from _measured(store, count, seconds)
        finally:
            if store.remote:
                with ThreadPoolExecutor(_WRITERS) as pool:
                    list(pool.map(store.delete, store.list()))


def _measured(store: Store, count: int, seconds: float) -> Iterator[Figure]:
    open_or_create(store, DatasetInfo("htj2k", digest("bench"), "bench", modalities=("ct",)))
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(lambda number: _write(store, number), range(count)))
    start = time.perf_counter()
    taken = take(store)
    detail = f"{count} commits; the snapshot of {taken.size} bytes took {time.perf_counter() - start:.1f} s"
    data = store.read(taken.name)
    hidden = data[:1]  # a damaged snapshot is not looked at

    def one_by_one() -> float:
        store.put(taken.name, hidden)
        return _list(store, count)

    def with_snapshot() -> float:
        store.put(taken.name, data)
        return _list(store, count)

    took, turns = take_turns({"own": with_snapshot, "base": one_by_one}, seconds)
    where = str(store.root).partition(":")[0] if store.remote else "folder"
    yield figure(f"list_{where}", took["own"], "s", took["base"], "record by record", turns, detail)


def _list(store: Store, count: int) -> float:
    start = time.perf_counter()
    found = len(list_commits(store))
    seconds = time.perf_counter() - start
    if found != count:
        raise AssertionError(f"{found} commits of {count}")
    return seconds


def _write(store: Store, number: int) -> None:
    unit = digest("unit", str(number))

    def file(folder: str, ending: str, size: int, samples: int) -> CommittedFile:
        name = digest(folder, str(number))
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        return CommittedFile(f"{folder}/ct/ct-{name}.{ending}", "ct", size, sha256, samples)

    statistics = {"samples": 240, "pixels": 240 << 18, "raw_bytes": 240 << 19, "encoded_bytes": 25 << 20}
    commit = Commit(
        unit,
        (file("shards", "tar", 25 << 20, 240),),
        (file("catalog", "parquet", 60_000, 240),),
        file("quarantine", "parquet", 4_000, 3),
        {"samples": 240, "quarantined": 3, "inputs": 243},
        {"ct": statistics | {"train": 192, "val": 24, "test": 24}},
    )
    record = asdict(commit)
    del record["retry"]
    if store.remote:
        store.create(record_name(unit), to_json(record))
    else:  # 20,000 syncs to disk are no part of what is measured
        path = Path(store.local(record_name(unit)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(to_json(record))
