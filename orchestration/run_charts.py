"""The charts of a run's page: one run, a line for each modality; several, a chart for each, a line a run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from orchestration.page import missing, section
from orchestration.report_data import modality_name
from orchestration.report_figures import Line, Reference, line_chart
from orchestration.run_data import RunData, Series
from trainer.alarms import ONE_LINE, ONE_POINT

_Reference = Callable[[RunData], Reference | None]


@dataclass(frozen=True)
class Chart:
    """A section of charts: (column, title, factor of its values) each. Columns are `m/<group>/<column>`, with
    `prefix` of another start; timing: of timing.jsonl, whole: of metrics.jsonl, both without groups."""

    anchor: str
    title: str
    lead: str
    columns: tuple[tuple[str, str, float], ...]
    prefix: str = "m/"
    timing: bool = False
    whole: bool = False


def letter(index: int) -> str:
    """A, B, C ... of the runs in their order."""
    return chr(ord("A") + index)


CHARTS = (
    Chart(
        "loss",
        "How it learns",
        "A network that tells nothing apart stays at the dashed line. Each modality has prototypes, and so a "
        "loss, of its own.",
        (("loss", "Loss", 1.0),),
    ),
    Chart(
        "prototypes",
        "Prototypes over time",
        "Effective: how many prototypes share the images, near K is good. Dead: those with less than a tenth "
        "of equal use.",
        (("effective_prototypes", "Effective prototypes", 1.0), ("dead_prototypes", "Dead prototypes", 1.0)),
    ),
    Chart(
        "entropies",
        "Entropies",
        "Of a code, and of a prediction that follows it, in nats: ln K is a code that says nothing of its "
        "image, 0 one that names a single prototype.",
        (
            ("target_entropy", "Entropy of a code", 1.0),
            ("prediction_entropy", "Entropy of a prediction", 1.0),
        ),
    ),
    Chart(
        "features",
        "Features",
        "Spread: 1 all over the sphere, 0 one point. Effective rank: in how many directions features lie. "
        "An alarm is raised below the dashed lines.",
        (("feature_std", "Spread of the features", 1.0), ("effective_rank", "Effective rank", 1.0)),
    ),
    Chart("rate", "Learning rate", "", (("learning_rate", "Learning rate", 1.0),), whole=True),
)


def charts(chart: Chart, runs: Sequence[RunData], more: str = "") -> str:
    """The section of a chart. more: markup below it."""
    cells = [cell for column in chart.columns for cell in _cells(chart, column, runs)]
    if not cells:
        return (
            ""
            if chart.prefix != "m/"
            else section(chart.anchor, chart.title, chart.lead, missing("Not logged."))
        )
    one = len(cells) == 1
    body = "".join(
        f"<div>{'' if one and title == chart.title else f'<h4>{escape(title)}</h4>'}{text}</div>"
        for title, text in cells
    )
    kind = "" if one else ' class="charts"'
    return section(chart.anchor, chart.title, chart.lead, f"<div{kind}>{body}</div>{more}")


def _cells(chart: Chart, column: tuple[str, str, float], runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """(title, markup) of the charts of one column; those without any value are left out."""
    name, title, factor = column
    if chart.timing or chart.whole:
        lines = [
            _line(_series(chart, run), name, factor, letter(i) if len(runs) > 1 else "", f"m{i % 6}")
            for i, run in enumerate(runs)
        ]
        return _drawn(title, lines, None, 0.0)
    groups = list(dict.fromkeys(group for run in runs for group in run.config.groups))
    if len(runs) > 1:
        cells = []
        for group in groups:
            lines = [
                _line(run.metrics, f"{chart.prefix}{group}/{name}", factor, letter(i), f"m{i % 6}")
                for i, run in enumerate(runs)
            ]
            shown = f"{title}, {modality_name(group)}" if len(groups) > 1 else title
            cells += _drawn(shown, lines, _reference(name, runs), _least(name))
        return cells
    run = runs[0]
    lines = [
        _line(run.metrics, f"{chart.prefix}{group}/{name}", factor, modality_name(group), f"m{i % 6}")
        for i, group in enumerate(groups)
    ]
    if name == "loss" and len(groups) > 1:
        lines.append(_line(run.metrics, "loss", factor, "Mean", "main"))
    return _drawn(title, lines, _reference(name, runs), _least(name))


def _least(name: str) -> float | None:
    """Where the axis of a column begins: a count at 0."""
    return 0.0 if name == "dead_prototypes" else None


def _series(chart: Chart, run: RunData) -> Series:
    return run.timing if chart.timing else run.metrics


def _line(series: Series, name: str, factor: float, shown: str, style: str) -> Line:
    return Line(shown, series.steps, [factor * value for value in series.get(name)], style)


def _drawn(
    title: str, lines: Sequence[Line], reference: Reference | None, least: float | None
) -> list[tuple[str, str]]:
    there = [line for line in lines if any(math.isfinite(v) for v in line.y)]
    return [(title, line_chart(there, title, reference, least, 8.5))] if there else []


def _reference(name: str, runs: Sequence[RunData]) -> Reference | None:
    """What a value of the column is held against, where that is the same in all runs."""
    found = {_reference_of(name, run) for run in runs}
    return found.pop() if len(found) == 1 else None


def _reference_of(name: str, run: RunData) -> Reference | None:
    prototypes = run.config.swav.prototypes
    if name == "feature_std":
        return Reference(ONE_POINT, "alarm below")
    if name == "effective_rank":
        return Reference(ONE_LINE, "alarm below")
    if run.config.method == "swav":
        if name in ("loss", "target_entropy", "prediction_entropy"):
            return Reference(math.log(prototypes), "ln K")
        if name == "effective_prototypes":
            return Reference(float(prototypes), "K")
    elif name == "loss":
        chance = run.metrics.last("loss") - run.metrics.last("loss_minus_chance")
        return Reference(chance, "chance") if math.isfinite(chance) else None
    return None
