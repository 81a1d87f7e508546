"""Does a dataset hold what its commits say? Reads only; nothing is repaired here.

Default: records, existence, sizes, tar index against catalogue and commit, keys and patients over all units.
deep: also sha256 of every file, the rows inside the tars, and every image decoded and held to its digest.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import pyarrow as pa
import pyarrow.compute as pc

from shards import exclusions, parquet
from shards.codec import get_codec
from shards.commit import Commit, CommittedFile, committed_units, orphans, parse_record
from shards.dataset import read_info
from shards.objects import open_store
from shards.records import open_snapshot, record_name, records_of, snapshot_names
from shards.retries import input_count, refusal_count
from shards.schema import (
    LOCATION_COLUMNS,
    QUARANTINE_SCHEMA,
    VOLUME_LOCATION_COLUMNS,
    Row,
    catalog_schema,
    is_volumes,
    member_names,
    members_of,
    schema_of,
    with_added_columns,
)
from shards.stats import pixel_digest, stack_digest
from shards.store import Store
from shards.tar import scan_members

_SPLIT_SCHEMA = pa.schema([catalog_schema().field(name) for name in ("key", "patient", "split")])


@dataclass(frozen=True)
class Problem:
    """One fault. code: closed vocabulary; path: the file, relative to the root; detail: numbers, keys."""

    code: str
    path: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.path}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Report:
    """What was looked at and found. orphans are no problems: no reader sees them, sweep removes them."""

    problems: tuple[Problem, ...]
    units: int
    samples: int
    quarantined: int
    inputs: int
    size: int  # bytes of all committed files
    orphans: tuple[str, ...]
    deep: bool
    volumes: int = 0  # samples: without these
    excluded: int = 0  # images and volumes that readers leave out: not in samples, not in volumes

    @property
    def clean(self) -> bool:
        return not self.problems


def verify(root: str | Path | Store, deep: bool = False, workers: int = 2) -> Report:
    """Check every committed unit. Raises UserError where root is no dataset."""
    store = root if isinstance(root, Store) else open_store(root)
    read_info(store)
    commits, problems, records = _commits(store)
    problems += _snapshots(store, records)
    # A record that cannot be read may name any file: then nothing is known to be an orphan.
    unclaimed = () if len(commits) < len(records) else tuple(orphans(store))
    tables = []
    with ThreadPoolExecutor(workers) as pool:
        for found, table in pool.map(lambda commit: _unit(store, commit, deep), commits):
            problems += found
            tables.append(table)
    problems += _across_units(pa.concat_tables([_SPLIT_SCHEMA.empty_table(), *tables]))
    left_out = exclusions.read(store)
    problems += _exclusions(store, commits, deep and not problems)
    apart = sum(is_volumes(name) for name in left_out.table["modality"].to_pylist())
    return Report(
        problems=tuple(problems),
        units=len(commits),
        samples=sum(f.samples for c in commits for f in c.images) - left_out.table.num_rows + apart,
        volumes=sum(f.samples for c in commits for f in c.catalogs if is_volumes(f.modality)) - apart,
        excluded=left_out.table.num_rows,
        quarantined=refusal_count(commits),
        inputs=input_count(commits),
        size=sum(f.size for c in commits for f in c.files()),
        orphans=unclaimed,
        deep=deep,
    )


def _commits(store: Store) -> tuple[list[Commit], list[Problem], dict[str, bytes]]:
    """The commits, read one by one and from no snapshot; faults; the sha256 of every record by unit."""
    commits, problems, records = [], [], {}
    for unit in sorted(committed_units(store)):
        try:
            data = store.read(record_name(unit))
        except FileNotFoundError:
            continue
        records[unit] = sha256(data).digest()
        try:
            commits.append(parse_record(unit, data))
        except ValueError:
            problems.append(Problem("commit_damaged", record_name(unit)))
    return commits, problems, records


def _snapshots(store: Store, records: dict[str, bytes]) -> list[Problem]:
    """Snapshots that are damaged, which no reader uses, or hold other bytes than the records do."""
    problems = []
    for name in snapshot_names(store):
        file = open_snapshot(store, name)
        if file is None:
            problems.append(Problem("snapshot_damaged", name, "readers do without it: run ingest snapshot"))
            continue
        different = sum(records.get(unit) != sha256(data).digest() for unit, data in records_of(file))
        if different:
            detail = f"{different} records are not those of commits/: ingest repair, or remove this file"
            problems.append(Problem("snapshot_differs", name, detail))
    return problems


def _exclusions(store: Store, commits: list[Commit], again: bool) -> list[Problem]:
    """Records of what is left out that are damaged, or (again) not what a new comparison finds."""
    names = exclusions.exclusion_names(store)
    fix = "run ingest dedupe"
    found = [Problem("exclusions_damaged", n, fix) for n in names if exclusions.read_record(store, n) is None]
    record = exclusions.read(store)
    if again and record.units:
        with tempfile.TemporaryDirectory(prefix="medswav-verify-") as folder:
            compared = [commit for commit in commits if commit.unit in record.units]
            if exclusions.compared(store, compared, Path(folder))[0] != record.name:
                found.append(Problem("exclusions_differ", record.name, fix))
    return found


def _unit(store: Store, commit: Commit, deep: bool) -> tuple[list[Problem], pa.Table]:
    """The problems of one unit; its key, patient and split columns for the checks over all units."""
    problems = [p for file in commit.files() if (p := _file(store, file, deep)) is not None]
    broken = {p.path for p in problems if p.code == "file_missing"}
    tables = [_SPLIT_SCHEMA.empty_table()]
    for shard, catalog in zip(commit.shards, commit.catalogs, strict=False):
        if catalog.path in broken:
            continue
        table = _table(store, catalog, schema_of(catalog.modality), problems)
        if table is None:
            continue
        tables.append(table.select(_SPLIT_SCHEMA.names))
        if shard.path not in broken:
            problems += _shard(store, shard, table)
            if deep:
                problems += _contents(store, shard, table)
    if commit.quarantine is not None and commit.quarantine.path not in broken:
        _table(store, commit.quarantine, QUARANTINE_SCHEMA, problems)
    problems += _counts(commit)
    return problems, pa.concat_tables(tables)


def _file(store: Store, file: CommittedFile, deep: bool) -> Problem | None:
    if not store.exists(file.path):
        return Problem("file_missing", file.path)
    size = store.size(file.path)
    if size != file.size:
        return Problem("size_differs", file.path, f"{size} bytes, committed {file.size}")
    if deep and store.sha256(file.path) != file.sha256:
        return Problem("sha256_differs", file.path)
    return None


def _members(store: Store, shard: CommittedFile) -> list[tuple[str, int, int]]:
    with store.open(shard.path) as file:
        return scan_members(file)


def _counts(commit: Commit) -> list[Problem]:
    samples = sum(shard.samples for shard in commit.shards)
    refused = commit.quarantine.samples if commit.quarantine else 0
    same_files = [(s.modality, s.samples) for s in commit.shards] == [
        (c.modality, c.samples) for c in commit.catalogs
    ]
    if same_files and commit.counts["samples"] == samples and commit.counts["quarantined"] == refused:
        return []
    return [Problem("counts_differ", f"commits/{commit.unit}.json")]


def _table(store: Store, file: CommittedFile, schema: pa.Schema, problems: list[Problem]) -> pa.Table | None:
    """The table of a Parquet file, if it can be read and has the schema and rows that were committed."""
    try:
        table = parquet.read(store, file.path, threads=False)
    except (pa.ArrowException, OSError):
        problems.append(Problem("parquet_damaged", file.path))
        return None
    table = with_added_columns(table, schema)
    if not table.schema.equals(schema):
        problems.append(Problem("schema_differs", file.path))
        return None
    if table.num_rows != file.samples:
        problems.append(Problem("rows_differ", file.path, f"{table.num_rows} rows, committed {file.samples}"))
    return table


def _shard(store: Store, shard: CommittedFile, table: pa.Table) -> list[Problem]:
    """Tar index against catalogue: the same samples, each where its row says, and nothing else."""
    try:
        members = _members(store, shard)
    except (ValueError, OSError) as error:
        return [
            Problem("tar_damaged", shard.path, str(error) if isinstance(error, ValueError) else "unreadable")
        ]
    problems = []
    places = {name: (offset, size) for name, offset, size in members}
    descriptions = sum(name.endswith(".json") for name in places)
    wanted = ("key", "codec", "shard", "modality", "offset", "size", "slices", "offsets", "sizes")
    rows = table.select([name for name in wanted if name in table.column_names]).to_pylist()
    images = sum(row.get("slices", 1) for row in rows)
    if descriptions != shard.samples or len(members) != images + shard.samples:
        detail = f"{len(members)} members, committed {shard.samples} samples of {images} images"
        problems.append(Problem("tar_count_differs", shard.path, detail))
    for row in rows:
        names = member_names(row, get_codec(row["codec"]).extension)
        same = f"{row['key']}.json" in places and row.get("slices", 1) == len(row.get("sizes", [1]))
        if (
            not same
            or [places.get(n) for n in names] != members_of(row)
            or (row["modality"], row["shard"]) != (shard.modality, shard.name)
        ):
            problems.append(Problem("index_differs", shard.path, f"sample {row['key']}"))
    return problems


def _contents(store: Store, shard: CommittedFile, table: pa.Table) -> list[Problem]:
    """Rows inside the tar against the catalogue, pixels against their digest."""
    problems = []
    try:
        places = {name: place for name, *place in _members(store, shard)}
    except (ValueError, OSError):
        return []  # reported by _shard
    for row in table.to_pylist():
        name = f"{row['key']}.json"
        if name in places and not _same_row(store.read(shard.path, *places[name]), row):
            problems.append(Problem("row_differs", shard.path, f"sample {row['key']}"))
        code = _images(store, shard, row)
        if code:
            problems.append(Problem(code, shard.path, f"sample {row['key']}"))
    return problems


def _images(store: Store, shard: CommittedFile, row: Row) -> str:
    """The code of what is wrong with the encoded images of a row; "" where nothing is."""
    digests, same = [], True
    if len(row.get("sizes", [])) != row.get("slices", 0):
        return ""  # reported by _shard
    for offset, size in members_of(row):
        data = store.read(shard.path, offset, size)
        try:
            pixels = get_codec(row["codec"]).decode(data)
        except ValueError:
            return "decode_failed"
        if (*pixels.shape, pixels.dtype.name) != (row["rows"], row["columns"], row["dtype"]):
            return "pixels_differ"
        digests.append(pixel_digest(pixels))
        same = same and row.get("crc32") in (None, crc32(data))
    found = stack_digest(digests) if "slices" in row else digests[0]
    if found != row["pixel_digest"]:
        return "pixels_differ"
    return "" if same else "crc32_differs"


def _same_row(data: bytes, row: Row) -> bool:
    hidden = VOLUME_LOCATION_COLUMNS if "slices" in row else LOCATION_COLUMNS
    try:
        return json.loads(data) == {name: v for name, v in row.items() if name not in hidden}
    except ValueError:
        return False


def _across_units(table: pa.Table) -> list[Problem]:
    """Each key once in the whole dataset; each patient in one split."""
    keys = table.group_by("key").aggregate([("key", "count")])
    repeated = keys.filter(pc.greater(keys["key_count"], 1))["key"].to_pylist()
    patients = table.group_by("patient").aggregate([("split", "count_distinct")])
    leaking = patients.filter(pc.greater(patients["split_count_distinct"], 1))["patient"].to_pylist()
    return [Problem("key_repeated", "catalog", f"sample {key}") for key in sorted(repeated)] + [
        Problem("patient_in_two_splits", "catalog", f"patient {p}") for p in sorted(leaking)
    ]
