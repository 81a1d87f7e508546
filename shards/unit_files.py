"""The local files of a unit of work: encoded pixels spooled to scratch, then a tar and a Parquet a partition.

Each is closed, reopened, counted and hashed; shards.commit puts them under the names they get here.
"""

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq

from shards import parquet
from shards.codec import get_codec
from shards.dataset import to_json
from shards.ids import digest
from shards.schema import (
    LOCATION_COLUMNS,
    QUARANTINE_SCHEMA,
    VOLUME_LOCATION_COLUMNS,
    Row,
    catalog_schema,
    check_row,
    check_volume_row,
    member_names,
    schema_of,
    volume_schema,
)
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
class VolumeSample:
    """A row of volume_schema() without VOLUME_LOCATION_COLUMNS; its slice_keys are those of samples."""

    row: Row


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
            data = source.read(size)
            members = {extension: data, "json": to_json(description)}
            places = writer.add(row["key"], members)
            row["offset"], row["size"] = places[extension]
            row["crc32"] = crc32(data)
            expected += [(f"{row['key']}.{e}", *place) for e, place in places.items()]
    return _finished(path, modality, rows, expected)


def write_volumes(
    folder: Path, partition: str, volumes: Sequence[VolumeSample], spooled: Iterable[Spooled]
) -> tuple[CommittedFile, pa.Table]:
    """As write_shard, of volumes: members <key>.0000.<extension> ... of the slices, then <key>.json."""
    spans = {row["key"]: (offset, size) for row, offset, size in spooled}
    placeholder = [v.row | {"shard": "", "offsets": [], "sizes": []} for v in volumes]
    for row in placeholder:
        check_volume_row(row)
    placeholder.sort(key=lambda row: row["key"])
    rows = pa.Table.from_pylist(placeholder, volume_schema()).to_pylist()
    path = folder / f"{partition}.tar"
    expected = []
    with open(folder / _SPOOL, "rb") as source, ShardWriter(path) as writer:
        for row in rows:
            description = {n: value for n, value in row.items() if n not in VOLUME_LOCATION_COLUMNS}
            names = member_names(row, get_codec(row["codec"]).extension)
            places = writer.add(row["key"], _volume_members(source, row, names, spans, to_json(description)))
            expected += [(f"{row['key']}.{extension}", *place) for extension, place in places.items()]
            *images, _ = places.values()
            row["offsets"], row["sizes"] = [o for o, _ in images], [s for _, s in images]
    return _finished(path, partition, rows, expected)


def _volume_members(
    source: BinaryIO, row: Row, names: list[str], spans: Mapping[str, tuple[int, int]], description: bytes
) -> Iterator[tuple[str, bytes]]:
    for key, name in zip(row["slice_keys"], names, strict=True):
        offset, size = spans[key]
        source.seek(offset)
        yield name.partition(".")[2], source.read(size)
    yield "json", description


def _finished(
    path: Path, partition: str, rows: list[Row], expected: list[tuple[str, int, int]]
) -> tuple[CommittedFile, pa.Table]:
    """A closed tar reopened, counted and hashed, and its rows with its name."""
    if list_members(path) != expected:
        raise OSError(f"{path} does not hold what was written to it")
    sha256 = file_sha256(path)
    name = f"{partition}-{digest('shard', sha256)}.tar"
    for row in rows:
        row["shard"] = name
    file = CommittedFile(f"shards/{partition}/{name}", partition, path.stat().st_size, sha256, len(rows))
    return file, pa.Table.from_pylist(rows, schema_of(partition))


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
    sizes, *rest = ("sizes", "slices") if "slices" in table.column_names else ("size",)
    columns = table.select(["rows", "columns", "dtype", "split", sizes, *rest]).to_pylist()
    pixels = [c["rows"] * c["columns"] * c.get("slices", 1) for c in columns]
    item_bytes = {"uint8": 1, "uint16": 2, "int16": 2}
    return {
        "samples": len(columns),
        "pixels": sum(pixels),
        "raw_bytes": sum(p * item_bytes[c["dtype"]] for p, c in zip(pixels, columns, strict=True)),
        "encoded_bytes": sum(sum(c[sizes]) if rest else c[sizes] for c in columns),
    } | {split: sum(c["split"] == split for c in columns) for split in ("train", "val", "test")}
