"""`medswav bench NAME`: figures with the baseline they are to be held against, measured in the same run.

Every figure is one JSON object on a line of its own. The two sides take turns, so that a noisy neighbour hits
both; each side's time is the median of its turns. `ratio` is how many times better than the baseline the
value is: above 1 is better, whatever the unit.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shards.errors import UserError

BENCHES = ("ingest", "plan", "files", "list", "catalogue", "decoders", "augment", "read", "feed", "step")
DEFAULT_SECONDS = 60.0
MINIMUM_TURNS = 3
_LOWER_IS_BETTER = ("ms", "s", "bytes", "%", "requests", "shards")


@dataclass(frozen=True)
class Figure:
    """`value` and `baseline` are in `unit`; `versus` says what the baseline is; `turns` of each side."""

    name: str
    value: float
    unit: str
    baseline: float
    ratio: float
    versus: str
    turns: int
    detail: str = ""


def figure(
    name: str, value: float, unit: str, baseline: float, versus: str, turns: int, detail: str = ""
) -> Figure:
    """A figure with its ratio: value / baseline for rates, baseline / value for times and sizes."""
    better = baseline / value if unit.split("/")[0] in _LOWER_IS_BETTER else value / baseline
    return Figure(name, _short(value), unit, _short(baseline), _short(better), versus, turns, detail)


def _short(value: float) -> float:
    """Four significant digits: more would pretend to a precision that is not there."""
    return float(f"{value:.4g}")


def take_turns(sides: Mapping[str, Callable[[], Any]], seconds: float) -> tuple[dict[str, float], int]:
    """Median seconds of each side, and the number of turns.

    Each side runs once unmeasured, then they alternate until the time is up, at least MINIMUM_TURNS turns.
    A side that returns a float has measured itself, because its set-up is not to count.
    """
    for work in sides.values():
        work()
    took: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < MINIMUM_TURNS or time.perf_counter() < end:
        # The order alternates: neither side always runs on the caches that the other has warmed.
        for name in list(sides)[:: 1 if turns % 2 == 0 else -1]:
            start = time.perf_counter()
            own = sides[name]()
            took[name].append(own if isinstance(own, float) else time.perf_counter() - start)
        turns += 1
    return {name: statistics.median(values) for name, values in took.items()}, turns


def machine() -> dict[str, Any]:
    """The machine in general words."""
    facts: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
    }
    for package in ("medswav", "torch", "ray", "imagecodecs"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_line(record: Mapping[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def run(
    name: str,
    seconds: float = DEFAULT_SECONDS,
    emit: Callable[[Mapping[str, Any]], None] = print_line,
    options: Mapping[str, Any] | None = None,
) -> list[Figure]:
    """Measure one bench within about `seconds` of turns (set-up comes on top). Raises UserError.

    options: of that bench alone.
    """
    if name not in BENCHES:
        raise UserError(f"no bench is called {name!r}: choose from {', '.join(BENCHES)}")
    if seconds <= 0:
        raise UserError(f"--seconds {seconds:g} leaves no time to measure: give a positive number")
    measure: Callable[..., Iterator[Figure]] = import_module(f"orchestration.bench_{name}").measure
    facts = machine()
    found = []
    for item in measure(seconds, **(options or {})):
        found.append(item)
        emit({"bench": name, **asdict(item), "machine": facts})
        print(_in_words(item), file=sys.stderr, flush=True)
    return found


def _in_words(item: Figure) -> str:
    return (
        f"{item.name}: {item.value:g} {item.unit}, {item.versus}: {item.baseline:g} {item.unit}, "
        f"ratio {item.ratio:g}"
    )
