"""The inventory on disk: one row an input, in a private scratch folder (mode 0700), never in a dataset.

Two files for each PART_ROWS rows, in the order they were found: `<n>.rows` holds what an Entry holds (paths
and header values: private), in small batches that are read when a unit is handed out; `<n>.keys` only what
the planner sorts by: input id, bytes, and the key that units are ordered by.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.deidentify import source_id
from ingest.discover import Entry
from shards.ids import ID_LENGTH, Pseudonymizer
from shards.store import clear_errors

PART_ROWS = 1 << 17
_BATCH_ROWS = 1 << 10  # rows read to get one
_OPEN_PARTS, _CACHED_BATCHES = 8, 64
INPUT_LENGTH = 2 * ID_LENGTH + 1  # input_id: two ids and a dash

KEYS_SCHEMA = pa.schema(
    [
        pa.field("input", pa.binary(INPUT_LENGTH), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("key", pa.dictionary(pa.int32(), pa.binary()), nullable=False),
    ]
)
_TYPES = {"int": pa.int64(), "bool": pa.bool_(), "str": pa.binary()}
_FIELDS = {field.name: str(getattr(field.type, "__name__", field.type)) for field in fields(Entry)}
_ROWS_SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in _FIELDS.items()])


@dataclass(frozen=True)
class Keys:
    """What the planner reads of a part. inputs: S53 [n]; sizes: int64 bytes [n]; codes: int32 [n] into keys.

    first: number of the first row; rows are numbered through all parts.
    """

    first: int
    inputs: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    codes: NDArray[np.int32]
    keys: list[bytes]


def input_id(entry: Entry, names: Pseudonymizer) -> str:
    """What a plan knows an input by: pseudonyms of its source path and of its identity."""
    return f"{source_id(entry.source, names)}-{names.id('input', entry.identity)}"


def sort_key(entry: Entry) -> bytes:
    """Units are made in the order of these bytes; inputs of equal ones stay together (ingest.plan).

    Partition, then the group; without a group every input is its own, in the order of the paths.
    """
    rest = f"\1{entry.group}" if entry.group else f"\0{entry.relative}\0{entry.identity}"
    return _encode(f"{entry.modality}\0{rest}")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a file name may be no UTF-8; code points keep their order


class Inventory:
    """Entries in a folder: append, close, then read by number. Raises UserError for a full disk."""

    def __init__(self, folder: Path, names: Pseudonymizer) -> None:
        self._folder, self._names = folder, names
        self._waiting: list[Entry] = []
        self._changed: dict[int, Entry] = {}
        self._written = 0
        self.parts = 0
        with clear_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @classmethod
    def reopened(cls, folder: Path, names: Pseudonymizer, rows: int) -> "Inventory":
        """One that is written already."""
        found = cls(folder, names)
        found._written, found.parts = rows, -(-rows // PART_ROWS)
        return found

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def append(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._waiting.append(entry)
            if len(self._waiting) == PART_ROWS:
                self._flush()

    def close(self) -> None:
        """Write what waits; nothing is appended afterwards."""
        if self._waiting:
            self._flush()

    def replace(self, number: int, entry: Entry) -> None:
        """Another identity for a row: for the few that are told apart after the scan."""
        self._changed[number] = entry

    def _flush(self) -> None:
        entries, self._waiting = self._waiting, []
        columns = [_column([getattr(e, name) for e in entries], kind) for name, kind in _FIELDS.items()]
        inputs = [input_id(entry, self._names).encode() for entry in entries]
        codes: dict[bytes, int] = {}
        indices = [codes.setdefault(sort_key(entry), len(codes)) for entry in entries]
        key = pa.DictionaryArray.from_arrays(
            pa.array(indices, pa.int32()), pa.array(list(codes), pa.binary())
        )
        sizes = pa.array([entry.size for entry in entries], pa.int64())
        keys = pa.record_batch([pa.array(inputs, pa.binary(INPUT_LENGTH)), sizes, key], schema=KEYS_SCHEMA)
        rows = pa.record_batch(columns, schema=_ROWS_SCHEMA)
        with clear_errors(self._folder):
            with (
                pa.OSFile(str(self._path("rows", self.parts)), "wb") as file,
                pa.ipc.new_file(file, _ROWS_SCHEMA) as writer,
            ):
                for start in range(0, len(entries), _BATCH_ROWS):
                    writer.write_batch(rows.slice(start, _BATCH_ROWS))
            write_keys(self._path("keys", self.parts), keys)
        self.parts += 1
        self._written += len(entries)

    def _path(self, what: str, part: int) -> Path:
        return self._folder / f"{part:08d}.{what}"

    def sort_columns(self) -> Iterator[Keys]:
        """The planner's columns, part by part."""
        first = 0
        for part in range(self.parts):
            keys = read_keys(self._path("keys", part), first)
            first += len(keys.inputs)
            yield self._with_changes(keys) if self._changed else keys

    def _with_changes(self, keys: Keys) -> Keys:
        inputs, codes, names = keys.inputs.copy(), keys.codes.copy(), list(keys.keys)
        for number, entry in self._changed.items():
            row = number - keys.first
            if 0 <= row < len(inputs):
                inputs[row] = input_id(entry, self._names).encode()
                codes[row] = len(names)
                names.append(sort_key(entry))
        return Keys(keys.first, inputs, keys.sizes, codes, names)

    def entry(self, number: int) -> Entry:
        """The entry of a row."""
        if number in self._changed:
            return self._changed[number]
        part, row = divmod(number, PART_ROWS)
        columns = _batch(str(self._path("rows", part)), row // _BATCH_ROWS)
        return _entry(columns, row % _BATCH_ROWS)

    __getitem__ = entry

    def __iter__(self) -> Iterator[Entry]:
        return self.entries()

    def entries(self) -> Iterator[Entry]:
        """All of them, in the order of the rows."""
        return (self.entry(number) for number in range(self._written))

    def column(self, name: str) -> Iterator[NDArray[Any]]:
        """One column of the entries, part by part, as bytes, without what was replaced."""
        for part in range(self.parts):
            with pa.OSFile(str(self._path("rows", part))) as file:
                reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[_index(name)]))
                yield np.array(reader.read_all()[0].to_pylist())


def write_keys(path: Path, keys: pa.RecordBatch) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, KEYS_SCHEMA) as writer:
        writer.write_batch(keys)


def read_keys(path: Path, first: int) -> Keys:
    with pa.OSFile(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    data = batch["input"].buffers()[1]
    inputs = np.frombuffer(data, f"S{INPUT_LENGTH}", batch.num_rows, batch["input"].offset * INPUT_LENGTH)
    key = batch["key"]
    return Keys(first, inputs, batch["size"].to_numpy(), key.indices.to_numpy(), key.dictionary.to_pylist())


def _index(name: str) -> int:
    return _ROWS_SCHEMA.get_field_index(name)


def _column(values: Sequence[Any], kind: str) -> pa.Array:
    return pa.array([_encode(value) for value in values] if kind == "str" else values, _TYPES[kind])


@lru_cache(_OPEN_PARTS)
def _part(path: str) -> Any:
    return pa.ipc.open_file(pa.OSFile(path))


@lru_cache(_CACHED_BATCHES)
def _batch(path: str, number: int) -> dict[str, list[Any]]:
    return _part(path).get_batch(number).to_pydict()


def _entry(columns: dict[str, list[Any]], row: int) -> Entry:
    values = {name: columns[name][row] for name in _FIELDS}
    texts = {n: v.decode("utf-8", "surrogatepass") for n, v in values.items() if isinstance(v, bytes)}
    return Entry(**values | texts)


def forget_parts() -> None:
    """Close what the readers keep open."""
    _batch.cache_clear()
    _part.cache_clear()


def tell_apart(inventory: Inventory, apart: Any) -> None:
    """Rows of equal identity get different ones by `apart`: entries of equal identity to the same, salted.

    Memory: 8 bytes a row. Found by 60 bits of the identity, then held to all of it by `apart`.
    """
    hashes = np.empty(len(inventory), np.uint64)
    at = 0
    for column in inventory.column("identity"):
        hashes[at : at + len(column)] = packed(column, 0, 12)
        at += len(column)
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(twice):
        return
    numbers = np.flatnonzero(np.isin(hashes, twice)).tolist()
    entries = [inventory.entry(number) for number in numbers]
    for number, before, after in zip(numbers, entries, apart(entries), strict=True):
        if after != before:
            inventory.replace(number, replace(after))


_VALUE = np.zeros(256, np.uint64)
_VALUE[np.frombuffer(b"234567abcdefghijklmnopqrstuvwxyz", np.uint8)] = np.arange(32)


def packed(ids: NDArray[np.bytes_], start: int, count: int) -> NDArray[np.uint64]:
    """`count` (at most 12) base32 characters of ids from `start` on, as numbers in the order of the text."""
    width = ids.dtype.itemsize
    raw = np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), width)
    value = np.zeros(len(ids), np.uint64)
    for place in range(start, start + count):
        value = (value << np.uint64(5)) | _VALUE[raw[:, place]]
    return value
