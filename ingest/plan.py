"""Units of work: which inputs are converted together. Deterministic, and stable over a resume.

The rules, for entries in memory; ingest.planner keeps them for an inventory on disk, as `ingest run` does.

What becomes of a planned unit that is not committed yet:

1. All its inputs are here, as planned: it is run as planned, and gives the bytes it would have given.
2. No file of it is under the given sources (another source was given): it waits. The run says how many files
   wait and does not end with exit code 0; a run with their source goes on with the unit.
3. Some inputs are here, others are gone or changed: it is released, by an empty commit under its id, so that
   no other driver can commit it any more. Its inputs belong to no unit then: those that are here, in the
   present form, get new units now, and a file that comes back is a new input of a later run. The releasing
   run counts what was not here.

A file that goes or changes while its unit runs leaves the unit uncommitted (ingest.convert): rule 3, next
time. So no input is ever lost, and none is in two units that hold something.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ingest.config import IngestConfig
from ingest.discover import Entry
from ingest.inventory import input_id
from shards.commit import Retry, is_release, list_commits, release_unit
from shards.errors import UserError
from shards.ids import Pseudonymizer, digest
from shards.plan import PlannedUnit, plan_names, read_plans, write_plan
from shards.store import Store

TRIES = 100  # each lost one is another driver's plan


@dataclass(frozen=True)
class Unit:
    """One unit of work."""

    unit: str
    modality: str
    entries: tuple[Entry, ...]
    retry: Retry | None = None  # of inputs that another unit refused


@dataclass(frozen=True)
class Todo:
    """units: to run, in order. done: ids of planned units that are committed. waiting: ids of rule 2.

    absent: number of planned, unconverted files that are not here as they were planned (rules 2 and 3).
    """

    units: tuple[Unit, ...]
    done: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()
    absent: int = 0


def plan_units(store: Store, entries: Sequence[Entry], config: IngestConfig, names: Pseudonymizer) -> Todo:
    """Read the plans, release what cannot be completed, plan what is new and write that plan.

    Safe beside other drivers of the same dataset: whoever is second plans again. Raises UserError.
    """
    absent: set[str] = set()
    for _ in range(TRIES):
        plans = plan_names(store)
        planned = read_plans(store, plans)
        # After the plans: a release that we see and whose new plan we do not costs us the number below.
        commits = list_commits(store)
        done = frozenset(commit.unit for commit in commits)
        released = frozenset(commit.unit for commit in commits if is_release(commit))
        waiting, broken = incomplete(entries, names, planned, done)
        absent |= {source for sources in (waiting | broken).values() for source in sources}
        if broken:
            for unit in sorted(broken):
                release_unit(store, unit)
            continue
        units = make_units(entries, config, names, planned, done, released)
        known = {plan.unit for plan in planned}
        new = [plan_of(unit, names) for unit in units if unit.unit not in known]
        if not new or write_plan(store, new, len(plans)):
            return Todo(tuple(units), frozenset(known & done - released), frozenset(waiting), len(absent))
    raise UserError("other runs plan this dataset all the time: wait for them and run again")


def incomplete(
    entries: Sequence[Entry],
    names: Pseudonymizer,
    planned: Iterable[PlannedUnit],
    done: set[str] | frozenset[str] = frozenset(),
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """(waiting, broken): planned, uncommitted units of rules 2 and 3, each with its absent inputs."""
    here = {input_id(entry, names) for entry in entries}
    paths = {identity.partition("-")[0] for identity in here}
    waiting: dict[str, tuple[str, ...]] = {}
    broken: dict[str, tuple[str, ...]] = {}
    for plan in planned:
        absent = tuple(source for source in plan.sources if source not in here)
        if plan.unit not in done and absent:
            known = any(source.partition("-")[0] in paths for source in plan.sources)
            (broken if known else waiting)[plan.unit] = absent
    return waiting, broken


def make_units(
    entries: Sequence[Entry],
    config: IngestConfig,
    names: Pseudonymizer,
    planned: Iterable[PlannedUnit] = (),
    done: set[str] | frozenset[str] = frozenset(),
    released: set[str] | frozenset[str] = frozenset(),
) -> list[Unit]:
    """The units that can be done now: those of written plans exactly as planned, then units of new inputs.

    `done`: ids of committed units; they are left out, and their inputs are not converted again, whatever
    source they now come from. `released`: those of `done` whose inputs are free again.
    """
    by_id = {input_id(entry, names): entry for entry in entries}
    units, known = [], set[str]()
    former: dict[str, list[str]] = defaultdict(list)
    for plan in planned:
        contents = [source.partition("-")[2] for source in plan.sources]
        if plan.unit in released:
            for content in contents:
                former[content].append(plan.unit)
            continue
        known.update(contents)
        if plan.unit not in done and all(source in by_id for source in plan.sources):
            units.append(Unit(plan.unit, plan.modality, tuple(by_id[source] for source in plan.sources)))
    new = {identity: entry for identity, entry in by_id.items() if identity.partition("-")[2] not in known}
    return units + [unit for unit in _new_units(new, config, names, former) if unit.unit not in done]


def plan_of(unit: Unit, names: Pseudonymizer) -> PlannedUnit:
    """The record of a new unit, to be written before the unit is run."""
    return PlannedUnit(unit.unit, unit.modality, tuple(input_id(entry, names) for entry in unit.entries))


def _new_units(
    new: dict[str, Entry], config: IngestConfig, names: Pseudonymizer, former: Mapping[str, Sequence[str]]
) -> Iterator[Unit]:
    ordered = sorted(new.items(), key=lambda pair: entry_order(pair[1]))
    for modality, of_modality in groupby(ordered, key=lambda pair: pair[1].modality):
        for chunk in _chunks(of_modality, config):
            # Digest of keyed pseudonyms: the id of a unit gives no path away. With the released units that
            # held an input of it: the id of a released unit is spent, also for the very same inputs.
            inputs = sorted(identity for identity, _ in chunk)
            spent = {unit for identity in inputs for unit in former.get(identity.partition("-")[2], ())}
            unit = digest("unit", *inputs, config.fingerprint(), names.key_id, *sorted(spent))
            yield Unit(unit, modality, tuple(entry for _, entry in chunk))


def entry_order(entry: Entry) -> tuple[str, str, int, str, str]:
    """The order of inputs, over units and in a unit."""
    return entry.modality, entry.group, entry.order, entry.relative, entry.identity


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
