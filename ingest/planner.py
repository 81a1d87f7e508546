"""The plan of an inventory on disk: the rules of ingest.plan for any number of inputs.

ingest.plan says the same for what fits in memory; a property test holds the two to each other. Plans of new
units are written a few at a time, in the order of the units: a planner that is killed leaves whole units, and
the next one makes the others as they would have been. In memory are 9 bytes an input at most, a bucket, and
an id a unit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ingest.config import IngestConfig
from ingest.inventory import INPUT_LENGTH, Inventory, packed
from ingest.partition import BUCKET_ROWS, Made, ranges, spread, units_of
from ingest.plan import TRIES, Unit, entry_order
from shards.commit import is_release, list_commits, release_unit
from shards.errors import UserError
from shards.ids import ID_LENGTH, Pseudonymizer
from shards.plan import PLAN_SCHEMA, create_plan, plan_names, read_plan
from shards.store import Store, clear_errors

_IDENTITY = ID_LENGTH + 1  # where the second half of an input id begins
_ROW = np.dtype([("input", f"S{INPUT_LENGTH}"), ("row", "<i8")])


@dataclass
class StoredUnits:
    """Units to run, in order: their numbers of rows on disk, their entries read when they are drawn."""

    path: Path
    inventory: Inventory
    ids: list[str] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Unit]:
        start = 0
        for unit, modality, end in zip(self.ids, self.modalities, self.ends, strict=True):
            rows = np.fromfile(self.path, "<i8", end - start, offset=8 * start).tolist()
            entries = [self.inventory.entry(row) for row in sorted(rows)]
            yield Unit(unit, modality, tuple(sorted(entries, key=entry_order)))
            start = end

    def add(self, ids: Sequence[str], modalities: Sequence[str], rows: Sequence[NDArray[np.int64]]) -> None:
        """rows: of each unit."""
        with clear_errors(self.path.parent), open(self.path, "ab") as file:
            file.write(np.concatenate(rows).astype("<i8").tobytes())
        end = self.ends[-1] if self.ends else 0
        for some in rows:
            self.ends.append(end := end + len(some))
        self.ids += ids
        self.modalities += modalities


@dataclass(frozen=True)
class StoredTodo:
    """As ingest.plan.Todo; waiting and done as ids of units."""

    units: StoredUnits
    done: frozenset[str]
    waiting: frozenset[str]
    absent: int


def plan_stored(
    store: Store,
    inventory: Inventory,
    config: IngestConfig,
    names: Pseudonymizer,
    folder: Path,
    progress: Callable[[int], None] | None = None,
    bucket_rows: int = BUCKET_ROWS,
) -> StoredTodo:
    """As ingest.plan.plan_units; folder: private scratch. progress is called with the number of units so far.

    Raises UserError, also for a full scratch disk.
    """
    released_absent = 0
    for attempt in range(TRIES):
        place = folder / f"try-{attempt}"
        with clear_errors(folder):
            place.mkdir(mode=0o700, parents=True)
        known = _Plans.read(store, place)
        found = (
            _join(known, inventory, place / "join", bucket_rows) if known.ids else _Found.nothing(inventory)
        )
        waiting, broken = _incomplete(known, found, inventory)
        if broken:
            released_absent += sum(known.absent(number, found) for number in broken)
            for number in broken:
                release_unit(store, known.ids[number])
            continue
        todo = StoredUnits(place / "units", inventory)
        _take_up(known, found, waiting, todo)
        if _plan_new(store, known, found, inventory, config, names, todo, place, progress, bucket_rows):
            absent = released_absent + sum(known.absent(number, found) for number in waiting)
            ids = frozenset(known.ids[number] for number in waiting)
            return StoredTodo(todo, frozenset(known.ids) & known.done - known.released, ids, absent)
    raise UserError("other runs plan this dataset all the time: wait for them and run again")


@dataclass(frozen=True)
class _Plans:
    """The written plans: units by number, sorted by id; inputs on disk, ends: of the inputs of each."""

    files: int
    ids: list[str]
    modalities: list[str]
    ends: NDArray[np.int64]
    done: frozenset[str]
    released: frozenset[str]
    path: Path

    @classmethod
    def read(cls, store: Store, folder: Path) -> "_Plans":
        plans = plan_names(store)
        units: dict[str, tuple[str, int, int]] = {}
        path, total = folder / "planned", 0
        for name in plans:
            table = read_plan(store, name)
            sources = table["sources"].combine_chunks()
            with clear_errors(folder), open(path, "ab") as file:
                file.write(_fixed(sources.flatten()).tobytes())
            offsets = (sources.offsets.to_numpy() - sources.offsets[0].as_py()).tolist()
            rows = zip(table["unit"].to_pylist(), table["modality"].to_pylist(), strict=True)
            for (unit, modality), start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
                units.setdefault(unit, (modality, total + start, total + end))
            total += offsets[-1]
        # After the plans: a release that we see and whose new plan we do not costs us the number of ours.
        done, released = set(), set()
        for commit in list_commits(store):
            done.add(commit.unit)
            if is_release(commit):
                released.add(commit.unit)
        ids = sorted(units, key=lambda unit: units[unit][1])  # as they lie on disk
        ends = np.array([units[unit][2] for unit in ids], np.int64)
        return cls(
            len(plans),
            ids,
            [units[unit][0] for unit in ids],
            ends,
            frozenset(done),
            frozenset(released),
            path,
        )

    def rows(self, number: int) -> slice:
        return slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))

    def inputs(self, first: int, count: int) -> NDArray[np.bytes_]:
        return np.fromfile(self.path, f"S{INPUT_LENGTH}", count, offset=first * INPUT_LENGTH)

    def flags(self, units: frozenset[str]) -> NDArray[np.bool_]:
        return np.array([unit in units for unit in self.ids], bool)

    def absent(self, number: int, found: "_Found") -> int:
        return int((found.at[self.rows(number)] < 0).sum())


@dataclass(frozen=True)
class _Found:
    """at: int64 [planned inputs], the row of each that is to be done, -1 where it is not here.

    new: bool [rows], inputs that no plan knows. former: inputs -> ids of released units that held them.
    """

    at: NDArray[np.int64]
    new: NDArray[np.bool_]
    former: dict[bytes, list[str]]

    @classmethod
    def nothing(cls, inventory: Inventory) -> "_Found":
        return cls(np.empty(0, np.int64), np.ones(len(inventory), bool), {})


def _fixed(sources: Any) -> NDArray[np.bytes_]:
    """Arrow strings to S53. Raises ValueError where one is no input id."""
    found = (
        np.array(sources.to_pylist(), f"S{INPUT_LENGTH}") if len(sources) else np.empty(0, f"S{INPUT_LENGTH}")
    )
    if len(sources) and pc.any(pc.not_equal(pc.binary_length(sources), INPUT_LENGTH)).as_py():
        raise ValueError("a damaged plan: an input of it is no input id")
    return found


def _arrow(ids: NDArray[np.bytes_], start: int, end: int) -> pa.Array:
    """Characters [start, end) of S53 as Arrow bytes."""
    raw = np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), INPUT_LENGTH)[:, start:end]
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(end - start), len(ids), [None, pa.py_buffer(np.ascontiguousarray(raw))]
    )


class _Spread:
    """_ROWs in files by their identity: equal identities meet in one."""

    def __init__(self, folder: Path, bits: int) -> None:
        self._folder, self._shift = folder, np.uint64(60 - bits)
        folder.mkdir(mode=0o700, parents=True)

    def append(self, inputs: NDArray[np.bytes_], first: int) -> None:
        rows = np.empty(len(inputs), _ROW)
        rows["input"], rows["row"] = inputs, np.arange(first, first + len(inputs))
        bucket = (packed(inputs, _IDENTITY, 12) >> self._shift).astype(np.int32)
        order = np.argsort(bucket, kind="stable")
        rows, bucket = rows[order], bucket[order]
        starts = np.flatnonzero(np.diff(bucket, prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            with clear_errors(self._folder), open(self._folder / str(bucket[start]), "ab") as file:
                file.write(rows[start:end].tobytes())

    def load(self, bucket: int) -> NDArray[Any]:
        path = self._folder / str(bucket)
        return np.fromfile(path, _ROW) if path.exists() else np.empty(0, _ROW)


def _join(known: _Plans, inventory: Inventory, folder: Path, bucket_rows: int) -> _Found:
    """Which planned inputs are here, and which inputs are new."""
    planned = int(known.ends.max())
    bits = max(0, (max(planned, len(inventory)) - 1) // bucket_rows).bit_length()
    here, plan = _Spread(folder / "here", bits), _Spread(folder / "plan", bits)
    for part in inventory.sort_columns():
        here.append(part.inputs, part.first)
    for first in range(0, planned, bucket_rows):
        plan.append(known.inputs(first, min(bucket_rows, planned - first)), first)
    done, released = known.flags(known.done), known.flags(known.released)
    found = _Found(np.full(planned, -1, np.int64), np.ones(len(inventory), bool), {})
    for bucket in range(1 << bits):
        ours, theirs = here.load(bucket), plan.load(bucket)
        if len(ours) and len(theirs):
            unit = np.searchsorted(known.ends, theirs["row"], side="right")
            _meet(ours, theirs, done[unit], released[unit], found)
            free = theirs[released[unit]]
            _remember(ours, free, [known.ids[u] for u in unit[released[unit]].tolist()], found)
    return found


def _meet(
    ours: NDArray[Any],
    theirs: NDArray[Any],
    done: NDArray[np.bool_],
    released: NDArray[np.bool_],
    found: _Found,
) -> None:
    identities = _arrow(ours["input"], _IDENTITY, INPUT_LENGTH)
    taken = pc.is_in(identities, value_set=_arrow(theirs["input"][~released], _IDENTITY, INPUT_LENGTH))
    found.new[ours["row"][taken.to_numpy(zero_copy_only=False)]] = False
    left = theirs[~done]
    index = pc.index_in(
        _arrow(left["input"], 0, INPUT_LENGTH), value_set=_arrow(ours["input"], 0, INPUT_LENGTH)
    )
    where = index.fill_null(-1).to_numpy(zero_copy_only=False)
    found.at[left["row"]] = np.where(where < 0, -1, ours["row"][where])


def _remember(ours: NDArray[Any], free: NDArray[Any], units: list[str], found: _Found) -> None:
    if not len(free):
        return
    index = pc.index_in(
        _arrow(free["input"], _IDENTITY, INPUT_LENGTH),
        value_set=_arrow(ours["input"], _IDENTITY, INPUT_LENGTH),
    )
    for where, unit in zip(index.to_pylist(), units, strict=True):
        if where is not None:
            found.former.setdefault(bytes(ours["input"][where]), []).append(unit)


def _incomplete(known: _Plans, found: _Found, inventory: Inventory) -> tuple[list[int], list[int]]:
    """Numbers of the planned, uncommitted units of rules 2 (waiting) and 3 (broken)."""
    waiting, broken = list[int](), list[int]()
    for number, unit in enumerate(known.ids):
        if unit not in known.done:
            here = found.at[known.rows(number)] >= 0
            if not here.all():
                (broken if here.any() else waiting).append(number)
    # Of those of which nothing is here as planned: is something here under its path?
    while_here = _paths_here(known, waiting, inventory)
    broken = sorted([*broken, *(number for number in waiting if number in while_here)])
    return [number for number in waiting if number not in while_here], broken


def _paths_here(known: _Plans, numbers: Sequence[int], inventory: Inventory) -> set[int]:
    changed: set[int] = set()
    for start in range(0, len(numbers), 4096):
        block = numbers[start : start + 4096]
        inputs = [known.inputs(known.rows(n).start, known.rows(n).stop - known.rows(n).start) for n in block]
        paths = _arrow(np.concatenate(inputs), 0, ID_LENGTH)
        of_unit = np.repeat(block, [len(some) for some in inputs])
        for part in inventory.sort_columns():
            hit = pc.is_in(paths, value_set=_arrow(part.inputs, 0, ID_LENGTH)).to_numpy(zero_copy_only=False)
            changed.update(of_unit[hit].tolist())
    return changed


def _take_up(known: _Plans, found: _Found, waiting: Sequence[int], todo: StoredUnits) -> None:
    """Planned units that are all here, in the order of their ids."""
    asleep = set(waiting)
    numbers = [n for n, unit in enumerate(known.ids) if unit not in known.done and n not in asleep]
    numbers.sort(key=lambda number: known.ids[number])
    if numbers:
        rows = [found.at[known.rows(number)] for number in numbers]
        todo.add([known.ids[n] for n in numbers], [known.modalities[n] for n in numbers], rows)


def _plan_new(
    store: Store,
    known: _Plans,
    found: _Found,
    inventory: Inventory,
    config: IngestConfig,
    names: Pseudonymizer,
    todo: StoredUnits,
    folder: Path,
    progress: Callable[[int], None] | None,
    bucket_rows: int,
) -> bool:
    """Units of new inputs: planned, written, added to what is to do. False: another driver was quicker."""
    count = int(found.new.sum())
    if not count:
        return True
    own = (config.fingerprint(), names.key_id)

    def closing(inputs: NDArray[np.bytes_]) -> Sequence[str]:
        if not found.former:
            return own
        return (*own, *sorted({unit for i in inputs.tolist() for unit in found.former.get(i, ())}))

    bounds = ranges(inventory.sort_columns(), count, bucket_rows)
    buckets = spread(
        inventory.sort_columns(), bounds, folder / "buckets", None if found.new.all() else found.new
    )
    number = known.files
    for made in units_of(buckets, config.unit_files, config.unit_bytes, closing):
        if not create_plan(store, _plan_table(made), number):
            return False
        number += 1
        starts = [0, *made.ends[:-1].tolist()]
        rows = [made.at[a:b] for a, b in zip(starts, made.ends.tolist(), strict=True)]
        left = [n for n, unit in enumerate(made.ids) if unit not in known.done]
        if left:
            todo.add([made.ids[n] for n in left], [made.modalities[n] for n in left], [rows[n] for n in left])
        if progress is not None:
            progress(len(todo))
    return True


def _plan_table(made: Made) -> pa.Table:
    """The record of units, sorted by id."""
    count = len(made.inputs)
    offsets = np.arange(count + 1, dtype=np.int32) * INPUT_LENGTH
    texts = pa.StringArray.from_buffers(
        count, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(made.inputs))
    )
    lists = pa.ListArray.from_arrays(
        pa.array(np.append(0, made.ends).astype(np.int32)), texts, type=PLAN_SCHEMA.field("sources").type
    )
    columns = [pa.array(made.ids), pa.array(made.modalities), lists]
    table = pa.Table.from_arrays(columns, schema=PLAN_SCHEMA)
    return table.take(pa.array(np.argsort(np.array(made.ids))))
