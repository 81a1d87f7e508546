"""The two Grafana dashboards, ingest and pretraining: a few panels of the rules, then one for each metric.

Made from the metric table, so that no panel asks for a metric that is not there and none is forgotten. The
JSON is Grafana's own (schema version 39); Ray's dashboards cover the cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.metric_table import Metric, metrics_of

WIDTH, PANEL, HEIGHT = 24, 8, 8
TITLES = {"ingest": "medswav ingest", "train": "medswav pretraining"}
_SUBJECTS = {
    "ingest": "Units, files, stages",
    "loader": "Batches: the feed of rank 0",
    "train": "Training",
    "output": "Disk",
    "job": "Jobs",
    "build": "Jobs",
}
_LABEL_HIDDEN = ("version",)
_UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit", "second": "flops"}


@dataclass(frozen=True)
class Panel:
    """queries: (PromQL, legend). unit: Grafana's name of it."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str
    help: str = ""


SUMMARY: dict[str, tuple[Panel, ...]] = {
    "ingest": (
        Panel("Files per second", (("medswav:ingest_files:rate{SEL}", "{{instance}}"),), "ops"),
        Panel("Bytes per second", (("medswav:ingest_bytes:rate{SEL}", "{{direction}}"),), "Bps"),
        Panel("Time left", (("medswav:ingest_remaining:seconds{SEL}", "{{instance}}"),), "s"),
    ),
    "train": (
        Panel("Images per second", (("medswav:train_samples:rate{SEL}", "{{instance}}"),), "ops"),
        Panel(
            "Waiting for data",
            (("medswav:train_data_wait:ratio{SEL}", "{{instance}}"),),
            "percentunit",
            "share of the step time over the rules' window",
        ),
        Panel("Time left", (("medswav:train_remaining:seconds{SEL}", "{{instance}}"),), "s"),
        Panel(
            "Age of the newest checkpoint",
            (("medswav:train_checkpoint_age:seconds{SEL}", "{{instance}}"),),
            "s",
        ),
        Panel("Share of each modality", (("medswav:loader_share:ratio{SEL}", "{{modality}}"),), "short"),
        Panel("Restarts of the ranks", (("medswav_train_restarts_total{SEL}", "{{instance}}"),), "short"),
    ),
}
_SELECTOR = '{job=~"$job",instance=~"$instance"}'


def dashboard(job: str) -> dict[str, Any]:
    """job: ingest | train."""
    panels = [_row("Overview", 0)]
    y = _place(panels, [_free(panel) for panel in SUMMARY[job]], 1)
    metrics = metrics_of(job)
    for title in dict.fromkeys(_SUBJECTS[m.subject] for m in metrics):
        panels.append(_row(title, y))
        of_row = [panel_of(m) for m in metrics if _SUBJECTS[m.subject] == title]
        y = _place(panels, [_free(panel) for panel in of_row], y + 1)
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "uid": f"medswav-{'ingest' if job == 'ingest' else 'pretraining'}",
        "title": TITLES[job],
        "tags": ["medswav"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables(job)},
        "annotations": {"list": [_alerts_annotation()]},
        "panels": panels,
    }


def panel_of(metric: Metric) -> Panel:
    """Counters as rates, histograms as median and 95th percentile, times of events as ages."""
    labels = [label for label in metric.labels if label not in _LABEL_HIDDEN]
    legend = " ".join(f"{{{{{label}}}}}" for label in labels) or "{{instance}}"
    unit = _UNITS.get(metric.name.rsplit("_", 1)[-1], "short")
    help_text = f"{metric.name}: {metric.help}" + (f" (needs: {metric.when})" if metric.when else "")
    title = _title(metric)
    if metric.kind == "counter":
        rate_unit = "Bps" if "_bytes_" in metric.name else "ops"
        query = f"rate({metric.name}{{SEL}}[$__rate_interval])"
        return Panel(f"{title} per second", ((query, legend),), rate_unit, help_text)
    if metric.kind == "histogram":
        by = ", ".join(["le", *labels])
        buckets = f"sum by ({by}) (rate({metric.name}_bucket{{SEL}}[$__rate_interval]))"
        queries = tuple(
            (f"histogram_quantile({q}, {buckets})", f"{legend if labels else ''} {name}".strip())
            for q, name in ((0.5, "median"), (0.95, "95 %"))
        )
        return Panel(title, queries, "s", help_text)
    if metric.name.endswith("_timestamp_seconds"):
        age = f"time() - {metric.name}{{SEL}}"
        return Panel(f"{title.removesuffix(' timestamp')}: time since", ((age, legend),), "s", help_text)
    if metric.name == "medswav_build_info":
        legend = "{{instance}} {{version}}"
    return Panel(title, ((f"{metric.name}{{SEL}}", legend),), unit, help_text)


def panels_of(job: str) -> list[Panel]:
    """Every panel of a dashboard, in its order."""
    return [*SUMMARY[job], *(panel_of(metric) for metric in metrics_of(job))]


def expressions(job: str) -> list[str]:
    """Every query of a dashboard as Prometheus takes it: variables filled in."""
    queries = [query for panel in panels_of(job) for query, _ in panel.queries]
    return [q.replace("{SEL}", "").replace("$__rate_interval", "5m") for q in queries]


def _title(metric: Metric) -> str:
    words = metric.name.removeprefix("medswav_").removesuffix("_total").removesuffix("_seconds").split("_")
    if words[0] in ("ingest", "train", "loader"):
        words = words[1:]
    return " ".join(words).capitalize()


def _free(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "custom": {"lineWidth": 1, "fillOpacity": 0, "showPoints": "auto"},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "expr": query.replace("{SEL}", _SELECTOR),
                "legendFormat": legend,
            }
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


def _place(panels: list[dict[str, Any]], new: Sequence[dict[str, Any]], y: int) -> int:
    """Three in a row from `y` on; the y behind them."""
    columns = WIDTH // PANEL
    for number, panel in enumerate(new):
        place = {"x": PANEL * (number % columns), "y": y + HEIGHT * (number // columns)}
        panels.append({**panel, "gridPos": {**place, "w": PANEL, "h": HEIGHT}})
    return y + HEIGHT * -(-len(new) // columns)


def _row(title: str, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place}


def _variables(job: str) -> list[dict[str, Any]]:
    known = "medswav_ingest_units_remaining" if job == "ingest" else "medswav_train_steps"
    source = {"type": "prometheus", "uid": "${datasource}"}
    queries = {
        "job": f"label_values({known}, job)",
        "instance": f'label_values({known}{{job=~"$job"}}, instance)',
    }
    chosen = [
        {
            "name": name,
            "type": "query",
            "datasource": source,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        }
        for name, query in queries.items()
    ]
    return [{"name": "datasource", "type": "datasource", "query": "prometheus"}, *chosen]


def _alerts_annotation() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Medswav.*",alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{modality}} {{instance}}",
    }
