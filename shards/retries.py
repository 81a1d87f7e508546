"""Refused inputs tried again: which refusals still count, from the commits alone.

Attempt n at the refused inputs of a unit is itself a unit of work, whose id follows from the unit and n: of
any number of writers one commits it. Its commit names the inputs; their refusals in earlier commits count no
more. No file is rewritten.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from shards.commit import Commit
from shards.ids import digest


def retry_unit(unit: str, attempt: int) -> str:
    """The id of attempt 1, 2, ... at the refused inputs of a planned unit."""
    return digest("retry", unit, str(attempt))


def family(unit: str, attempts: int) -> tuple[str, ...]:
    """A planned unit and its first `attempts` retries."""
    return (unit, *(retry_unit(unit, n) for n in range(1, attempts + 1)))


def superseded(commits: Iterable[Commit]) -> dict[str, frozenset[str]]:
    """{unit id: sources whose refusals in its quarantine count no more}."""
    attempts: dict[str, list[Commit]] = defaultdict(list)
    for commit in commits:
        if commit.retry is not None:
            attempts[commit.retry.unit].append(commit)
    gone: dict[str, frozenset[str]] = {}
    for unit, found in attempts.items():
        later: frozenset[str] = frozenset()
        for commit in sorted(found, key=lambda c: c.retry.attempt if c.retry else 0, reverse=True):
            gone[commit.unit] = later
            later |= frozenset(commit.retry.sources if commit.retry else ())
        gone[unit] = later
    return gone


def standing(table: pa.Table, unit: str, gone: Mapping[str, frozenset[str]]) -> pa.Table:
    """The rows of the quarantine of a unit that still count; table: with a column `source`."""
    sources = gone.get(unit)
    if not sources:
        return table
    return table.filter(pc.invert(pc.is_in(table["source"], pa.array(sorted(sources), pa.string()))))


def input_count(commits: Iterable[Commit]) -> int:
    """Inputs of a dataset, each once however often it was tried."""
    return sum(commit.counts["inputs"] for commit in commits if commit.retry is None)


def refusal_count(commits: Iterable[Commit]) -> int:
    """Refusals that still count, from the commits alone."""
    return sum(c.counts["quarantined"] - (c.retry.rows if c.retry else 0) for c in commits)
