"""The local files of a unit of work: encoded pixels spooled to scratch, then a tar and a Parquet a partition.

Each is closed, reopened, counted and hashed; shards.commit puts them under the names they get here.
"""

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards import parquet
from shards.codec import get_codec
from shards.dataset import to_json
from shards.ids import digest
from shards.schema import LOCATION_COLUMNS, QUARANTINE_SCHEMA, Row, catalog_schema, check_row
from shards.store import clear_errors, file_sha256, write_all
from shards.tar import ShardWriter, list_members

_MODALITY_NAME = re.compile(r"[a-z0-9_]{1,32}")
_SPOOL = "samples"
Spooled = tuple[Row, int, int]  # row, offset in the spool, size


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


@contextmanager
def scratch_folder(scratch: Path) -> Iterator[Path]:
    with clear_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="unit-", dir=scratch))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def spool(samples: Iterable[EncodedSample], unit: str, folder: Path) -> dict[str, list[Spooled]]:
    """Write the encoded pixels to one file; rows by modality, sorted by key: the order of samples is lost."""
    rows: dict[str, list[Spooled]] = {}
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


def write_shard(folder: Path, modality: str, spooled: list[Spooled]) -> tuple[CommittedFile, pa.Table]:
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


def write_catalog(folder: Path, modality: str, table: pa.Table) -> CommittedFile:
    path = folder / f"{modality}.parquet"
    size, sha256 = _write_table(path, table)
    name = f"catalog/{modality}/{modality}-{digest('catalog', sha256)}.parquet"
    return CommittedFile(name, modality, size, sha256, table.num_rows)


def write_quarantine(folder: Path, unit: str, rows: Sequence[QuarantineRow]) -> CommittedFile | None:
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


def statistics_of(table: pa.Table) -> dict[str, int]:
    columns = table.select(["rows", "columns", "dtype", "size", "split"]).to_pylist()
    pixels = [c["rows"] * c["columns"] for c in columns]
    item_bytes = {"uint8": 1, "uint16": 2, "int16": 2}
    return {
        "samples": len(columns),
        "pixels": sum(pixels),
        "raw_bytes": sum(p * item_bytes[c["dtype"]] for p, c in zip(pixels, columns, strict=True)),
        "encoded_bytes": sum(c["size"] for c in columns),
    } | {split: sum(c["split"] == split for c in columns) for split in ("train", "val", "test")}
