"""Snapshots of a dataset's commit records (shards.records says how they are read): take, drop, restore.

A snapshot is immutable and named by its content. A kill at any point leaves it whole or not there.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from shards import parquet
from shards.commit import parse_record
from shards.records import (
    SNAPSHOT_SCHEMA,
    all_records,
    covers,
    open_snapshot,
    record_name,
    records_of,
    snapshot_name,
    snapshot_names,
    unit_ids,
)
from shards.store import Store


@dataclass(frozen=True)
class Taken:
    """name: "" where there is no commit. created: False where it was there. removed: those it replaces."""

    name: str
    units: int
    size: int  # bytes
    created: bool
    removed: tuple[str, ...]


def take(store: Store) -> Taken:
    """Write a snapshot of all commits; remove those before it.

    Any number may run at once, and beside `ingest run`: what is committed meanwhile is read one by one.
    Raises UserError for a damaged record. Memory: the records (about 1.5 kB each) twice.
    """
    before = snapshot_names(store)  # then each covers a part of what is listed next, or units that are gone
    units, records = [], []
    for unit, data in all_records(store):
        parse_record(unit, data)
        units.append(unit)
        records.append(data)
    if not units:
        return Taken("", 0, 0, False, ())
    data = parquet.to_bytes(pa.table({"unit": units, "record": records}, schema=SNAPSHOT_SCHEMA))
    name = snapshot_name(len(units), data)
    created = open_snapshot(store, name) is None
    if created:  # a damaged one under its name is replaced; another writer puts the same bytes
        store.put(name, data)
    replaced = tuple(other for other in before if other != name)
    for other in replaced:
        store.delete(other)
    return Taken(name, len(units), len(data), created, replaced)


def drop_stale(store: Store) -> list[str]:
    """Remove snapshots that cover a unit without a record; their names. Ahead of a run that may make it anew,
    perhaps with other bytes: the copy must not stand for those."""
    opened = [(name, open_snapshot(store, name)) for name in snapshot_names(store)]
    if not opened:
        return []
    units = unit_ids(store)
    stale = [name for name, file in opened if file is not None and not covers(file) <= units]
    for name in stale:
        store.delete(name)
    return stale


def restore_records(store: Store, units: Iterable[str]) -> list[str]:
    """Put records that cannot be read back from the newest snapshot that has them; the ids of those units."""
    wanted, done = set(units), []
    for name in snapshot_names(store) if wanted else ():
        file = open_snapshot(store, name)
        if file is None or not covers(file) <= unit_ids(store):
            continue
        for unit, data in records_of(file):
            if unit in wanted:
                store.put(record_name(unit), data)
                wanted.remove(unit)
                done.append(unit)
    return sorted(done)
