"""Runs of `medswav finetune` as arms that are compared: what `medswav evaluate` reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestration.finetune_table import mean_of_draws
from shards.errors import UserError

REFERENCES = ("none", "random")  # the arm that the others are compared with, if there is one of these names


@dataclass(frozen=True)
class Cell:
    """One training. row: of RUN/result.json. draws: of each test metric its values on draws of patients."""

    run: Path
    folder: Path
    fraction: float
    seed: int
    row: Mapping[str, Any]
    draws: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Arm:
    """Trainings of one name, from one run or several. selection: the metric that chose the epochs."""

    name: str
    task: str
    selection: str
    cells: tuple[Cell, ...]

    def at(self, fraction: float, seeds: Sequence[int] | None = None) -> list[Cell]:
        """In the order of the seeds."""
        chosen = [c for c in self.cells if c.fraction == fraction and (seeds is None or c.seed in seeds)]
        return sorted(chosen, key=lambda cell: cell.seed)

    def values(self, fraction: float, metric: str, seeds: Sequence[int] | None = None) -> list[float]:
        """Of test at the best epoch; the seeds that have a number."""
        found = [cell.row["test"].get(metric) for cell in self.at(fraction, seeds)]
        return [float(value) for value in found if value is not None]

    def drawn(self, fraction: float, metric: str, seeds: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Of each draw of the test patients the mean over the seeds."""
        return mean_of_draws([cell.draws.get(metric, ()) for cell in self.at(fraction, seeds)])


def read_arms(given: Sequence[str]) -> list[Arm]:
    """`NAME=RUN` or `RUN`, whose name is that of its folder; several of one name are one arm. Raises
    UserError for what is no run, and for runs that cannot be compared."""
    if not given:
        raise UserError("there is nothing to evaluate: give folders of medswav finetune, as NAME=RUN")
    abouts: list[tuple[str, Mapping[str, Any]]] = []
    arms: dict[str, Arm] = {}
    for item in given:
        name, separator, text = item.partition("=")
        run = Path(text if separator else item)
        name = name if separator else run.name
        about, cells = _read(run)
        first_name, first = abouts[0] if abouts else (name, about)
        for what in ("task", "dataset", "labels"):
            if about[what] != first[what]:
                raise UserError(
                    f"{name} and {first_name} are of different {_PLURAL[what]}: arms are compared on one task"
                )
        if None not in (about.get("test"), first.get("test")) and about["test"] != first["test"]:
            raise UserError(
                f"{name} and {first_name} were tested on different samples: give runs of one test split"
            )
        abouts.append((name, about))
        old = arms.get(name)
        both = (*(old.cells if old else ()), *cells)
        places = [(cell.fraction, cell.seed) for cell in both]
        if len(set(places)) < len(places):
            raise UserError(f"two runs of {name} have the same seed: give them different names")
        arms[name] = Arm(name, about["task"], about["selection"], both)
    return list(arms.values())


_PLURAL = {"task": "tasks", "dataset": "datasets", "labels": "label tables"}


def _read(run: Path) -> tuple[Mapping[str, Any], list[Cell]]:
    if not (run / "result.json").is_file():
        raise UserError(f"{run} is no finished run of medswav finetune: it has no result.json")
    about = json.loads((run / "result.json").read_text())
    if "rows" not in about or "selection" not in about:
        raise UserError(f"{run} is one training, not a run of medswav finetune: give the folder of its run")
    cells = []
    for row in about["rows"]:
        folder = run / f"fraction-{row['fraction']:g}" / f"seed-{row['seed']}"
        if not (folder / "test.json").is_file():
            raise UserError(f"{run.name} has lost {folder.parent.name}/{folder.name}: run its command again")
        draws = json.loads((folder / "test.json").read_text())["draws"]
        cells.append(Cell(run, folder, row["fraction"], row["seed"], row, draws))
    if not cells:
        raise UserError(f"{run} holds no finished training: run its command again")
    return about, cells


def fractions_of(arms: Sequence[Arm]) -> list[float]:
    """All there are, the largest first."""
    return sorted({cell.fraction for arm in arms for cell in arm.cells}, reverse=True)


def reference_of(arms: Sequence[Arm], name: str | None = None) -> Arm:
    """The arm named; else `none` or `random`; else the first. Raises UserError."""
    by_name = {arm.name: arm for arm in arms}
    if name is not None and name not in by_name:
        raise UserError(f"there is no arm {name!r}: choose --reference from {', '.join(by_name)}")
    wanted = [name] if name is not None else [n for n in REFERENCES if n in by_name]
    return by_name[wanted[0]] if wanted else arms[0]


def common_seeds(arms: Sequence[Arm], fraction: float) -> list[int]:
    """Seeds that every arm has at a fraction."""
    sets = [{cell.seed for cell in arm.at(fraction)} for arm in arms]
    return sorted(set.intersection(*sets)) if sets else []
