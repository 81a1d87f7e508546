"""Trainings of a task to numbers over the seeds, and their table. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]  # of RUN/result.json
Draws = Mapping[str, Sequence[float | None]]  # metric: its value on each draw of the test patients
_LEVEL = 95.0  # percent


def summarise(rows: Sequence[Row], draws: Sequence[Draws]) -> list[dict[str, Any]]:
    """A dict a fraction: fraction, seeds, n_train, n_patients, test_patients, best_epoch and of each test
    metric {mean, min, max, n, low, high}.

    low, high: 95 % percentile interval by patient of the mean over the seeds. All seeds are judged on the
    same patients, so a draw of patients is a draw of that mean. A metric that a seed does not have is left
    out.
    """
    found = []
    for fraction in dict.fromkeys(row["fraction"] for row in rows):
        where = [i for i, row in enumerate(rows) if row["fraction"] == fraction]
        of = [rows[i] for i in where]
        names = [n for n in of[0]["test"] if all(row["test"].get(n) is not None for row in of)]
        found.append(
            {
                "fraction": fraction,
                "seeds": [row["seed"] for row in of],
                "n_train": spread([row["n_train"] for row in of]),
                "n_patients": of[0]["n_patients"],
                "test_patients": of[0]["test_patients"],
                "best_epoch": spread([row["best_epoch"] for row in of]),
                "test": {
                    name: {
                        **spread([row["test"][name] for row in of]),
                        **percentiles(mean_of_draws([draws[i].get(name, ()) for i in where])),
                    }
                    for name in names
                },
            }
        )
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values), "n": len(values)}


def mean_of_draws(of_seed: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Draw by draw the mean over the seeds; nan where one has no number. [draws]."""
    shortest = min(map(len, of_seed))
    table = [[np.nan if value is None else value for value in values[:shortest]] for values in of_seed]
    return np.asarray(np.array(table, np.float64).reshape(len(of_seed), shortest).mean(0))


def percentiles(drawn: np.ndarray) -> dict[str, float | None]:
    """low and high of the 95 % interval; None where no draw has a number."""
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return {"low": None, "high": None}
    low, high = np.percentile(known, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def markdown(tree: Mapping[str, Any]) -> str:
    """A table of the test metrics: a row a fraction; mean over the seeds, its interval by patient, range."""
    summary = tree["summary"]
    names = list(dict.fromkeys(name for one in summary for name in one["test"]))
    head = ["patients with labels", "samples", "best epoch", *names]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for one in summary:
        cells = [f"{100 * one['fraction']:g} % ({one['n_patients']})", f"{one['n_train']['mean']:g}"]
        cells += [f"{one['best_epoch']['mean']:.1f}"]
        cells += [cell(one["test"].get(name)) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = max((len(one["seeds"]) for one in summary), default=0)
    patients = summary[0]["test_patients"] if summary else 0
    lines.append("")
    lines.append(
        f"{tree['task']}: mean of {seeds} seeds [95 % interval by patient, {patients} test patients]"
        + (" (lowest to highest seed)" if seeds > 1 else "")
        + "; the epoch is the best one on val."
    )
    return "\n".join(lines)


def cell(one: Mapping[str, Any] | None) -> str:
    """.912 [.881 to .940] (.905 to .920)"""
    if one is None:
        return "-"
    text = f"{one['mean']:.3f}"
    if one.get("low") is not None:
        text += f" [{one['low']:.3f} to {one['high']:.3f}]"
    if one["min"] != one["max"]:
        text += f" ({one['min']:.3f} to {one['max']:.3f})"
    return text
