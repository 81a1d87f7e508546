"""Refused inputs that are worth another try, as units of work: one for each unit that refused some."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ingest.discover import Entry
from ingest.inventory import Inventory
from ingest.plan import Unit, entry_order
from shards import parquet
from shards.commit import Commit, Retry, list_commits
from shards.errors import UserError
from shards.ids import ID_LENGTH
from shards.plan import plan_names, read_plan
from shards.retries import retry_unit, standing, superseded
from shards.schema import Reason
from shards.store import Store, clear_errors

# What another decoder, another limit of time or memory, or a sound disk may mend.
DEFAULT_REASONS = (
    Reason.CRASHED,
    Reason.DECODE_FAILED,
    Reason.UNREADABLE,
    Reason.TRANSFER_SYNTAX,
    Reason.SOURCE_MISSING,
)
# These say that another input of the unit was kept instead.
_FINAL = frozenset({Reason.DUPLICATE, Reason.UID_COLLISION})
_OF_STACKS = frozenset(
    {Reason.VOLUME_WITHOUT_GEOMETRY, Reason.VOLUME_REPEATED_POSITION, Reason.VOLUME_UNEVEN}
)


@dataclass
class _Refused:
    """Of one planned unit: its attempts so far, {source: refusals that count} to try again."""

    attempts: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    modality: str = ""
    inputs: tuple[str, ...] = ()  # as the plan has them


def chosen_reasons(given: Collection[str] | None) -> frozenset[str]:
    """The reasons to try again. Raises UserError for one that is none, or that no try can change."""
    for reason in given or ():
        if reason not in set(Reason):
            raise UserError(f"{reason!r} is no reason; the reasons are {', '.join(Reason)}")
        if reason in _FINAL:
            raise UserError(f"{reason} is no failure, the same image is kept once: it is not tried again")
        if reason in _OF_STACKS:
            raise UserError(f"{reason} is of a stack whose slices are samples: there is nothing to try again")
    return frozenset(given or DEFAULT_REASONS)


def retry_units(store: Store, inventory: Inventory, reasons: Collection[str]) -> tuple[list[Unit], int]:
    """Units of the refused inputs of these reasons, sorted by id; how many are not in the inventory.

    An input of which some frames were refused is read again as a whole: its samples stand, and what is
    refused again takes the place of its earlier refusals. Memory: the refused inputs and the plan of their
    units, 8 bytes an input of the inventory.
    """
    refused = _refused(store, list_commits(store), reasons)
    _add_plans(store, refused)
    wanted = {name for found in refused.values() for name in found.inputs}
    entries = dict(entries_named(inventory, wanted))
    units, absent = [], 0
    for unit, found in refused.items():
        whole, missing = _whole_sources(found, entries)
        absent += missing
        if whole:
            attempt = found.attempts + 1
            chosen = sorted(
                (entries[name] for name in found.inputs if _source(name) in whole), key=entry_order
            )
            retry = Retry(unit, attempt, tuple(sorted(whole)), sum(found.rows[s] for s in whole))
            units.append(Unit(retry_unit(unit, attempt), found.modality, tuple(chosen), retry))
    return sorted(units, key=lambda u: u.unit), absent


def _whole_sources(found: _Refused, entries: dict[str, Entry]) -> tuple[set[str], int]:
    """Sources of which every planned input is here, and the number of the others."""
    planned: dict[str, list[str]] = defaultdict(list)
    for name in found.inputs:
        planned[_source(name)].append(name)
    whole = {source for source, names in planned.items() if all(name in entries for name in names)}
    return whole, len(found.rows.keys() - whole)


def _refused(store: Store, commits: list[Commit], reasons: Collection[str]) -> dict[str, _Refused]:
    gone = superseded(commits)
    families: dict[str, list[Commit]] = defaultdict(list)
    for commit in commits:
        families[commit.retry.unit if commit.retry else commit.unit].append(commit)
    found = {}
    for unit, members in sorted(families.items()):
        again = Counter[str]()
        chosen: set[str] = set()
        of_stacks: set[str] = set()  # their slices are samples: the row of the stack would be lost
        for commit in members:
            for source, reason in _refusals(store, commit, gone):
                again[source] += 1
                if reason in reasons:
                    chosen.add(source)
                elif reason in _OF_STACKS:
                    of_stacks.add(source)
        rows = {source: again[source] for source in sorted(chosen - of_stacks)}
        if rows:
            found[unit] = _Refused(sum(c.retry is not None for c in members), rows)
    return found


def _refusals(store: Store, commit: Commit, gone: dict[str, frozenset[str]]) -> Iterator[tuple[str, str]]:
    if commit.quarantine is None:
        return
    with clear_errors(store.root):
        try:
            table = parquet.read(store, commit.quarantine.path, ["source", "reason"])
        except (FileNotFoundError, pa.ArrowInvalid):
            raise UserError(
                f"{store.root}: a quarantine file is missing or damaged: run ingest verify"
            ) from None
    table = standing(table, commit.unit, gone)
    yield from zip(table["source"].to_pylist(), table["reason"].to_pylist(), strict=True)


def _add_plans(store: Store, refused: dict[str, _Refused]) -> None:
    units = pa.array(list(refused), pa.string())
    for name in plan_names(store):
        table = read_plan(store, name)
        for row in table.filter(pc.is_in(table["unit"], units)).to_pylist():
            found = refused[row["unit"]]
            if not found.inputs:
                found.modality = row["modality"]
                found.inputs = tuple(name for name in row["sources"] if _source(name) in found.rows)


def _source(name: str) -> str:
    return name[:ID_LENGTH]


def entries_named(inventory: Inventory, wanted: set[str]) -> Iterator[tuple[str, Entry]]:
    """(input as plans have it, entry) of those inputs that the inventory has."""
    if not wanted:
        return
    names = np.array(sorted(name.encode() for name in wanted))
    for keys in inventory.sort_columns():
        for row in np.flatnonzero(np.isin(keys.inputs, names)).tolist():
            yield keys.inputs[row].decode(), inventory.entry(keys.first + row)
