"""Units of work: which inputs are converted together. Deterministic, and stable over a resume."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ingest.config import IngestConfig
from ingest.deidentify import source_id
from ingest.discover import Entry
from shards.ids import Pseudonymizer, digest
from shards.plan import PlannedUnit


@dataclass(frozen=True)
class Unit:
    """One unit of work. missing: `source` pseudonyms of planned inputs that are gone or changed."""

    unit: str
    modality: str
    entries: tuple[Entry, ...]
    missing: tuple[str, ...] = ()


def input_id(entry: Entry, names: Pseudonymizer) -> str:
    """What a plan knows an input by: pseudonyms of its path and of its identity."""
    return f"{source_id(entry.relative, names)}-{names.id('input', entry.identity)}"


def make_units(
    entries: Sequence[Entry],
    config: IngestConfig,
    names: Pseudonymizer,
    planned: Iterable[PlannedUnit] = (),
    done: set[str] | frozenset[str] = frozenset(),
) -> list[Unit]:
    """The units that are still to do: those of written plans exactly as planned, then units of new inputs.

    `done`: ids of committed units; they are left out, and their inputs are not converted again.
    """
    by_id = {input_id(entry, names): entry for entry in entries}
    units, known = [], set[str]()
    for plan in planned:
        known.update(plan.sources)
        if plan.unit in done:
            continue
        here = tuple(by_id[source] for source in plan.sources if source in by_id)
        missing = tuple(source.partition("-")[0] for source in plan.sources if source not in by_id)
        units.append(Unit(plan.unit, plan.modality, here, missing))
    new = {identity: entry for identity, entry in by_id.items() if identity not in known}
    return units + [unit for unit in _new_units(new, config, names) if unit.unit not in done]


def plan_of(unit: Unit, names: Pseudonymizer) -> PlannedUnit:
    """The record of a new unit, to be written before the unit is run."""
    return PlannedUnit(unit.unit, unit.modality, tuple(input_id(entry, names) for entry in unit.entries))


def _new_units(new: dict[str, Entry], config: IngestConfig, names: Pseudonymizer) -> Iterator[Unit]:
    ordered = sorted(new.items(), key=lambda pair: _order(pair[1]))
    for modality, of_modality in groupby(ordered, key=lambda pair: pair[1].modality):
        for chunk in _chunks(of_modality, config):
            # Digest of keyed pseudonyms: the id of a unit gives no path away.
            unit = digest(
                "unit", *sorted(identity for identity, _ in chunk), config.fingerprint(), names.key_id
            )
            yield Unit(unit, modality, tuple(entry for _, entry in chunk))


def _order(entry: Entry) -> tuple[str, str, str, str]:
    return entry.modality, entry.group, entry.relative, entry.identity


def _chunks(pairs: Iterable[tuple[str, Entry]], config: IngestConfig) -> Iterator[list[tuple[str, Entry]]]:
    """Runs of whole groups up to unit_files files or unit_bytes bytes (a larger group is one unit)."""
    chunk: list[tuple[str, Entry]] = []
    size = 0
    for _, members in groupby(pairs, key=lambda pair: pair[1].group or pair[0]):
        group = list(members)
        group_size = sum(entry.size for _, entry in group)
        full = len(chunk) + len(group) > config.unit_files or size + group_size > config.unit_bytes
        if chunk and full:
            yield chunk
            chunk, size = [], 0
        chunk += group
        size += group_size
    if chunk:
        yield chunk
