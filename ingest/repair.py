"""Broken units made again from their sources, byte for byte; a unit whose inputs are not all here is left."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ingest.config import IngestConfig
from ingest.convert import SourceChangedError, run_unit
from ingest.inventory import Inventory
from ingest.plan import Unit, entry_order
from ingest.retry import entries_named
from ingest.sandbox import Reader
from shards.commit import Commit
from shards.ids import ID_LENGTH, Pseudonymizer
from shards.plan import plan_names, read_plan
from shards.repair import Broken, put_back, with_history
from shards.store import Store


def units_of(
    store: Store, inventory: Inventory, commits: Iterable[Commit]
) -> tuple[list[Unit], dict[str, int]]:
    """(units whose inputs are all in the inventory, retries last; {unit id: inputs that are not})."""
    listed = list(commits)
    inputs = {commit.unit: names for commit, names in _inputs(store, listed)}
    entries = dict(entries_named(inventory, {name for names in inputs.values() for name in names}))
    units, lacking = [], {}
    for commit in sorted(listed, key=lambda c: (c.retry.attempt if c.retry else 0, c.unit)):
        names = inputs.get(commit.unit, [])
        absent = commit.counts["inputs"] - sum(name in entries for name in names)
        if absent:
            lacking[commit.unit] = absent
            continue
        chosen = [entries[name] for name in names]
        if commit.retry is not None:
            chosen.sort(key=entry_order)
        units.append(Unit(commit.unit, chosen[0].modality, tuple(chosen), commit.retry))
    return units, lacking


def _inputs(store: Store, commits: list[Commit]) -> Iterator[tuple[Commit, list[str]]]:
    """The inputs of each unit as its plan has them, in the order of the unit."""
    planned = {commit.retry.unit if commit.retry else commit.unit for commit in commits}
    wanted = pa.array(sorted(planned), pa.string())
    rows: dict[str, list[str]] = {}
    for name in plan_names(store):
        table = read_plan(store, name)
        for row in table.filter(pc.is_in(table["unit"], wanted)).to_pylist():
            rows.setdefault(row["unit"], row["sources"])
    for commit in commits:
        if commit.retry is None:
            yield commit, rows.get(commit.unit, [])
        else:
            tried = set(commit.retry.sources)
            yield commit, [n for n in rows.get(commit.retry.unit, []) if n[:ID_LENGTH] in tried]


def remake(
    unit: Unit,
    broken: Broken,
    config: IngestConfig,
    names: Pseudonymizer,
    store: Store,
    scratch: Path,
    reader: Reader | None = None,
) -> list[str]:
    """Make a unit again in `scratch` and put its broken files back; the names of those put.

    Left out is what comes out with other bytes: of a source that changes just now, and of a unit that refused
    an input for a reason that is no more (a decoder that crashed). Raises UserError for a disk that cannot be
    written.
    """
    try:
        made = with_history(store, broken.commit, scratch / "made")
        run_unit(unit, config, names, scratch / "made", scratch / "work", reader)
    except (SourceChangedError, FileNotFoundError):  # or an attempt before this one is not whole
        return []
    return put_back(store, made, broken)
