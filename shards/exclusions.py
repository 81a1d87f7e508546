"""The samples that readers leave out, because others of the dataset are the same (shards.duplicates).

exclusions/<number of units>-<digest>.parquet has a row for each committed unit that was compared, with what
of it is left out. It is a pure function of those commits, whoever wrote it; immutable, named by its content,
and derived: written again where it is lost. Readers take the one of most units. No shard is rewritten: plain
readers of the tars see all samples.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from shards import parquet
from shards.commit import Commit, list_commits
from shards.compare import compare
from shards.duplicates import Excluded
from shards.ids import digest
from shards.store import Store

_S = pa.string()
_SAMPLE = pa.struct([pa.field(name, _S, nullable=False) for name in ("key", "modality", "split", "reason")])
EXCLUSIONS_SCHEMA = pa.schema(
    [
        pa.field("unit", _S, nullable=False),
        pa.field("excluded", pa.list_(pa.field("item", _SAMPLE, nullable=False)), nullable=False),
    ]
)
_NAME = re.compile(r"exclusions/[0-9]{10}-[a-z2-7]{26}\.parquet")


@dataclass(frozen=True)
class Exclusions:
    """units: those compared. table: unit, key, modality, split, reason. name: "" before the first record."""

    name: str
    units: frozenset[str]
    table: pa.Table

    def keys(self) -> pa.Array:
        """Keys of the samples left out, sorted."""
        return self.table["key"].combine_chunks().sort()

    def counts(self) -> dict[tuple[str, str], int]:
        """Samples left out by (modality, split)."""
        pairs = zip(self.table["modality"].to_pylist(), self.table["split"].to_pylist(), strict=True)
        return Counter(pairs)

    def reasons(self) -> dict[str, int]:
        """Samples left out by reason, most first."""
        return dict(Counter(self.table["reason"].to_pylist()).most_common())

    def without(self, table: pa.Table) -> pa.Table:
        """The rows of a table with a column `key` that are not left out."""
        if not self.table.num_rows:
            return table
        return table.filter(pc.invert(pc.is_in(table["key"], self._left_out)))

    @cached_property
    def _left_out(self) -> pa.Array:
        """The keys, joined once: `without` is asked for each part of a catalogue."""
        return self.table["key"].combine_chunks()


_COLUMNS = pa.schema([pa.field(name, _S) for name in ("unit", "key", "modality", "split", "reason")])
NOTHING = Exclusions("", frozenset(), _COLUMNS.empty_table())


def exclusion_names(store: Store) -> list[str]:
    """Names of the records, that of most units first."""
    return sorted((name for name in store.list("exclusions") if _NAME.fullmatch(name)), reverse=True)


def read(store: Store) -> Exclusions:
    """What readers leave out. A damaged record gives way to the next, or to none (verify names it)."""
    found = (read_record(store, name) for name in exclusion_names(store))
    return next((record for record in found if record is not None), NOTHING)


def standing_name(store: Store) -> str:
    """The name of the record that `read` gives; its rows are not looked at."""
    found = (name for name in exclusion_names(store) if _whole(store, name) is not None)
    return next(found, NOTHING.name)


def _whole(store: Store, name: str) -> bytes | None:
    """The bytes of a record, held to the digest in its name; None where it is damaged or gone."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    return data if name == _name_of(data, int(name.rpartition("/")[2][:10])) else None


def read_record(store: Store, name: str) -> Exclusions | None:
    """One record; None where it is damaged or gone."""
    data = _whole(store, name)
    if data is None:
        return None
    table = parquet.read_bytes(data)
    column = table["excluded"].combine_chunks()
    parents, samples = pc.list_parent_indices(column), pc.list_flatten(column)
    flat = [table["unit"].combine_chunks().take(parents)]
    flat += [pc.struct_field(samples, name) for name in _COLUMNS.names[1:]]
    return Exclusions(name, frozenset(table["unit"].to_pylist()), pa.table(flat, schema=_COLUMNS))


def _name_of(data: bytes, units: int) -> str:
    return f"exclusions/{units:010d}-{digest('exclusions', data)}.parquet"


def to_bytes(units: Iterable[str], excluded: Iterable[Excluded]) -> bytes:
    """The record of these units: equal commits, equal bytes."""
    by_unit: dict[str, list[dict[str, str]]] = defaultdict(list)
    for sample in sorted(excluded):
        values = {name: getattr(sample, name) for name in ("key", "modality", "split", "reason")}
        by_unit[sample.unit].append(values)
    rows = sorted(units)
    columns = {"unit": rows, "excluded": [by_unit.get(unit, []) for unit in rows]}
    return parquet.to_bytes(pa.table(columns, schema=EXCLUSIONS_SCHEMA))


def compared(
    store: Store, commits: list[Commit], folder: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[str, bytes]:
    """(name, bytes) of the record of these commits. folder: empty scratch. Raises UserError."""
    total = sum(len(commit.catalogs) for commit in commits)
    told = None if progress is None else lambda done: progress(done, total)
    data = to_bytes((commit.unit for commit in commits), compare(store, commits, folder, told))
    return _name_of(data, len(commits)), data


def update(store: Store, folder: Path, progress: Callable[[int, int], None] | None = None) -> Exclusions:
    """Compare all committed samples and write what is left out, unless that was done for just these commits.

    Any number may run at once, and beside writers; killed, nothing is changed. folder: empty scratch;
    progress: files so far, of how many. Raises UserError for a damaged commit or catalogue, a full disk.
    """
    before = exclusion_names(store)  # then each is of a part of the commits listed next
    commits = list_commits(store)
    units = {commit.unit for commit in commits}
    standing = read(store)
    if standing.units == units:
        return standing
    name, data = compared(store, commits, folder, progress)
    store.put(name, data)
    for other in before:
        if other != name:
            store.delete(other)
    record = read_record(store, name)
    return record if record is not None else read(store)  # another's has replaced it
