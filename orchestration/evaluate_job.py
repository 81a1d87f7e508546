"""`medswav evaluate fractions|convergence|curves`: tables and figures of runs. robustness: evaluate_robust.

Each writes OUT/<name>.json, .md, .html and its figures as PNG with a CSV beside it, and gives a Finding.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.evaluate_page import Chart, Page, Section, Table, Value, markdown, render
from orchestration.evaluate_runs import Arm, common_seeds, fractions_of, reference_of
from orchestration.finetune_table import percentiles, spread
from shards.errors import UserError
from trainer import files
from trainer.downstream.finetune import metric_curve
from trainer.evaluate import convergence as converge
from trainer.evaluate import figures

INTERVAL = "in brackets the 95 % interval over draws of the test patients, below the lowest and highest seed"
_NAMES = {"auc": "AUC", "froc": "fROC", "average_precision": "average precision"}


@dataclass(frozen=True)
class Finding:
    """What one command found: as a tree, and as a part of a page."""

    name: str
    tree: dict[str, Any]
    section: Section


def write(found: Finding, out: Path) -> None:
    """OUT/<name>.json, .md and .html."""
    tables = [markdown(table) for table in found.section.tables]
    page = Page(found.section.title, found.section.lead, f"medswav evaluate, {date.today()}", [found.section])
    with files.disk_full_is_clear(f"writing {found.name}.html"):
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found.tree, indent=1) + "\n"
        files.replace_file(out / f"{found.name}.json", text.encode())
        files.replace_file(out / f"{found.name}.md", "\n".join(tables).encode())
        files.replace_file(out / f"{found.name}.html", render(page).encode())


def fractions(arms: Sequence[Arm], out: Path, reference: str | None = None, title: str = "") -> Finding:
    """Label fractions (Table II, and Table III: every measure), and what is gained over the reference."""
    metric, base, listed = _metric(arms), reference_of(arms, reference), fractions_of(arms)
    results = {arm.name: _by_fraction(arm, listed, metric) for arm in arms}
    paths = figures.fractions_figure(
        out / "fractions", {n: of for n, of in results.items() if of}, metric=_label(metric), title=title
    )
    summary = {arm.name: _summary(arm, listed) for arm in arms}
    gains = {a.name: _gains(a, base, listed, metric) for a in arms if a is not base}
    heads = ["", *(f"{100 * f:g} %" for f in listed)]
    rows = [(n, [_value(_at(of, f, metric)) for f in listed]) for n, of in summary.items()]
    tables = [Table(f"{_label(metric)} on test, by share of the training patients", heads, rows, INTERVAL)]
    if gains:
        rows = [(n, [_value(of.get(f"{f:g}"), gain=True) for f in listed]) for n, of in gains.items()]
        said = (
            f"{INTERVAL}; set off where the interval does not hold 0. Both arms see the same draws and seeds."
        )
        tables.append(Table(f"Less {base.name}", heads, rows, said))
    metrics = list(dict.fromkeys(m for of in summary.values() for m in of[f"{listed[0]:g}"]["test"]))
    rows = [(n, [_value(_at(of, listed[0], m)) for m in metrics]) for n, of in summary.items()]
    heads = ["", *map(_label, metrics)]
    tables.append(Table(f"Every measure, {100 * listed[0]:g} % of the patients", heads, rows, INTERVAL))
    tree = {**_about(arms), "metric": metric, "reference": base.name, "arms": summary, "gains": gains}
    chart = Chart(f"{_label(metric)} on test by share of the training patients", *paths)
    lead = (
        f"Subsets are of whole patients, and smaller ones lie in larger ones. {_seeds(arms)} The epoch is "
        "the best one on val; test decides nothing."
    )
    return Finding("fractions", tree, Section("Label fractions", lead, tables, [chart], anchor="fractions"))


def convergence(arms: Sequence[Arm], out: Path, reference: str | None = None, title: str = "") -> Finding:
    """Epochs until 98 % of the final best on val, and who is faster (method.md section 7)."""
    metric, base, listed = _metric(arms), reference_of(arms, reference), fractions_of(arms)
    found: dict[str, list[dict[str, Any]]] = {}
    for fraction in listed:
        curves = _curves(arms, fraction, metric, "val")
        if curves:
            found[f"{fraction:g}"] = converge.compare(curves)
    if not found:
        raise UserError(f"no run has a curve of {metric} on val with a value above 0")
    curves = _curves(arms, listed[0], metric, "val")
    paths = figures.curves_figure(out / "convergence", curves, metric=f"{_label(metric)} on val", title=title)
    rows = []
    for arm in arms:
        cells = []
        for fraction in listed:
            of = {row["name"]: row for row in found.get(f"{fraction:g}", [])}
            cells.append(_epochs(of.get(arm.name), base.name))
        rows.append((arm.name, cells))
    caption = (
        f"mean epochs over the seeds (lowest to highest seed), and how much sooner than {base.name}; counted "
        "from 1, on val, against the best of the same training"
    )
    heads = ["", *(f"{100 * f:g} %" for f in listed)]
    tables = [Table(f"Epochs until 98 % of the best {_label(metric)}", heads, rows, caption)]
    tree = {**_about(arms), "metric": metric, "reference": base.name, "share": converge.SHARE} | {
        "fractions": found
    }
    chart = Chart(f"{_label(metric)} on val by epoch, {100 * listed[0]:g} % of the patients", *paths)
    lead = f"How soon a training is done. {_seeds(arms)}"
    return Finding("convergence", tree, Section("Convergence", lead, tables, [chart], anchor="convergence"))


def curves(
    arms: Sequence[Arm],
    out: Path,
    metric: str | None = None,
    fraction: float | None = None,
    title: str = "",
) -> Finding:
    """A metric by epoch on val, and on test where the runs looked at it each epoch."""
    metric = metric or _metric(arms)
    listed = fractions_of(arms)
    chosen = listed[0] if fraction is None else fraction
    if chosen not in listed:
        raise UserError(f"no run has --fraction {chosen:g}: there are {', '.join(f'{f:g}' for f in listed)}")
    charts, tree, tables = [], {**_about(arms), "metric": metric, "fraction": chosen}, []
    for split in ("val", "test"):
        found = _curves(arms, chosen, metric, split)
        if not found:
            continue
        label = f"{_label(metric)} on {split}"
        paths = figures.curves_figure(out / f"curves-{split}", found, metric=label, share=None, title=title)
        charts.append(Chart(f"{label} by epoch, {100 * chosen:g} % of the patients", *paths))
        tree[split] = {name: [_plain(curve) for curve in of] for name, of in found.items()}
        rows = []
        for name, of in found.items():
            best, last = spread([float(np.nanmax(c)) for c in of]), spread([c[-1] for c in of])
            epochs = spread([len(c) for c in of])
            rows.append((name, [_range(best), _range(last), _range(epochs, 1)]))
        tables.append(Table(label, ["", "best", "last epoch", "epochs"], rows, "mean over the seeds, range"))
    if not charts:
        raise UserError(f"the runs have no {metric} after each epoch: see metrics.jsonl for what they have")
    absent = "" if "test" in tree else " Test: with finetune.evaluate_test=true."
    lead = f"{_seeds(arms)} A seed that ended early is left out after its last epoch.{absent}"
    return Finding("curves", tree, Section("Curves", lead, tables, charts, anchor="curves"))


def _about(arms: Sequence[Arm]) -> dict[str, Any]:
    return {"task": arms[0].task, "seeds": {a.name: sorted({c.seed for c in a.cells}) for a in arms}}


def _metric(arms: Sequence[Arm]) -> str:
    return arms[0].selection


def _label(metric: str) -> str:
    return _NAMES.get(metric, metric)


def _seeds(arms: Sequence[Arm]) -> str:
    counts = {len({cell.seed for cell in arm.cells}) for arm in arms}
    text = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{text} {'seed' if counts == {1} else 'seeds'} of each arm."


def _by_fraction(arm: Arm, listed: Sequence[float], metric: str) -> dict[float, list[float]]:
    found = {f: arm.values(f, metric) for f in listed}
    return {f: values for f, values in found.items() if values}


def _summary(arm: Arm, listed: Sequence[float]) -> dict[str, Any]:
    found = {}
    for fraction in listed:
        cells = arm.at(fraction)
        names = list(dict.fromkeys(name for cell in cells for name in cell.row["test"]))
        test = {}
        for name in names:
            values = arm.values(fraction, name)
            if len(values) == len(cells):
                test[name] = {**spread(values), **percentiles(arm.drawn(fraction, name))}
        counts = {
            "n_train": [c.row["n_train"] for c in cells],
            "n_patients": [c.row["n_patients"] for c in cells],
        }
        found[f"{fraction:g}"] = {"test": test, **counts}
    return found


def _gains(arm: Arm, base: Arm, listed: Sequence[float], metric: str) -> dict[str, Any]:
    """By fraction: the difference of the means over the seeds that both have, draw by draw."""
    found = {}
    for fraction in listed:
        seeds = common_seeds([arm, base], fraction)
        ours, theirs = arm.values(fraction, metric, seeds), base.values(fraction, metric, seeds)
        if not seeds or len(ours) != len(seeds) or len(theirs) != len(seeds):
            continue
        drawn = arm.drawn(fraction, metric, seeds) - base.drawn(fraction, metric, seeds)
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        found[f"{fraction:g}"] = {**spread(differences), **percentiles(drawn)}
    return found


def _at(summary: dict[str, Any], fraction: float, metric: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = summary.get(f"{fraction:g}", {}).get("test", {}).get(metric)
    return found


def _value(one: dict[str, Any] | None, gain: bool = False) -> Value:
    if one is None:
        return Value("-")
    sign = "+" if gain else ""
    text = f"{one['mean']:{sign}.3f}"
    if one["low"] is not None:
        text += f" [{one['low']:{sign}.3f}, {one['high']:{sign}.3f}]"
    below = "" if one["n"] < 2 else f"({one['min']:{sign}.3f} to {one['max']:{sign}.3f})"
    clear = gain and one["low"] is not None and (one["low"] > 0 or one["high"] < 0)
    return Value(_minus(text), _minus(below), clear)


def _range(one: dict[str, float], digits: int = 3) -> Value:
    below = "" if one["n"] < 2 else f"({one['min']:.{digits}f} to {one['max']:.{digits}f})"
    return Value(f"{one['mean']:.{digits}f}", below)


def _epochs(row: dict[str, Any] | None, base: str) -> Value:
    if row is None:
        return Value("-")
    epochs = row["epochs"]
    text = f"{epochs['mean']:.1f} ({epochs['min']} to {epochs['max']})"
    faster = row["faster"].get(base)
    return Value(text, "" if faster is None else _minus(f"{faster:+.0f} %"), bool(faster and faster > 0))


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _curves(arms: Sequence[Arm], fraction: float, metric: str, split: str) -> dict[str, list[list[float]]]:
    """By arm, the curves of its seeds; arms without one are left out."""
    found: dict[str, list[list[float]]] = {}
    for arm in arms:
        for cell in arm.at(fraction):
            try:
                curve = metric_curve(cell.folder, metric, split)
            except UserError:
                continue  # this run has no such metric after each epoch
            if any(math.isfinite(v) and v > 0 for v in curve):
                found.setdefault(arm.name, []).append(curve)
    return found


def _plain(curve: Sequence[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in curve]
