"""The dashboards as pictures, from a running Prometheus: the queries of Grafana, where there is none."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestration.dashboards import TITLES, Panel, panels_of
from shards.errors import UserError

COLUMNS, POINTS = 4, 120
_UNITS = {
    "s": "s",
    "bytes": "bytes",
    "Bps": "bytes/s",
    "ops": "1/s",
    "percentunit": "share",
    "flops": "FLOP/s",
}
Curve = tuple[str, list[float], list[float]]  # legend, seconds before now (negative), values


def write_pictures(url: str, folder: Path, minutes: float) -> list[Path]:
    """DIR/medswav-ingest.png and DIR/medswav-pretraining.png of the last `minutes`; those without a single
    sample are left out. Raises UserError when no Prometheus answers."""
    end = time.time()
    written = []
    for job, name in (("ingest", "medswav-ingest"), ("train", "medswav-pretraining")):
        task = "ingest" if job == "ingest" else "pretrain"
        found = [(panel, _curves(url, panel, task, end, 60 * minutes)) for panel in panels_of(job)]
        shown = [(panel, curves) for panel, curves in found if curves]
        if shown:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{name}.png")
            _draw(shown, TITLES[job], written[-1])
    if not written:
        raise UserError(f"{url} has no sample of medswav of the last {minutes:g} minutes: is it scraping?")
    return written


def _curves(url: str, panel: Panel, task: str, end: float, seconds: float) -> list[Curve]:
    found: list[Curve] = []
    for query, legend in panel.queries:
        asked = query.replace("{SEL}", f'{{task="{task}"}}').replace(
            "$__rate_interval", f"{max(seconds / 30, 15):.0f}s"
        )
        arguments = {"query": asked, "start": end - seconds, "end": end, "step": seconds / POINTS}
        for one in ask(url, "query_range", **arguments)["result"]:
            points = [(float(at) - end, float(value)) for at, value in one["values"]]
            times, values = [at for at, _ in points], [value for _, value in points]
            found.append((_filled(legend, one["metric"]), times, values))
    return found


def ask(url: str, path: str, **arguments: Any) -> Any:
    """`data` of an answer of Prometheus' HTTP API. Raises UserError."""
    whole = f"{url.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
    if not whole.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address of a Prometheus: give http://HOST:9090")
    try:
        with urllib.request.urlopen(whole, timeout=30) as response:
            return json.load(response)["data"]
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        raise UserError(f"no Prometheus answers at {url} ({type(error).__name__})") from None


def _filled(legend: str, labels: Mapping[str, str]) -> str:
    for name in ("instance", "version", *labels):
        legend = legend.replace(f"{{{{{name}}}}}", labels.get(name, ""))
    return legend.strip()


def _draw(panels: list[tuple[Panel, list[Curve]]], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.5 * rows + 0.5), layout="constrained", dpi=70)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (panel, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        for legend, times, values in curves:
            axes.plot([at / 60 for at in times], values, linewidth=1, marker=".", markersize=2, label=legend)
        axes.set_title(panel.title, fontsize=9)
        axes.set_ylabel(_UNITS.get(panel.unit, ""), fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(visible=True, alpha=0.3)
        if 1 <= len(curves) <= 8:
            axes.legend(fontsize=6, loc="best")
    figure.supxlabel("minutes before now", fontsize=8)
    figure.savefig(path)
