"""Exactly-once commits: what a finished unit of work wrote becomes visible in one step.

1. Write a tar and a Parquet file a modality to local scratch, close, reopen, count, hash.
2. Put them under final names that are digests of their content: a retry rewrites the same bytes.
3. Create commits/<unit>.json if absent: the only truth, readers look at nothing else.

So a kill at any point leaves either no commit (and orphans, which the sweep removes) or all of it, and of two
writers of a unit one commits and both return that commit. The sync order makes this hold over a power cut
too: files and folders are durable before the commit that names them.
"""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards import parquet
from shards.codec import get_codec
from shards.dataset import to_json
from shards.ids import digest
from shards.schema import FORMAT_VERSION, LOCATION_COLUMNS, QUARANTINE_SCHEMA, Row, catalog_schema, check_row
from shards.store import TEMPORARY_PREFIX, Store, clear_errors, file_sha256, write_all
from shards.tar import ShardWriter, list_members

_UNIT_NAME = re.compile(r"[A-Za-z0-9-]{1,100}")
_MODALITY_NAME = re.compile(r"[a-z0-9_]{1,32}")
_SPOOL = "samples"
# What the sweep may remove: our own names in our own folders, nothing else that lies in the root.
_OURS = re.compile(
    r"shards/([a-z0-9_]{1,32})/\1-[a-z2-7]{26}\.tar"
    r"|catalog/([a-z0-9_]{1,32})/\2-[a-z2-7]{26}\.parquet"
    r"|quarantine/[A-Za-z0-9-]{1,100}-[a-z2-7]{26}\.parquet"
)
_OUR_TEMPORARY = re.compile(
    r"((shards|catalog)/[a-z0-9_]{1,32}/|(quarantine|commits|plans|labels)/)?"
    + re.escape(TEMPORARY_PREFIX)
    + r"[0-9a-f]{16}-[^/]+"
)
_MANAGED_FOLDERS = ("shards", "catalog", "quarantine")
_Spooled = tuple[Row, int, int]  # row, offset in the spool, size


@dataclass
class EncodedSample:
    """A row without LOCATION_COLUMNS and the encoded pixels, in the codec that the row names."""

    row: Row
    data: bytes


@dataclass(frozen=True)
class QuarantineRow:
    """A refused input: pseudonymous source, frame (-1: all of it), kind, partition or "none", a Reason."""

    source: str
    frame: int
    kind: str
    modality: str
    reason: str


@dataclass(frozen=True)
class CommittedFile:
    """One file of a commit: a shard, a catalogue part or (modality "") the quarantine; samples = its rows."""

    path: str  # relative to the root
    modality: str
    size: int
    sha256: str
    samples: int

    @property
    def name(self) -> str:
        """The last part of the path: what the catalogue calls `shard`."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Retry:
    """An attempt (1, 2, ...) at refused inputs of the planned unit `unit` (shards.retries).

    sources: theirs. rows: refusals of theirs in earlier commits, which count no more.
    """

    unit: str
    attempt: int
    sources: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Commit:
    """What a finished unit wrote.

    counts: samples, quarantined, inputs. statistics: {modality: {samples, pixels, raw_bytes, encoded_bytes,
    train, val, test}}, all integers.
    """

    unit: str
    shards: tuple[CommittedFile, ...]
    catalogs: tuple[CommittedFile, ...]
    quarantine: CommittedFile | None
    counts: dict[str, int]
    statistics: dict[str, dict[str, int]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    retry: Retry | None = None  # left out of the record where there is none

    def files(self) -> tuple[CommittedFile, ...]:
        """Every file the commit names."""
        return self.shards + self.catalogs + ((self.quarantine,) if self.quarantine else ())


def commit_unit(
    store: Store,
    unit: str,
    samples: Iterable[EncodedSample],
    quarantine: Sequence[QuarantineRow],
    scratch: str | Path,
    inputs: int,
    retry: Retry | None = None,
) -> Commit:
    """Write what a unit of work made and commit it; the commit that stands where there was one before.

    samples: in any order, each key once; they are spooled to scratch, so an iterator needs little memory.
    quarantine: may be a list that grows while `samples` is consumed. inputs: number of input files.
    Raises UserError for a full, read-only or forbidden disk (nothing is committed; run again), ValueError
    for rows that break the schema.
    """
    if not _UNIT_NAME.fullmatch(unit):
        raise ValueError("a unit id has only letters, digits and -")
    standing = find_commit(store, unit)
    if standing is not None:
        return standing
    with _scratch_folder(Path(scratch)) as folder:
        spooled = _spool(samples, unit, folder)
        with clear_errors(scratch):
            commit, local_files = _write_local(folder, unit, spooled, quarantine, inputs)
        commit = dataclasses.replace(commit, retry=retry)
        for file, path in local_files:
            if store.put(file.path, path) != file.sha256:
                raise OSError(f"{path} changed while it was copied")
    # The loser of a race has put the same content-addressed files, or orphans: harmless either way.
    if store.create(_commit_name(unit), _record(commit)):
        return commit
    return _read_commit(store, unit)


@contextmanager
def _scratch_folder(scratch: Path) -> Iterator[Path]:
    with clear_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="unit-", dir=scratch))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_local(
    folder: Path,
    unit: str,
    spooled: dict[str, list[_Spooled]],
    quarantine: Sequence[QuarantineRow],
    inputs: int,
) -> tuple[Commit, list[tuple[CommittedFile, Path]]]:
    """Step 1: the files of a unit in `folder`, checked, and the commit that names them."""
    shards: list[CommittedFile] = []
    catalogs: list[CommittedFile] = []
    statistics: dict[str, dict[str, int]] = {}
    local: list[tuple[CommittedFile, Path]] = []
    for modality, rows in sorted(spooled.items()):
        shard, table = _write_shard(folder, modality, rows)
        catalog = _write_catalog(folder, modality, table)
        shards.append(shard)
        catalogs.append(catalog)
        statistics[modality] = _statistics(table)
        local += [(shard, folder / f"{modality}.tar"), (catalog, folder / f"{modality}.parquet")]
    refused = _write_quarantine(folder, unit, quarantine)
    if refused is not None:
        local.append((refused, folder / "quarantine.parquet"))
    counts = {
        "samples": sum(s.samples for s in shards),
        "quarantined": refused.samples if refused else 0,
        "inputs": inputs,
    }
    return Commit(unit, tuple(shards), tuple(catalogs), refused, counts, statistics), local


def _spool(samples: Iterable[EncodedSample], unit: str, folder: Path) -> dict[str, list[_Spooled]]:
    """Write the encoded pixels to one file; rows by modality, sorted by key: the order of samples is lost."""
    rows: dict[str, list[_Spooled]] = {}
    offset = 0
    with open(folder / _SPOOL, "xb", buffering=0) as file:
        for sample in samples:
            row = sample.row
            check_row(row | {"shard": "", "offset": 0, "size": 0})
            if LOCATION_COLUMNS & row.keys() or row["unit"] != unit:
                raise ValueError("a row names its unit and not its location")
            if not _MODALITY_NAME.fullmatch(row["modality"]):
                raise ValueError(f"not a modality name: {row['modality']!r}")
            with clear_errors(folder.parent):  # ours only: an error of the source is not for us to name
                write_all(file.fileno(), sample.data)
            rows.setdefault(row["modality"], []).append((row, offset, len(sample.data)))
            offset += len(sample.data)
    for spooled in rows.values():
        spooled.sort(key=lambda s: s[0]["key"])
    return rows


def _write_shard(folder: Path, modality: str, spooled: list[_Spooled]) -> tuple[CommittedFile, pa.Table]:
    """The tar of one modality; also its catalogue table, with the locations."""
    placeholder = [row | {"shard": "", "offset": 0, "size": 0} for row, _, _ in spooled]
    # Through Arrow and back: plain Python values, every column present, the types of the catalogue.
    rows = pa.Table.from_pylist(placeholder, catalog_schema()).to_pylist()
    path = folder / f"{modality}.tar"
    extensions = {name: get_codec(name).extension for name in {row["codec"] for row in rows}}
    expected = []
    with open(folder / _SPOOL, "rb") as source, ShardWriter(path) as writer:
        for row, (_, offset, size) in zip(rows, spooled, strict=True):
            source.seek(offset)
            extension = extensions[row["codec"]]
            description = {name: value for name, value in row.items() if name not in LOCATION_COLUMNS}
            members = {extension: source.read(size), "json": to_json(description)}
            places = writer.add(row["key"], members)
            row["offset"], row["size"] = places[extension]
            expected += [(f"{row['key']}.{e}", *place) for e, place in places.items()]
    if list_members(path) != expected:
        raise OSError(f"{path} does not hold what was written to it")
    sha256 = file_sha256(path)
    name = f"{modality}-{digest('shard', sha256)}.tar"
    for row in rows:
        row["shard"] = name
    file = CommittedFile(f"shards/{modality}/{name}", modality, path.stat().st_size, sha256, len(rows))
    return file, pa.Table.from_pylist(rows, catalog_schema())


def _write_catalog(folder: Path, modality: str, table: pa.Table) -> CommittedFile:
    path = folder / f"{modality}.parquet"
    size, sha256 = _write_table(path, table)
    name = f"catalog/{modality}/{modality}-{digest('catalog', sha256)}.parquet"
    return CommittedFile(name, modality, size, sha256, table.num_rows)


def _write_quarantine(folder: Path, unit: str, rows: Sequence[QuarantineRow]) -> CommittedFile | None:
    if not rows:
        return None
    ordered = sorted(dataclasses.astuple(row) for row in rows)
    values = [QuarantineRow(*row).__dict__ | {"unit": unit} for row in ordered]
    size, sha256 = _write_table(
        folder / "quarantine.parquet", pa.Table.from_pylist(values, QUARANTINE_SCHEMA)
    )
    # With the digest in its name a writer that lost the race cannot replace what the commit names.
    name = f"quarantine/{unit}-{digest('quarantine', sha256)}.parquet"
    return CommittedFile(name, "", size, sha256, len(rows))


def _write_table(path: Path, table: pa.Table) -> tuple[int, str]:
    """Write, close, reopen, count. (size in bytes, sha256)."""
    parquet.write_local(path, table)
    if pq.read_metadata(path).num_rows != table.num_rows:
        raise OSError(f"{path} does not hold what was written to it")
    return path.stat().st_size, file_sha256(path)


def _statistics(table: pa.Table) -> dict[str, int]:
    columns = table.select(["rows", "columns", "dtype", "size", "split"]).to_pylist()
    pixels = [c["rows"] * c["columns"] for c in columns]
    item_bytes = {"uint8": 1, "uint16": 2, "int16": 2}
    return {
        "samples": len(columns),
        "pixels": sum(pixels),
        "raw_bytes": sum(p * item_bytes[c["dtype"]] for p, c in zip(pixels, columns, strict=True)),
        "encoded_bytes": sum(c["size"] for c in columns),
    } | {split: sum(c["split"] == split for c in columns) for split in ("train", "val", "test")}


def _commit_name(unit: str) -> str:
    return f"commits/{unit}.json"


def _record(commit: Commit) -> bytes:
    values = dataclasses.asdict(commit)
    if commit.retry is None:
        del values["retry"]
    return to_json(values)


def _read_commit(store: Store, unit: str) -> Commit:
    """Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    values = json.loads(store.read(_commit_name(unit)))
    try:
        values["shards"] = tuple(CommittedFile(**v) for v in values["shards"])
        values["catalogs"] = tuple(CommittedFile(**v) for v in values["catalogs"])
        if values["quarantine"] is not None:
            values["quarantine"] = CommittedFile(**values["quarantine"])
        if (retry := values.get("retry")) is not None:
            values["retry"] = Retry(**retry | {"sources": tuple(retry["sources"])})
        commit = Commit(**values)
    except (KeyError, TypeError) as error:
        raise ValueError("a damaged commit record") from error
    if commit.unit != unit or not {"samples", "quarantined", "inputs"} <= commit.counts.keys():
        raise ValueError("a commit record under a wrong name, or without its counts")
    return commit


def find_commit(store: Store, unit: str) -> Commit | None:
    """The commit of a unit, or None."""
    return _read_commit(store, unit) if store.exists(_commit_name(unit)) else None


def release_unit(store: Store, unit: str) -> bool:
    """Give a planned unit up by an empty commit: its inputs belong to no unit again. False: it is committed.

    The same create-if-absent as a commit: of a writer of the unit and its release exactly one wins.
    """
    counts = {"samples": 0, "quarantined": 0, "inputs": 0}
    empty = Commit(unit, (), (), None, counts)
    return store.create(_commit_name(unit), _record(empty)) or is_release(_read_commit(store, unit))


def is_release(commit: Commit) -> bool:
    """Whether the unit was given up: every commit of work has at least one input."""
    return commit.counts["inputs"] == 0


def list_commits(store: Store) -> list[Commit]:
    """All commits, sorted by unit id. Raises ValueError where a record is damaged (see verify)."""
    return [_read_commit(store, unit) for unit in sorted(committed_units(store))]


def committed_units(store: Store) -> set[str]:
    """Ids of all committed units."""
    names = (name.rpartition("/")[2] for name in store.list("commits"))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def committed_sources(store: Store) -> set[str]:
    """Pseudonyms of all inputs that gave a committed sample or a quarantine row."""
    sources: set[str] = set()
    for commit in list_commits(store):
        files = commit.catalogs + ((commit.quarantine,) if commit.quarantine else ())
        for file in files:
            with clear_errors(store.root):
                column = parquet.read(store, file.path, ["source"])
            sources.update(column["source"].to_pylist())
    return sources


def orphans(store: Store) -> list[str]:
    """Sorted names of ours that no commit accounts for: uncommitted files and temporary files."""
    # Files first: what is committed while we look is then in the commits that we list afterwards.
    present = [n for folder in _MANAGED_FOLDERS for n in store.list(folder) if _OURS.fullmatch(n)]
    temporary = [n for n in store.temporaries() if _OUR_TEMPORARY.fullmatch(n)]
    named = {file.path for commit in list_commits(store) for file in commit.files()}
    return sorted(set(present) - named | set(temporary))


def sweep(store: Store, dry_run: bool = False, min_age_seconds: float = 0.0) -> list[str]:
    """Remove orphans; the names removed (dry_run: that would be).

    Only while nobody writes to the dataset, or with a min_age_seconds longer than any commit takes: the files
    of a commit under way are orphans until it is created.
    """
    removed = []
    for name in orphans(store):
        try:
            old_enough = min_age_seconds <= 0 or store.age_seconds(name) >= min_age_seconds
        except FileNotFoundError:  # its writer has just finished with it
            continue
        if old_enough:
            removed.append(name)
            if not dry_run:
                store.delete(name)
    return removed
