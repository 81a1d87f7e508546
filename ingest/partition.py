"""Units of more rows than memory holds: a sort over bucket files, then one pass that cuts.

Rows are spread over files by ranges of their key, each file is sorted by itself, and the files in order are
cut into units as one sequence: what does not fill a unit at the end of a file opens the next one. So the
units are those of sorting everything at once (ingest.plan), whatever the number of files and the order of the
rows; the memory is that of a few files.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.inventory import INPUT_LENGTH, Keys, packed
from shards.ids import digest_framed, frame
from shards.store import clear_errors

BUCKET_ROWS = 1 << 19
SAMPLE_KEYS = 64  # of a part, to find the ranges
_ROW = np.dtype([("input", f"S{INPUT_LENGTH}"), ("size", "<i8"), ("at", "<i8"), ("code", "<i4")])
_THREADS = 2
_MERGED_ROWS = 1 << 20


@dataclass(frozen=True)
class Made:
    """Units in order, all inputs of one after those of another.

    ids, modalities: of each unit; ends: int64 [units], end of its inputs; inputs: S53, sorted within a unit;
    at: int64, the numbers of their rows.
    """

    ids: list[str]
    modalities: list[str]
    ends: NDArray[np.int64]
    inputs: NDArray[np.bytes_]
    at: NDArray[np.int64]


@dataclass(frozen=True)
class _Sorted:
    """Rows in the order of their keys; starts: of each group; modalities: of each group."""

    rows: NDArray[Any]
    starts: NDArray[np.int64]
    modalities: NDArray[np.bytes_]


class Buckets:
    """Chunks of rows and their keys, appended to files by range."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._chunks: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]  # rows, keys, bytes
        with clear_errors(folder):
            folder.mkdir(mode=0o700)

    def __len__(self) -> int:
        return len(self._chunks)

    def append(self, bucket: int, rows: NDArray[Any], keys: Sequence[bytes]) -> None:
        """rows: _ROW, whose code counts in `keys`."""
        lengths, text = np.array([len(key) for key in keys], "<u4"), b"".join(keys)
        with clear_errors(self._folder), open(self._path(bucket), "ab", buffering=0) as file:
            for data in (rows.tobytes(), lengths.tobytes(), text):
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        self._chunks[bucket].append((len(rows), len(keys), len(text)))

    def load(self, bucket: int) -> _Sorted:
        """The rows of a bucket, sorted; its file is removed."""
        parts, keys = [], list[bytes]()
        if self._chunks[bucket]:
            with open(self._path(bucket), "rb") as file:
                for rows, count, size in self._chunks[bucket]:
                    part = np.fromfile(file, _ROW, rows)
                    part["code"] += len(keys)
                    lengths = np.fromfile(file, "<u4", count)
                    text, ends = file.read(size), np.cumsum(lengths).tolist()
                    keys += [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
                    parts.append(part)
            self._path(bucket).unlink()
        return _sorted(np.concatenate(parts) if parts else np.empty(0, _ROW), keys)

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:06d}"


def _sorted(rows: NDArray[Any], keys: list[bytes]) -> _Sorted:
    distinct = sorted(set(keys))
    rank_of = {key: rank for rank, key in enumerate(distinct)}
    ranks = np.fromiter((rank_of[key] for key in keys), np.int32, len(keys))[rows["code"]]
    order = np.argsort(ranks, kind="stable")
    ranks = ranks[order]
    starts = np.flatnonzero(np.diff(ranks, prepend=-1))
    modalities = np.array([distinct[rank].partition(b"\0")[0] for rank in ranks[starts].tolist()], "S32")
    return _Sorted(rows[order], starts, modalities)


def ranges(parts: Iterable[Keys], rows: int, bucket_rows: int = BUCKET_ROWS) -> list[bytes]:
    """Keys that cut the rows into ranges of about bucket_rows."""
    wanted = -(-rows // bucket_rows)
    if wanted <= 1:
        return []
    sample = list[bytes]()
    for part in parts:
        chosen = part.codes[:: max(1, len(part.codes) // SAMPLE_KEYS)]
        sample += [part.keys[code] for code in chosen.tolist()]
    sample.sort()
    return sorted({sample[number * len(sample) // wanted] for number in range(1, wanted)})


def _merged(parts: Iterable[Keys]) -> Iterator[Keys]:
    """Some parts at a time: a chunk of a bucket is then not too small."""
    waiting: list[Keys] = []
    for part in itertools.chain(parts, [None]):
        if waiting and (part is None or sum(len(some.inputs) for some in waiting) >= _MERGED_ROWS):
            offsets = itertools.accumulate((len(some.keys) for some in waiting[:-1]), initial=0)
            codes = [some.codes + np.int32(offset) for some, offset in zip(waiting, offsets, strict=True)]
            yield Keys(
                waiting[0].first,
                np.concatenate([some.inputs for some in waiting]),
                np.concatenate([some.sizes for some in waiting]),
                np.concatenate(codes),
                [key for some in waiting for key in some.keys],
            )
            waiting = []
        waiting += [] if part is None else [part]


def spread(parts: Iterable[Keys], bounds: Sequence[bytes], folder: Path, take: Any = None) -> Buckets:
    """Rows to buckets. take: bool [all rows], those that count; None: all."""
    buckets = Buckets(folder, len(bounds) + 1)
    for part in _merged(parts):
        of_key = np.array([bisect_right(bounds, key) for key in part.keys], np.int16)
        chosen = of_key[part.codes]
        if take is not None:
            chosen[~take[part.first : part.first + len(chosen)]] = -1
        order = np.argsort(chosen, kind="stable")
        edges = np.searchsorted(chosen[order], np.arange(len(bounds) + 2))
        for bucket in range(len(bounds) + 1):
            picked = order[edges[bucket] : edges[bucket + 1]]
            if not len(picked):
                continue
            rows = np.empty(len(picked), _ROW)
            rows["input"], rows["size"] = part.inputs[picked], part.sizes[picked]
            rows["at"] = picked + part.first
            used, rows["code"] = np.unique(part.codes[picked], return_inverse=True)
            buckets.append(bucket, rows, [part.keys[code] for code in used.tolist()])
    return buckets


def cut(sorted_: _Sorted, files: int, size: int, last: bool) -> tuple[list[int], int]:
    """(ends of the units, as groups; first group of the open unit).

    A unit is of whole groups of one modality, up to `files` and `size` bytes; a larger group is one unit.

    A unit that more rows might still fill stays open unless this is the `last` of the rows.
    """
    groups = len(sorted_.starts)
    ends = np.append(sorted_.starts[1:], len(sorted_.rows))
    total = np.append(0, np.cumsum(sorted_.rows["size"]))
    weights = total[ends]
    changes = np.flatnonzero(sorted_.modalities[1:] != sorted_.modalities[:-1]) + 1
    stops = [*changes.tolist(), groups]
    made, at, stop = list[int](), 0, 0
    while at < groups:
        while stops[stop] <= at:
            stop += 1
        start = int(sorted_.starts[at])
        by_files = int(np.searchsorted(ends, start + files, side="right"))
        by_size = int(np.searchsorted(weights, total[start] + size, side="right"))
        end = max(at + 1, min(by_files, by_size, stops[stop]))
        if end == groups and not last:
            break
        made.append(end)
        at = end
    return made, at


def _joined(carried: _Sorted | None, more: _Sorted) -> _Sorted:
    if carried is None or not len(carried.rows):
        return more
    return _Sorted(
        np.concatenate([carried.rows, more.rows]),
        np.concatenate([carried.starts, more.starts + len(carried.rows)]),
        np.concatenate([carried.modalities, more.modalities]),
    )


def units_of(
    buckets: Buckets,
    files: int,
    size: int,
    closing: Callable[[NDArray[np.bytes_]], Sequence[str]],
) -> Iterator[Made]:
    """The units of all rows, in order, some at a time. closing(inputs of a unit): what else makes its id."""
    with ThreadPoolExecutor(_THREADS) as pool:
        count = len(buckets)
        loads = {0: pool.submit(buckets.load, 0)}
        carried: _Sorted | None = None
        finishing: list[Any] = []
        for number in range(count):
            here = _joined(carried, loads.pop(number).result())
            if number + 1 < count:
                loads[number + 1] = pool.submit(buckets.load, number + 1)
            ends, open_ = cut(here, files, size, number + 1 == count)
            row = int(here.starts[open_]) if open_ < len(here.starts) else len(here.rows)
            carried = _Sorted(here.rows[row:].copy(), here.starts[open_:] - row, here.modalities[open_:])
            if ends:
                finishing.append(pool.submit(_finish, here, ends, closing))
            while len(finishing) > 1 or (finishing and number + 1 == count):
                yield finishing.pop(0).result()


def _finish(here: _Sorted, ends: list[int], closing: Callable[[NDArray[np.bytes_]], Sequence[str]]) -> Made:
    """Inputs sorted within each unit, and the ids of the units."""
    bounds = np.append(here.starts, len(here.rows))[ends]
    rows = here.rows[: bounds[-1]]
    lengths = np.diff(bounds, prepend=0)
    unit = np.repeat(np.arange(len(bounds), dtype=np.uint64), lengths)
    inputs = np.ascontiguousarray(rows["input"])
    value = (unit << np.uint64(40)) | packed(inputs, 0, 8)
    order = np.argsort(value)
    value = value[order]
    if (value[1:] == value[:-1]).any():
        order = np.lexsort((inputs, unit))
    inputs, at = inputs[order], rows["at"][order]
    firsts = itertools.accumulate(ends[:-1], initial=0, func=lambda _, end: end)
    modalities = [here.modalities[first].decode() for first in firsts]
    return Made(_ids(inputs, bounds, closing), modalities, bounds, inputs, at)


def _ids(
    inputs: NDArray[np.bytes_],
    bounds: NDArray[np.int64],
    closing: Callable[[NDArray[np.bytes_]], Sequence[str]],
) -> list[str]:
    """digest("unit", *inputs, *closing) of each unit."""
    framed = np.empty((len(inputs), 8 + INPUT_LENGTH), np.uint8)
    framed[:, :8] = np.frombuffer(INPUT_LENGTH.to_bytes(8, "big"), np.uint8)
    framed[:, 8:] = inputs.view(np.uint8).reshape(-1, INPUT_LENGTH)
    data, opening = framed.reshape(-1).data, frame("unit")
    width, found, start = framed.shape[1], [], 0
    for end in bounds.tolist():
        tail = frame(*closing(inputs[start:end]))
        found.append(digest_framed(opening, data[start * width : end * width], tail))
        start = end
    return found
