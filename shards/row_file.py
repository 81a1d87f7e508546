"""Catalogue rows in files that all processes of a node map: one copy in the page cache, whoever reads it.

A folder of plain .npy files: `rows` (one record a row: columns side by side, so that a row is one place in
memory), `by_key` (row numbers in the order of the keys), and the values that text columns point to by their
number, which no offset of 32 bits limits. Rows lie by shard and offset. Every record ends with its CRC-32.

`write` holds the rows of one catalogue part or one shard in memory, never all: parts go to a spool as they
come, each sorted, and its runs of one shard are copied in the order of the shards' names.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.ids import ID_LENGTH
from shards.schema import catalog_schema
from shards.store import OPS, write_all

FORMAT = 1
_ROWS, _BY_KEY = "rows.npy", "by_key.npy"
_KEY = f"|S{ID_LENGTH}"
_STRUCT = {_KEY: f"{ID_LENGTH}s", "<u2": "H", "<u4": "I", "<i4": "i", "<i8": "q", "<f8": "d"}
_BUCKET_ROWS = 1 << 20  # whose keys are sorted at a time
_COPY_ROWS = 1 << 17


class LongKeyError(ValueError):
    """A key is longer than those of this format."""


def row_bytes(columns: Sequence[str]) -> int:
    """Bytes of a row on disk, and in memory where it is used."""
    return _dtype(columns).itemsize + 4


def _dtype(columns: Sequence[str]) -> np.dtype[Any]:
    schema = catalog_schema()
    fields = [(name, _field_type(name, schema.field(name).type)) for name in columns]
    return np.dtype([*fields, ("nulls", "<u2"), ("check", "<u4")])


def _field_type(name: str, kind: pa.DataType) -> str:
    if name == "key":
        return _KEY
    if pa.types.is_string(kind):
        return "<u4"
    return {pa.int32(): "<i4", pa.int64(): "<i8", pa.float64(): "<f8"}[kind]


def _texts(columns: Sequence[str]) -> list[str]:
    schema = catalog_schema()
    return [name for name in columns if name != "key" and pa.types.is_string(schema.field(name).type)]


def write(folder: Path, tables: Iterable[pa.Table], columns: Sequence[str]) -> int:
    """Write the rows of all tables into an empty folder; how many there are.

    columns: at most 16 of shards.schema, among them key, shard and offset; each table has them. Every file is
    durable when this returns. Raises OSError for a full disk, LongKeyError.
    """
    spool = folder / "spool"
    with open(spool, "xb", buffering=0) as file:
        runs, texts = _spool(file, tables, columns)
    count = sum(length for _, _, length in runs)
    if count:
        _sort_runs(folder / _ROWS, spool, runs, texts["shard"], _dtype(columns))
        keys = np.load(folder / _ROWS, mmap_mode="r")["key"]
        _write_by_key(folder / _BY_KEY, keys)
        for name, codes in texts.items():
            values = np.array([text.encode() for text in codes])
            with _npy(folder / f"{name}.npy", values.dtype, len(values)) as file:
                write_all(file.fileno(), values.view(np.uint8).data)
    spool.unlink()
    return count


def _spool(
    file: BinaryIO, tables: Iterable[pa.Table], columns: Sequence[str]
) -> tuple[list[tuple[int, int, int]], dict[str, dict[str, int]]]:
    """(runs of one shard: its number, first row, rows), and {column: {text: its number}}."""
    dtype, done = _dtype(columns), 0
    texts: dict[str, dict[str, int]] = {name: {} for name in _texts(columns)}
    runs: list[tuple[int, int, int]] = []
    for table in tables:
        if not table.num_rows:
            continue
        records = _records(table, dtype, texts)
        records = records[np.lexsort((records["offset"], records["shard"]))]
        _add_checks(records)
        starts = np.flatnonzero(np.diff(records["shard"], prepend=np.uint32(0xFFFFFFFF)))
        for start, end in zip(starts, [*starts[1:], len(records)], strict=True):
            runs.append((int(records["shard"][start]), done + int(start), int(end - start)))
        write_all(file.fileno(), records.view(np.uint8).data)
        done += len(records)
    return runs, texts


def _records(table: pa.Table, dtype: np.dtype[Any], texts: Mapping[str, dict[str, int]]) -> NDArray[Any]:
    records = np.zeros(table.num_rows, dtype)
    for number, name in enumerate(dtype.names[:-2] if dtype.names else ()):
        column = table[name].combine_chunks()
        if column.null_count:
            records["nulls"] |= column.is_null().to_numpy(zero_copy_only=False).astype(np.uint16) << number
        if name == "key":
            records[name] = _of_width(fixed_keys(column))
        elif name in texts:
            records[name] = _codes(column, texts[name])
        else:
            records[name] = column.fill_null(0).to_numpy(zero_copy_only=False)
    return records


def _of_width(keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    if keys.dtype != np.dtype(_KEY):
        raise LongKeyError(f"a key has more than {ID_LENGTH} characters")
    return keys


def fixed_keys(keys: pa.Array) -> NDArray[np.bytes_]:
    """Keys as UTF-8 of a fixed width, the longest's, at least ID_LENGTH. They sort as their text does."""
    shortest, longest = (pc.min_max(pc.binary_length(keys)).as_py()[name] for name in ("min", "max"))
    if shortest == longest == ID_LENGTH:  # the usual ones: no Python object a key
        _, offsets, data = keys.buffers()
        return np.frombuffer(data, _KEY, len(keys), int(np.frombuffer(offsets, "<i4")[keys.offset]))
    width = max(longest or 0, ID_LENGTH)
    return np.array([key.encode() for key in keys.to_pylist()], f"S{width}")


def _codes(column: pa.Array, known: dict[str, int]) -> NDArray[np.uint32]:
    encoded = column.fill_null("").dictionary_encode()
    numbers = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
    found: NDArray[np.uint32] = np.array(numbers, np.uint32)[encoded.indices.to_numpy()]
    return found


def _add_checks(records: NDArray[Any]) -> None:
    """CRC-32 of each record without its last 4 bytes."""
    size = records.dtype.itemsize
    data = records.view(np.uint8).data
    records["check"] = [crc32(data[at : at + size - 4]) for at in range(0, len(records) * size, size)]


def _sort_runs(
    path: Path, spool: Path, runs: Sequence[tuple[int, int, int]], shards: Mapping[str, int], dtype: Any
) -> None:
    """The spooled rows by the name of their shard, then by offset."""
    place = {shards[name]: rank for rank, name in enumerate(sorted(shards))}
    spooled = np.memmap(spool, dtype, "r")
    with _npy(path, dtype, sum(length for _, _, length in runs)) as file:
        ordered = sorted(runs, key=lambda run: (place[run[0]], run[1]))
        for _, group in groupby(ordered, key=lambda run: run[0]):
            parts = [spooled[first : first + length] for _, first, length in group]
            rows = parts[0]
            if len(parts) > 1:  # several parts name one shard
                rows = np.concatenate(parts)
                rows = rows[np.argsort(rows["offset"], kind="stable")]
            write_all(file.fileno(), np.ascontiguousarray(rows).view(np.uint8).data)


def _write_by_key(path: Path, keys: NDArray[np.bytes_]) -> None:
    """uint32: the row of the first key, of the second, ... A bucket of keys is sorted at a time."""
    count = len(keys)
    sample = np.sort(keys[:: max(1, count // (1 << 16))])
    buckets = -(-count // _BUCKET_ROWS)
    limits = sample[[len(sample) * n // buckets for n in range(1, buckets)]]
    of = np.empty(count, np.uint16)
    for first in range(0, count, _COPY_ROWS):
        part = np.ascontiguousarray(keys[first : first + _COPY_ROWS])
        of[first : first + len(part)] = np.searchsorted(limits, part, side="right")
    with _npy(path, np.dtype("<u4"), count) as file:
        for bucket in range(buckets):
            rows = np.flatnonzero(of == bucket).astype(np.uint32)
            order = _order_of(keys[rows])
            write_all(file.fileno(), rows[order].view(np.uint8).data)


def _order_of(keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Order of the keys as bytes: by the first 8 of them as a number, by all of them where two are equal."""
    wide = np.zeros(len(keys), f"S{ID_LENGTH + -ID_LENGTH % 8}")
    wide[:] = keys
    words = wide.view(">u8").reshape(len(keys), -1)
    first = words[:, 0].astype(np.uint64)
    order = np.argsort(first)
    ordered = first[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.lexsort(words.T[::-1])
    return order


@contextmanager
def _npy(path: Path, dtype: np.dtype[Any], count: int) -> Iterator[BinaryIO]:
    """A new .npy file of so many values, to be written in pieces; durable at the end."""
    with open(path, "xb", buffering=0) as file:
        about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, about)
        yield file
        OPS.fsync(file.fileno())


def _mapped(path: Path) -> NDArray[Any]:
    return np.load(path, mmap_mode="r").view(np.ndarray)


class RowFile:
    """The rows of a folder that `write` made, mapped: opening costs no memory, a row that is used one page.

    Raises FileNotFoundError where the folder is gone, ValueError where it is not what was written.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self.folder, self._names = folder, tuple(columns)
        dtype = _dtype(columns)
        rows = _mapped(folder / _ROWS)
        self.by_key: NDArray[np.uint32] = _mapped(folder / _BY_KEY)
        if rows.dtype != dtype or rows.ndim != 1 or self.by_key.shape != rows.shape:
            raise ValueError(f"{folder} is of another format")
        self._rows, self._size = rows, dtype.itemsize
        self._data = rows.view(np.uint8).data
        self._unpack = struct.Struct(
            "<" + "".join(_STRUCT[dtype[name].str] for name in dtype.names or ())
        ).unpack
        self._texts = {name: _mapped(folder / f"{name}.npy") for name in _texts(columns)}

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        """The columns of a row as Python values, None for nulls. Raises ValueError for a damaged row."""
        raw = bytes(self._data[index * self._size : (index + 1) * self._size])
        *values, nulls, check = self._unpack(raw)
        if crc32(raw[:-4]) != check:
            raise ValueError(f"row {index} in {self.folder} holds other bytes than were written")
        found = dict(zip(self._names, values, strict=True))
        found["key"] = found["key"].rstrip(b"\0").decode()
        for name, texts in self._texts.items():
            found[name] = texts[found[name]].decode()
        for number, name in enumerate(self._names if nulls else ()):
            if nulls >> number & 1:
                found[name] = None
        return found
