"""Plans: the inputs of each unit of work, written before any work, so that a resume does the same."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from shards import parquet
from shards.ids import digest
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


def write_plan(store: Store, units: Iterable[PlannedUnit]) -> str:
    """Store a plan under the digest of its content; rows sorted by unit. Returns its name."""
    rows = sorted(units, key=lambda u: u.unit)
    table = pa.table(
        {
            "unit": [u.unit for u in rows],
            "modality": [u.modality for u in rows],
            "sources": [list(u.sources) for u in rows],
        },
        schema=PLAN_SCHEMA,
    )
    data = parquet.to_bytes(table)
    name = f"plans/{digest('plan', data)}.parquet"
    if not store.exists(name):
        store.put(name, data)
    return name


def read_plans(store: Store) -> list[PlannedUnit]:
    """The units of all plans of a dataset, each once, sorted by unit id."""
    units: dict[str, PlannedUnit] = {}
    for name in store.list("plans"):
        for row in parquet.read_bytes(store.read(name)).to_pylist():
            unit = PlannedUnit(row["unit"], row["modality"], tuple(row["sources"]))
            units.setdefault(unit.unit, unit)
    return [units[unit] for unit in sorted(units)]
