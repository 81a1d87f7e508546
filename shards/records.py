"""The bytes of commit records: one by one, or many at once from a snapshot.

snapshots/<number of records>-<digest>.parquet is a copy, byte for byte, of the records of the units it covers
(shards.snapshot writes it). It is no truth: readers list commits/, take from it what it covers and read the
others one by one. A damaged one gives way to the next, or to none. One that covers a unit without a record is
not used: somebody has removed the record, and a run may make another. So the result is that of reading every
record.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from heapq import merge
from itertools import islice
from operator import itemgetter

import pyarrow as pa
import pyarrow.parquet as pq

from shards.ids import digest
from shards.store import Store

SNAPSHOT_SCHEMA = pa.schema(
    [pa.field("unit", pa.string(), nullable=False), pa.field("record", pa.binary(), nullable=False)]
)
_NAME = re.compile(r"snapshots/[0-9]{10}-[a-z2-7]{26}\.parquet")
_REQUESTS_AT_ONCE = 16  # of an object store
_READ_AT_ONCE = 1024  # records
_BATCH_ROWS = 4096


def record_name(unit: str) -> str:
    return f"commits/{unit}.json"


def record_unit(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")


def unit_ids(store: Store) -> set[str]:
    """Ids of all units that have a record."""
    return {record_unit(name) for name in store.list("commits") if name.endswith(".json")}


def all_records(store: Store) -> Iterator[tuple[str, bytes]]:
    """(unit, bytes of its record) of every record there is, sorted by unit."""
    # The snapshot first: what it covers had a record then, so one that is missing from the list is gone.
    opened = (open_snapshot(store, name) for name in snapshot_names(store))
    snapshot = next((file for file in opened if file is not None), None)
    units = unit_ids(store)
    covered = covers(snapshot) if snapshot is not None else set()
    if snapshot is not None and covered <= units:
        yield from merge(records_of(snapshot), _read_each(store, sorted(units - covered)), key=itemgetter(0))
    else:
        yield from _read_each(store, sorted(units))


def snapshot_names(store: Store) -> list[str]:
    """Names of the snapshots, that of most records first."""
    return sorted((name for name in store.list("snapshots") if _NAME.fullmatch(name)), reverse=True)


def snapshot_name(records: int, data: bytes) -> str:
    return f"snapshots/{records:010d}-{digest('snapshot', data)}.parquet"


def open_snapshot(store: Store, name: str) -> pq.ParquetFile | None:
    """A snapshot, held to the digest in its name; None where it is damaged or gone."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    if not name.endswith(f"-{digest('snapshot', data)}.parquet"):
        return None
    return pq.ParquetFile(pa.BufferReader(data))


def covers(file: pq.ParquetFile) -> set[str]:
    """Ids of the units of which a snapshot has the record."""
    return set(file.read(["unit"])["unit"].to_pylist())


def records_of(file: pq.ParquetFile) -> Iterator[tuple[str, bytes]]:
    """(unit, bytes of its record) of a snapshot, sorted by unit; a few thousand in memory at a time."""
    for batch in file.iter_batches(_BATCH_ROWS):
        yield from zip(batch["unit"].to_pylist(), batch["record"].to_pylist(), strict=True)


def _read_each(store: Store, units: list[str]) -> Iterator[tuple[str, bytes]]:
    def one(unit: str) -> tuple[str, bytes]:
        return unit, store.read(record_name(unit))

    if not store.remote:
        yield from map(one, units)
        return
    waiting = iter(units)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        while some := list(islice(waiting, _READ_AT_ONCE)):
            yield from pool.map(one, some)
