"""The rule of shards.duplicates over the catalogues of a whole dataset, whatever its size.

First two numbers a sample (of instance and frame, of pixels), spread over files by range, tell which occur
twice; then only the rows with such a number are read, spread by it, and compared group by group. Memory: a
file of rows, 8 bytes a number that occurs twice, 150 bytes a sample that is left out. Scratch: 24 bytes a
sample, 300 a compared row.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards import parquet
from shards.commit import Commit, CommittedFile
from shards.duplicates import GEOMETRY, Excluded, by_content, by_instance
from shards.errors import UserError
from shards.schema import catalog_schema, is_volumes
from shards.store import Store, clear_errors

_NUMBERS = ("instance", "frame", "pixel_digest")
_COLUMNS = ("key", "unit", "source", "modality", "split", "volume", *_NUMBERS, *GEOMETRY)
_ROWS_SCHEMA = pa.schema(
    [
        *(pa.field(name, catalog_schema().field(name).type) for name in _COLUMNS),
        pa.field("lost", pa.bool_()),
        pa.field("by_instance", pa.uint64()),
        pa.field("by_pixels", pa.uint64()),
    ]
)
_NUMBER = np.dtype([("number", "<u8"), ("file", "<i4")])
_NUMBERS_AT_ONCE = 1 << 21
_ROWS_AT_ONCE = 1 << 17
_READ_AT_ONCE = 64  # files
_REQUESTS_AT_ONCE = 16
_NONE = np.uint64(0)  # no instance


def compare(
    store: Store,
    commits: Sequence[Commit],
    folder: Path,
    progress: Callable[[int], None] | None = None,
    numbers_at_once: int = _NUMBERS_AT_ONCE,
    rows_at_once: int = _ROWS_AT_ONCE,
) -> list[Excluded]:
    """The samples that are left out of these commits, sorted. folder: empty scratch; progress: files so far.

    Raises UserError for a catalogue that is missing or damaged, and for a full scratch disk.
    """
    files = [file for commit in commits for file in commit.catalogs]
    with clear_errors(folder):
        repeated, chosen = _repeated(store, files, folder, progress, numbers_at_once)
        if not len(repeated):
            return []
        found = set[Excluded]()
        parts = max(1, sum(files[number].samples for number in chosen) // rows_at_once)
        instances = _Spill(folder / "instances", parts, "by_instance", rows_at_once)
        contents = _Spill(folder / "contents", parts, "by_pixels", rows_at_once)
        for _, table in _tables(store, [files[number] for number in chosen], _COLUMNS):
            rows = _with_numbers(table)
            in_instance = _among(rows["by_instance"].to_numpy(), repeated)
            in_pixels = _among(rows["by_pixels"].to_numpy(), repeated)
            instances.add(rows.filter(pa.array(in_instance)))
            contents.add(rows.filter(pa.array(in_pixels & ~in_instance)))
        for table in instances.tables():
            listed = table.to_pylist()
            found.update(by_instance(listed))
            forward = pa.Table.from_pylist(listed, _ROWS_SCHEMA)
            contents.add(forward.filter(pa.array(_among(forward["by_pixels"].to_numpy(), repeated))))
        for table in contents.tables():
            found.update(by_content(table.to_pylist()))
    return sorted(found)


def _repeated(
    store: Store,
    files: list[CommittedFile],
    folder: Path,
    progress: Callable[[int], None] | None,
    at_once: int,
) -> tuple[NDArray[np.uint64], list[int]]:
    """(numbers that occur more than once, sorted; which files have one)."""
    ranges = max(1, 2 * sum(file.samples for file in files) // at_once)
    waiting: list[NDArray] = []
    held = 0
    for number, table in _tables(store, files, _NUMBERS):
        both = np.concatenate(_numbers(table))
        part = np.empty(np.count_nonzero(both), _NUMBER)
        part["number"], part["file"] = both[both != _NONE], number
        waiting.append(part)
        held += len(part)
        if held >= at_once:
            _append(folder, np.concatenate(waiting), ranges)
            waiting, held = [], 0
        if progress is not None:
            progress(number + 1)
    if waiting:
        _append(folder, np.concatenate(waiting), ranges)
    found: list[NDArray[np.uint64]] = []
    where: set[int] = set()
    for path in sorted(folder.glob("range-*")):
        rows = np.fromfile(path, _NUMBER)
        path.unlink()
        order = np.argsort(rows["number"])  # of plain numbers: ten times as fast as a sort of the pairs
        numbers = rows["number"][order]
        same = numbers[1:] == numbers[:-1]
        twice = np.append(same, False) | np.append(False, same)
        found.append(np.unique(numbers[twice]))
        where.update(np.unique(rows["file"][order[twice]]).tolist())
    return np.concatenate([np.empty(0, np.uint64), *found]), sorted(where)


def _append(folder: Path, rows: NDArray, ranges: int) -> None:
    """Append the numbers to the files of their ranges, which are in order."""
    place = _part(rows["number"], ranges)
    order = np.argsort(place, kind="stable")
    rows, place = rows[order], place[order]
    starts = np.flatnonzero(np.diff(place, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        with open(folder / f"range-{int(place[start]):08d}", "ab") as file:
            file.write(rows[start:end].tobytes())


def _part(numbers: NDArray, parts: int) -> NDArray[np.int64]:
    """Which of `parts` equal ranges of 64-bit numbers each is in."""
    return ((numbers >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)


def _among(numbers: NDArray, found: NDArray[np.uint64]) -> NDArray[np.bool_]:
    places = np.minimum(np.searchsorted(found, numbers), len(found) - 1)
    return (found[places] == numbers) & (numbers != _NONE)


def _tables(
    store: Store, files: Sequence[CommittedFile], columns: Sequence[str]
) -> Iterator[tuple[int, pa.Table]]:
    """(number of the file, its rows with these columns); of volumes those that they lack are filled in."""

    def one(number: int) -> tuple[int, pa.Table]:
        file = files[number]
        own = [name for name in columns if not (is_volumes(file.modality) and name in _NOT_OF_VOLUMES)]
        table = parquet.read(store, file.path, own, threads=False)
        if is_volumes(file.modality):
            table = _as_samples(table, columns)
        return number, table.select(list(columns))

    try:
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE if store.remote else 2) as pool:
            for first in range(0, len(files), _READ_AT_ONCE):
                yield from pool.map(one, range(first, min(first + _READ_AT_ONCE, len(files))))
    except (FileNotFoundError, pa.ArrowException, KeyError):
        raise UserError(f"{store.root}: a catalogue file is missing or damaged: run ingest verify") from None


_NOT_OF_VOLUMES = frozenset({"source", "instance", "frame", "volume"})


def _as_samples(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    for name in _NOT_OF_VOLUMES & set(columns):
        kind = catalog_schema().field(name).type
        values = table["key"] if name == "source" else pa.nulls(table.num_rows, kind)
        table = table.append_column(name, values)
    return table


def _numbers(table: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """64-bit numbers of (instance, frame), 0 where there is no instance, and of the pixels."""
    instances = _number(table["instance"])
    frames = table["frame"].fill_null(0).to_numpy().astype(np.uint64)
    named = table["instance"].is_valid().to_numpy()
    mixed = _mix(instances + (frames + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return np.where(named, mixed, _NONE), _number(table["pixel_digest"])


def _number(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """The first 32 bytes of each text, mixed. Two texts with one number are told apart later."""
    texts = np.array(column.fill_null("").to_pylist(), "S32")
    words = np.ascontiguousarray(texts).view("<u8").reshape(len(texts), 4)
    number = np.zeros(len(texts), np.uint64)
    for word in words.T:
        number = _mix(number ^ word)
    return number | np.uint64(1)  # never _NONE


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _with_numbers(table: pa.Table) -> pa.Table:
    instance, pixels = _numbers(table)
    columns = [*table.columns, pa.array(np.zeros(table.num_rows, bool)), pa.array(instance), pa.array(pixels)]
    return pa.table(columns, schema=_ROWS_SCHEMA)


class _Spill:
    """Rows in files of their own by ranges of a number: all rows of one number are in one file."""

    def __init__(self, folder: Path, parts: int, by: str, at_once: int) -> None:
        self._folder, self._parts, self._by, self._at_once = folder, parts, by, at_once
        self._waiting: list[pa.Table] = []
        self._held = 0
        folder.mkdir(mode=0o700)

    def add(self, rows: pa.Table) -> None:
        self._waiting.append(rows)
        self._held += rows.num_rows
        if self._held >= self._at_once:
            self._flush()

    def tables(self) -> Iterator[pa.Table]:
        """The rows file by file; each is removed."""
        self._flush()
        for path in sorted(self._folder.iterdir()):
            tables = []
            with pa.OSFile(str(path)) as file:
                size = file.size()
                while file.tell() < size:
                    tables.append(pa.ipc.open_stream(file).read_all())
            path.unlink()
            yield pa.concat_tables(tables)

    def _flush(self) -> None:
        if not self._held:
            return
        rows = pa.concat_tables(self._waiting)
        self._waiting, self._held = [], 0
        place = _part(rows[self._by].to_numpy(), self._parts)
        for part in np.unique(place).tolist():
            with (
                open(self._folder / f"{part:08d}", "ab") as file,
                pa.ipc.new_stream(file, _ROWS_SCHEMA) as writer,
            ):
                writer.write_table(rows.filter(pa.array(place == part)))
