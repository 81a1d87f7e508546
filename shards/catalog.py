"""Reading a dataset: the committed rows, whatever the order in which their units were committed."""

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from shards import exclusions, parquet
from shards.commit import Commit, CommittedFile, list_commits, parse_record
from shards.dataset import read_info
from shards.errors import UserError
from shards.ids import digest, frame
from shards.objects import open_store
from shards.records import all_records
from shards.retries import standing, superseded
from shards.schema import QUARANTINE_SCHEMA, Split, is_volumes, schema_of
from shards.store import Store, clear_errors

_REQUESTS_AT_ONCE = 16  # of an object store
_ROWS_AT_ONCE, _GROUPS_AHEAD = 65_536, 2
_LABELS_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _open(root: str | Path | Store) -> Store:
    """The store of a dataset. Raises UserError where there is none."""
    store = root if isinstance(root, Store) else open_store(root)
    read_info(store)
    return store


def load(
    root: str | Path | Store,
    modality: str | None = None,
    columns: Sequence[str] | None = None,
    split: str | None = None,
) -> pa.Table:
    """The committed catalogue rows, sorted by key, with the columns of catalog_schema() or those asked for.

    Without those of shards.exclusions.

    modality, split: only these rows. Volumes (volume_schema()) are given for modality="ct_volumes" and the
    like only; shards.volumes reads their pixels.
    Raises UserError where root is no dataset or a file is missing.
    """
    store = _open(root)
    schema = schema_of(modality or "")
    wanted = list(columns) if columns is not None else schema.names
    commits = list_commits(store)
    files = [f for c in commits for f in (c.images if modality is None else c.catalogs)]
    files = [f for f in files if modality in (None, f.modality)]
    if not files:
        return schema.empty_table().select(wanted)
    read = list(dict.fromkeys([*wanted, "key"]))
    with clear_errors(store.root):
        try:
            table = _read_catalogs(store, [f.path for f in files], schema, read, split)
        except (FileNotFoundError, pa.ArrowInvalid):
            raise _damaged(store) from None
    committed = _committed_rows(commits, files, modality, split)
    if table.num_rows != committed:
        raise _differing(store, table.num_rows, committed)
    table = exclusions.read(store).without(table)
    return table.sort_by("key").select(wanted).combine_chunks()


def _committed_rows(
    commits: Sequence[Commit], files: Sequence[CommittedFile], modality: str | None, split: str | None
) -> int:
    """Rows of these catalogue parts, or those of a split, as the commits have them."""
    if split is None:
        return sum(file.samples for file in files)
    return sum(
        statistics[split]
        for commit in commits
        for name, statistics in commit.statistics.items()
        if name == modality or (modality is None and not is_volumes(name))
    )


def _read_catalogs(
    store: Store, names: list[str], schema: pa.Schema, columns: list[str], split: str | None
) -> pa.Table:
    chosen = None if split is None else pc.field("split") == split
    if not store.remote:
        paths = [str(store.local(name)) for name in names]
        return pads.dataset(paths, schema=schema, format="parquet").to_table(columns, filter=chosen)

    def one(name: str) -> pa.Table:  # whole, in one request: a part is small
        part = pads.ParquetFileFormat().make_fragment(pa.BufferReader(store.read(name)))
        return part.to_table(schema=schema, columns=columns, filter=chosen)

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return pa.concat_tables(pool.map(one, names))


@dataclass(frozen=True)
class Selection:
    """The rows of a modality in a split (None: all), known from the commits; none of them is read yet.

    committed: rows, with those that are left out. state: as `state` gives it.
    """

    store: Store
    modality: str
    split: str | None
    files: tuple[CommittedFile, ...]
    committed: int
    left_out: exclusions.Exclusions
    state: str

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows, some catalogue parts at a time, read ahead. Raises UserError."""
        read, found = list(dict.fromkeys([*columns, "key"])), 0
        for table in _ahead(self._parts, _groups(self.files), read):
            found += table.num_rows
            yield self.left_out.without(table).select(columns)
        if found != self.committed:
            raise _differing(self.store, found, self.committed)

    def _parts(self, names: list[str], columns: list[str]) -> pa.Table:
        with clear_errors(self.store.root):
            try:
                return _read_catalogs(self.store, names, schema_of(self.modality), columns, self.split)
            except (FileNotFoundError, pa.ArrowInvalid):
                raise _damaged(self.store) from None


def state(root: str | Path | Store) -> str:
    """A digest of all commits and of what is left out: another one whenever a row may be another."""
    store = _open(root)
    records = hashlib.sha256()
    for unit, data in all_records(store):
        records.update(frame(unit, data))
    return digest("state", records.digest(), exclusions.standing_name(store))


def select(root: str | Path | Store, modality: str, split: str | None = None) -> Selection:
    """Raises UserError where root is no dataset. Memory: the names of the modality's catalogue parts."""
    store = _open(root)
    records, committed = hashlib.sha256(), 0
    files: list[CommittedFile] = []
    for unit, data in all_records(store):
        records.update(frame(unit, data))
        commit = parse_record(unit, data)
        own = [file for file in commit.catalogs if file.modality == modality]
        committed += _committed_rows([commit], own, modality, split)
        files += own
    left_out = exclusions.read(store)
    known = digest("state", records.digest(), left_out.name)
    return Selection(store, modality, split, tuple(files), committed, left_out, known)


def _groups(files: Sequence[CommittedFile]) -> Iterator[list[str]]:
    """Parts that are read together: a unit of ingest may have few rows."""
    group: list[str] = []
    rows = 0
    for file in files:
        group.append(file.path)
        rows += file.samples
        if rows >= _ROWS_AT_ONCE:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _ahead(
    read: Callable[[list[str], list[str]], pa.Table], groups: Iterable[list[str]], columns: list[str]
) -> Iterator[pa.Table]:
    with ThreadPoolExecutor(_GROUPS_AHEAD) as pool:
        waiting: deque[Future[pa.Table]] = deque()
        for group in groups:
            waiting.append(pool.submit(read, group, columns))
            if len(waiting) > _GROUPS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _damaged(store: Store) -> UserError:
    return UserError(f"{store.root}: a catalogue file is missing or damaged: run ingest verify")


def _differing(store: Store, found: int, committed: int) -> UserError:
    return UserError(
        f"{store.root}: the catalogue holds {found} rows where the commits count {committed}: "
        "run ingest verify"
    )


def counts(root: str | Path | Store, volumes: bool = False) -> dict[str, dict[str, int]]:
    """{modality: {train, val, test: number of samples}}, without those left out.

    Of 2D samples, or of volumes.
    """
    store = _open(root)
    totals: dict[str, dict[str, int]] = {}
    for commit in list_commits(store):
        for modality, statistics in commit.statistics.items():
            if is_volumes(modality) != volumes:
                continue
            total = totals.setdefault(modality, {s.value: 0 for s in Split})
            for split in total:
                total[split] += statistics[split]
    for (modality, split), left_out in exclusions.read(store).counts().items():
        if modality in totals:
            totals[modality][split] -= left_out
    return dict(sorted(totals.items()))


def mean_bytes(root: str | Path | Store, volumes: bool = False) -> dict[str, float]:
    """Encoded bytes of a 2D sample, or of a volume, by modality, with those left out, from the commits."""
    samples: dict[str, int] = {}
    encoded: dict[str, int] = {}
    for commit in list_commits(_open(root)):
        for modality, statistics in commit.statistics.items():
            if is_volumes(modality) == volumes:
                samples[modality] = samples.get(modality, 0) + statistics["samples"]
                encoded[modality] = encoded.get(modality, 0) + statistics["encoded_bytes"]
    return {modality: encoded[modality] / n for modality, n in sorted(samples.items()) if n}


def quarantine(root: str | Path | Store) -> pa.Table:
    """The refusals that count (QUARANTINE_SCHEMA; shards.retries), sorted by source and frame."""
    store = _open(root)
    commits = list_commits(store)
    gone = superseded(commits)
    files = [(c.unit, c.quarantine.path) for c in commits if c.quarantine]
    with clear_errors(store.root):
        tables = [standing(parquet.read(store, path), unit, gone) for unit, path in files]
    order = [("source", "ascending"), ("frame", "ascending"), ("unit", "ascending"), ("reason", "ascending")]
    return pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *tables]).sort_by(order).combine_chunks()


def write_labels(store: Store, name: str, table: pa.Table) -> str:
    """Store or replace labels/<name>.parquet, sorted by its column `key`. Returns the file's name.

    Raises UserError for a name that is no plain word, ValueError for a table without unique keys.
    """
    keys = table["key"] if "key" in table.column_names else None
    if keys is None or keys.null_count or pc.count_distinct(keys).as_py() != table.num_rows:
        raise ValueError("a label table has a column `key`, each key once")
    path = _labels_path(name)
    store.put(path, parquet.to_bytes(table.sort_by("key")))
    return path


def labels(root: str | Path | Store, name: str) -> pa.Table:
    """labels/<name>.parquet. Raises UserError that lists the names there are."""
    return labels_with_digest(root, name)[0]


def labels_with_digest(root: str | Path | Store, name: str) -> tuple[pa.Table, str]:
    """`labels`, and a digest of its file: equal tables give equal digests."""
    store = _open(root)
    path = _labels_path(name)
    if not store.exists(path):
        there = ", ".join(label_names(store)) or "none"
        raise UserError(f"{store.root} has no labels {name!r} (there are: {there}): run ingest label first")
    data = store.read(path)
    return parquet.read_bytes(data), digest(data)


def label_names(root: str | Path | Store) -> list[str]:
    """Names of the label tables of a dataset."""
    store = _open(root)
    return [n.removeprefix("labels/").removesuffix(".parquet") for n in store.list("labels")]


def _labels_path(name: str) -> str:
    if not _LABELS_NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name for labels: use letters, digits, - and _")
    return f"labels/{name}.parquet"
