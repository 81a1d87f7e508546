"""The page of one run or of several side by side: one HTML file, a pure function of its data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from typing import Any

import yaml

from orchestration.page import (
    WARNING,
    document,
    duration,
    facts,
    missing,
    notice,
    plain_row,
    section,
    signed,
    table,
)
from orchestration.report_data import PATHS, Views, modality_name
from orchestration.report_figures import use_chart, view_figure
from orchestration.report_style import STRIPS
from orchestration.run_charts import CHARTS, Chart, charts, letter
from orchestration.run_data import RunData
from orchestration.run_findings import Finding, findings, stages, wait_ratio

STYLE = """
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.25rem 2rem}
.charts h4{margin:0 0 .2rem;font-size:.9375rem}
.charts .area{height:11rem}
.charts .plot.lines{padding-right:7.2rem}
.facts dd{font-size:1.375rem}
.finding{border-left:3px solid var(--warn);background:var(--warn-wash);padding:.7rem 1rem;margin:.6rem 0;
border-radius:0 4px 4px 0}
.finding b{display:block}.finding p{margin:.15rem 0 0;font-size:.9375rem}
.good{border-left:3px solid var(--accent);background:var(--accent-wash);padding:.7rem 1rem;
border-radius:0 4px 4px 0}
"""
NO_SIGN = "Nothing found: no alarm of the training, the ranks hardly wait for data, checkpoints are saved."


@dataclass(frozen=True)
class Pictures:
    """views and sheets (sections of markup) of the one run; why: what of them is missing, and why."""

    views: tuple[Views, ...] = ()
    sheets: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    wanted: bool = True

    @property
    def any(self) -> bool:
        return bool(self.views or self.sheets)


@dataclass(frozen=True)
class PageData:
    """date: of the page, local time. runs: at least one."""

    runs: tuple[RunData, ...]
    date: str
    pictures: Pictures = field(default_factory=Pictures)


def render(data: PageData) -> str:
    """A complete HTML document."""
    title, lead = headline(data.runs)
    names = ", ".join(run.name for run in data.runs)
    head = (
        f'<p class="kicker">medswav run report, {escape(data.date)}: {escape(names)}</p>'
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
    )
    warning = f'<p class="notice">{escape(WARNING)}</p>' if data.pictures.any else ""
    several = len(data.runs) > 1
    parts = [
        head,
        warning,
        _runs_table(data.runs) if several else _facts(data.runs[0]),
        _attention(data.runs),
    ]
    parts += [charts(chart, data.runs) for chart in CHARTS]
    parts += [
        _use(data.runs),
        _speed(data.runs),
        _online(data.runs),
        _pictures(data),
        _checkpoints(data.runs),
    ]
    parts += [_events(data.runs), _settings(data.runs)]
    return document(f"{names}: {title}", "".join(parts), STRIPS + STYLE)


def headline(runs: Sequence[RunData]) -> tuple[str, str]:
    """What there is to say first: one line, and the sentence below it."""
    if len(runs) > 1:
        each = [(_below(run), letter(i)) for i, run in enumerate(runs)]
        known = [pair for pair in each if math.isfinite(pair[0])]
        title = f"{len(runs)} runs side by side"
        if not known:
            return title, "None has a logged step yet."
        best = min(known)
        return title, f"Furthest below chance at its end is {best[1]}, at {signed(best[0])}."
    run = runs[0]
    lead = f"Step {run.step:,} of {run.config.max_steps:,}; {run.standing.state}"
    lead += f", {run.standing.why}." if run.standing.why else "."
    found = findings(run)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return f"{found[0].title}{more}", lead
    below = _below(run)
    if not math.isfinite(below):
        return "No step is logged yet", lead
    if below < -0.05:
        return f"Learning: the loss is {-below:.2f} below chance", lead
    return "The loss is still at chance", lead


def _below(run: RunData) -> float:
    """Loss less ln K (SimCLR: less ln(2N - 1)) at the newest logged step."""
    return run.metrics.last("loss_minus_ln_k" if run.config.method == "swav" else "loss_minus_chance")


def _facts(run: RunData) -> str:
    found = {"State": run.standing.state, "Steps": f"{run.step:,} of {run.config.max_steps:,}"}
    found |= {name: text for name, text in _figures(run).items() if text != "-"}
    return facts(found)


def _figures(run: RunData) -> dict[str, str]:
    below, ratio, seconds = _below(run), wait_ratio(run.recent), run.timing.last("step_seconds")
    chance = "ln K" if run.config.method == "swav" else "chance"
    return {
        f"Loss minus {chance}": signed(below) if math.isfinite(below) else "-",
        "Images per second": f"{run.config.data.batch_size / seconds:,.1f}" if seconds > 0 else "-",
        "Waited for data": f"{ratio:.0%}" if math.isfinite(ratio) else "-",
        "Training time": duration(run.seconds) if math.isfinite(run.seconds) else "-",
        "Begun": _local(run.state.began) if run.state is not None else "-",
    }


def _local(utc: str) -> str:
    """`2026-11-25T19:40:05Z` to `25 Nov 20:40`, of this machine's clock."""
    try:
        return datetime.fromisoformat(utc).astimezone().strftime("%d %b %H:%M")
    except ValueError:
        return utc


def _runs_table(runs: Sequence[RunData]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in _figures(run)))
    rows = [
        plain_row(
            (
                f"{letter(i)}  {run.name}",
                run.standing.state,
                f"{run.step:,} of {run.config.max_steps:,}",
                *(_figures(run).get(name, "-") for name in names),
            ),
            frozenset(range(2, 3 + len(names))),
        )
        for i, run in enumerate(runs)
    ]
    return table(("Run", "State", "Steps", *names), rows, frozenset(range(2, 3 + len(names))), wide=True)


def _attention(runs: Sequence[RunData]) -> str:
    parts = []
    for i, run in enumerate(runs):
        found = findings(run)
        body = "".join(_finding(one) for one in found) or f'<p class="good">{NO_SIGN}</p>'
        if not run.metrics.steps and not found:
            body = missing("No step is logged yet: look again after log_every_steps.")
        parts.append(f"<h3>{escape(f'{letter(i)}  {run.name}')}</h3>{body}" if len(runs) > 1 else body)
    return section("attention", "What needs attention", "", "".join(parts))


def _finding(found: Finding) -> str:
    return (
        f'<div class="finding" id="finding-{found.kind}"><b>{escape(found.title)}</b>'
        f"<p>{escape(found.advice)}</p>"
        f"<p><small>{escape(found.where)}, sign <code>{escape(found.kind)}</code></small></p></div>"
    )


def _use(runs: Sequence[RunData]) -> str:
    parts = []
    for i, run in enumerate(runs):
        cells = "".join(
            f"<div><h4>{escape(modality_name(group))}</h4>{use_chart(shares, f'm{k % 6}')}</div>"
            for k, group in enumerate(run.config.groups)
            if (shares := run.use.get(group))
        )
        if cells:
            name = f"<h3>{escape(f'{letter(i)}  {run.name}')}</h3>" if len(runs) > 1 else ""
            parts.append(f'{name}<div class="uses">{cells}</div>')
    lead = (
        "Share of the views of each prototype over the last steps before the newest checkpoint, most used "
        "first; the dashed line is equal use."
    )
    body = "".join(parts) or missing("There is no checkpoint yet to read it from.")
    return section("use", "How the prototypes are used", lead, body)


def _speed(runs: Sequence[RunData]) -> str:
    chart = Chart(
        "speed",
        "Speed and waiting for data",
        "Milliseconds of a step, and of it the wait for its batch. The first row, when all starts, is left "
        "out.",
        (("step_seconds", "Step, ms", 1000.0), ("wait_seconds", "Wait for data, ms", 1000.0)),
        timing=True,
    )
    rows = []
    for i, run in enumerate(runs):
        found = stages(run.recent)
        if found:
            cells = (f"{1000 * found[s]:,.1f}" if s in found else "-" for s in ("read", "decode", "augment"))
            rows.append(plain_row((letter(i) if len(runs) > 1 else "Now", *cells), frozenset((1, 2, 3))))
    more = ""
    if rows:
        head = ("A batch of a rank, ms", "Read", "Decode", "Augment")
        more = table(head, rows, frozenset((1, 2, 3)), wide=False)
    return charts(chart, runs, more)


def _online(runs: Sequence[RunData]) -> str:
    if not any(name.startswith("online/") for run in runs for name in run.metrics.columns):
        return ""
    columns = (("knn_auc", "kNN", 1.0), ("linear_auc", "Linear", 1.0))
    lead = "AUC of frozen features on the val split, while training."
    return charts(Chart("online", "Evaluation during training", lead, columns, prefix="online/"), runs)


def _pictures(data: PageData) -> str:
    found = data.pictures
    parts = []
    if found.views:
        lead = (
            "One image of each modality and all views that the network got of it in its first step, made "
            "again from the dataset: it learns to give all of them the same prototypes."
        )
        parts.append(section("views", "What the network sees", lead, "".join(map(view_figure, found.views))))
    parts += found.sheets
    if found.why:
        parts.append(section("pictures", "Pictures", "", "".join(map(missing, found.why))))
    return "".join(parts)


def _checkpoints(runs: Sequence[RunData]) -> str:
    rows = [
        plain_row(
            (
                f"{letter(i)}  {one.step:,}" if len(runs) > 1 else f"{one.step:,}",
                "-" if one.bytes is None else f"{one.bytes / 1e6:,.1f} MB",
                "-" if one.age_seconds is None else duration(one.age_seconds),
                f"bad: {one.trouble}" if one.trouble else "as its manifest says",
                one.why,
            ),
            frozenset((1, 2)),
        )
        for i, run in enumerate(runs)
        for one in run.checkpoints
    ]
    lead = "Sizes are compared with the manifest; medswav checkpoints verify RUN hashes every file."
    body = table(("Step", "Size", "Age", "State", "Why it is kept"), rows, frozenset((1, 2)), wide=True)
    free = "; ".join(
        f"{f'{letter(i)}: ' if len(runs) > 1 else ''}{run.free_bytes / 1e9:,.1f} GB"
        for i, run in enumerate(runs)
    )
    body = body if rows else missing("There is no checkpoint yet.")
    return section(
        "checkpoints", "Checkpoints", lead, f'{body}<p class="caption">Free on the disk: {free}</p>'
    )


def _events(runs: Sequence[RunData]) -> str:
    parts = [
        (f"<h3>{escape(f'{letter(i)}  {run.name}')}</h3>" if len(runs) > 1 else "") + notice(run.events)
        for i, run in enumerate(runs)
        if run.events
    ]
    lead = "Every alarm that was raised, and those that are over, in their order."
    return section("events", "Alarms over time", lead, "".join(parts)) if parts else ""


def _settings(runs: Sequence[RunData]) -> str:
    parts = []
    if len(runs) > 1:
        parts.append(_differences(runs))
    for i, run in enumerate(runs):
        name = f"{letter(i)}  {run.name}" if len(runs) > 1 else "All settings"
        text = yaml.safe_dump(_tree(run), sort_keys=False, default_flow_style=None, width=96)
        parts.append(f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>")
    return section("settings", "Settings", "", "".join(parts))


def _differences(runs: Sequence[RunData]) -> str:
    flat = [_flat(_tree(run)) for run in runs]
    names = [
        n for n in dict.fromkeys(n for one in flat for n in one) if len({one.get(n) for one in flat}) > 1
    ]
    if not names:
        return "<p>All settings are the same.</p>"
    rows = [plain_row((name, *(one.get(name, "-") for one in flat))) for name in names]
    head = ("Setting", *(letter(i) for i in range(len(runs))))
    return "<h3>What differs</h3>" + table(head, rows, frozenset(), wide=False)


def _tree(run: RunData) -> dict[str, Any]:
    """The settings as plain values; where files lie is nobody else's business."""
    tree: dict[str, Any] = run.config.model_dump(mode="json")
    for part, name in PATHS:
        tree[part].pop(name, None)
    return tree


def _flat(tree: dict[str, Any], start: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{start}{name}.")
        else:
            found[start + name] = str(value)
    return found
