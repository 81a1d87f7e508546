"""Plans: the inputs of each unit of work, written before any work, so that a resume does the same."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from shards import parquet
from shards.store import Store

PLAN_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("sources", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True)
class PlannedUnit:
    """One unit of work. sources: pseudonyms of its inputs, in the order of the unit."""

    unit: str
    modality: str
    sources: tuple[str, ...]


def plan_names(store: Store) -> list[str]:
    """Names of the plans of a dataset, in the order they were written."""
    return store.list("plans")


def write_plan(store: Store, units: Iterable[PlannedUnit], before: int | None = None) -> bool:
    """Store a plan, rows sorted by unit, as number `before`: that of the plans its author has read.

    False, and nothing is written, where another plan has that number already: read the plans again and plan
    again. So the author of a plan knows all earlier ones, and no input is planned twice. before None: next.
    """
    rows = sorted(units, key=lambda u: u.unit)
    table = pa.table(
        {
            "unit": [u.unit for u in rows],
            "modality": [u.modality for u in rows],
            "sources": [list(u.sources) for u in rows],
        },
        schema=PLAN_SCHEMA,
    )
    return create_plan(store, table, len(plan_names(store)) if before is None else before)


def create_plan(store: Store, table: pa.Table, number: int) -> bool:
    """Store rows of PLAN_SCHEMA, sorted by unit, as plan `number`; False where there is one (write_plan)."""
    return store.create(f"plans/{number:08d}.parquet", parquet.to_bytes(table))


def read_plan(store: Store, name: str) -> pa.Table:
    """The rows of one plan (PLAN_SCHEMA)."""
    return parquet.read_bytes(store.read(name))


def planned_units(store: Store) -> set[str]:
    """Ids of all planned units, without their inputs."""
    return {u for n in plan_names(store) for u in parquet.read(store, n, ["unit"])["unit"].to_pylist()}


def read_plans(store: Store, names: Iterable[str] | None = None) -> list[PlannedUnit]:
    """The units of the named plans (default: all of a dataset), each once, sorted by unit id."""
    units: dict[str, PlannedUnit] = {}
    for name in plan_names(store) if names is None else names:
        for row in parquet.read_bytes(store.read(name)).to_pylist():
            unit = PlannedUnit(row["unit"], row["modality"], tuple(row["sources"]))
            units.setdefault(unit.unit, unit)
    return [units[unit] for unit in sorted(units)]
