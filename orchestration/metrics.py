"""The metrics of a job: a registry made from the one table (metric_table), and what is booked in it.

Workers return small statistics with their results; the driver keeps the metrics and serves them
(metrics_endpoint).
"""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from orchestration.metric_table import Metric, metrics_of

if TYPE_CHECKING:
    from trainer.alarms import Watch

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
DISK_SECONDS = 10.0  # between two looks at the space: a network file system answers slowly

# Values of the modality label that stand for the whole batch.
ALL = "all"
# What train_step calls a diagnostic of a modality: the metric's name behind medswav_train_.
_PER_MODALITY = {
    "loss": "loss",
    "loss_minus_ln_k": "loss_minus_ln_k",
    "loss_minus_chance": "loss_minus_chance",
    "target_entropy": "target_entropy",
    "target_perplexity": "target_perplexity",
    "prediction_entropy": "prediction_entropy",
    "effective_prototypes": "effective_prototypes",
    "dead_prototypes": "dead_prototypes",
    "dead_share": "dead_prototypes_ratio",
    "feature_std": "feature_std",
    "effective_rank": "effective_rank",
    "queue_fill": "queue_fill_ratio",
    "queue_age_steps": "queue_age_steps",
    "queue_oldest_steps": "queue_oldest_steps",
}


class Metrics:
    """The metrics of one job in a registry of their own. `job`: ingest | train."""

    def __init__(self, job: str) -> None:
        self.registry = CollectorRegistry()
        self._rows = {metric.name: metric for metric in metrics_of(job)}
        # A gauge is there from its first value on: nothing that was not measured reads 0.
        self._by_name = {m.name: self._make(m) for m in self._rows.values() if m.kind != "gauge"}
        self._looked = 0.0
        self.set("medswav_build_info", 1, version=_version())
        self.set("medswav_job_start_timestamp_seconds", time.time())
        self.set("medswav_job_failed", 0)
        if job == "ingest":
            self.set("medswav_ingest_commit_timestamp_seconds", time.time())
        else:
            self.set("medswav_train_checkpoint_timestamp_seconds", time.time())

    def _make(self, metric: Metric) -> Any:
        if metric.kind == "histogram":
            return Histogram(
                metric.name, metric.help, metric.labels, registry=self.registry, buckets=_SECONDS
            )
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(metric.name, metric.help, metric.labels, registry=self.registry)

    def _child(self, name: str, labels: Mapping[str, str]) -> Any:
        if name not in self._by_name:
            self._by_name[name] = self._make(self._rows[name])
        metric = self._by_name[name]
        return metric.labels(**labels) if labels else metric

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        self._child(name, labels).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._child(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._child(name, labels).observe(value)

    def look_at_disk(self, folder: Path | None) -> None:
        """Free space of the file system of `folder`, if it is one and the last look was a while ago."""
        if folder is None or time.monotonic() - self._looked < DISK_SECONDS:
            return
        try:
            found = os.statvfs(folder)
        except OSError:  # it tells nothing now; what writes there will say why
            return
        self._looked = time.monotonic()
        self.set("medswav_output_free_bytes", found.f_bavail * found.f_frsize)
        self.set("medswav_output_size_bytes", found.f_blocks * found.f_frsize)

    def value(self, name: str, **labels: str) -> float | None:
        """One sample's value (a counter's `_total`, a histogram's `_count` by that name); None: not there."""
        return self.registry.get_sample_value(name, labels)


def observe_step(metrics: Metrics, step: Mapping[str, float]) -> None:
    """Book what `trainer.loop` reports of a logged step: flat keys, per modality `m/<modality>/<name>`.

    samples/<modality>: images since the last report, where the parts of the batch are not equal.
    """
    modalities = {key.split("/")[1] for key in step if key.startswith("m/")}
    for key, value in step.items():
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == "m" and parts[2] in _PER_MODALITY:
            metrics.set(f"medswav_train_{_PER_MODALITY[parts[2]]}", value, modality=parts[1])
        if len(parts) == 3 and parts[0] == "online" and parts[2] in ("knn_auc", "linear_auc"):
            metrics.set(f"medswav_train_online_{parts[2]}", value, modality=parts[1])
    for name in ("loss", "loss_minus_ln_k", "loss_minus_chance"):
        if name in step:
            metrics.set(f"medswav_train_{name}", step[name], modality=ALL)
    supervised = [value for key, value in step.items() if key.startswith("loss_supervised/")]
    if supervised:
        metrics.set("medswav_train_loss_supervised", sum(supervised))
    if "learning_rate" in step:
        metrics.set("medswav_train_learning_rate", step["learning_rate"])
    if "step" in step:
        metrics.set("medswav_train_steps", step["step"] + 1)  # `step` counts from 0
    seconds, wait = step.get("step_seconds", 0.0), step.get("wait_seconds", 0.0)
    if "step_seconds" in step:
        metrics.observe("medswav_train_step_seconds", seconds)
    if "wait_seconds" in step:
        metrics.observe("medswav_loader_wait_seconds", wait)
        metrics.set("medswav_train_data_wait_ratio", wait / seconds if seconds > 0 else 0.0)
    if "samples" in step:
        metrics.add("medswav_train_samples_total", step["samples"])
        equal = {name: step["samples"] / len(modalities) for name in modalities}
        counted = {key.split("/")[1]: n for key, n in step.items() if key.startswith("samples/")}
        for modality, number in (counted or equal).items():
            metrics.add("medswav_loader_samples_total", number, modality=modality)
    for name in ("gpu_memory_bytes", "model_flop_per_second", "model_flop_utilisation_ratio"):
        if name in step:
            metrics.set(f"medswav_train_{name}", step[name])
    if "online_seconds" in step:
        metrics.observe("medswav_train_online_seconds", step["online_seconds"])
    for name in ("checkpoint_seconds", "checkpoint_blocked_seconds"):
        if name in step:
            metrics.observe(f"medswav_train_{name}", step[name])
    if "checkpoint_failures" in step:
        metrics.set("medswav_train_checkpoint_failures", step["checkpoint_failures"])
    for key, value in step.items():
        kind, _, name = key.partition("/")
        if kind == "loader" and name in ("read", "decode", "augment"):
            metrics.observe("medswav_loader_stage_seconds", value, stage=name)
        elif kind == "loader" and name in ("requests", "store_bytes"):
            metrics.set(f"medswav_loader_batch_{name}", value)
        elif kind == "loader" and name in ("cache_hits", "cache_misses"):
            outcome = "hit" if name == "cache_hits" else "miss"
            metrics.set("medswav_loader_batch_cached_samples", value, outcome=outcome)
        elif kind == "loader" and name == "cache_bytes":
            metrics.set("medswav_loader_cache_bytes", value)
        elif kind == "loader" and name == "depth":
            metrics.set("medswav_loader_queue_depth", value)
        elif kind == "loader" and name == "feeders":
            metrics.set("medswav_loader_feeders", value)


def observe_not_finite(metrics: Metrics) -> None:
    """The step that ends a run reports no loss; for the last scrape it is the NaN that it was."""
    metrics.set("medswav_train_loss", math.nan, modality=ALL)


def observe_alarms(metrics: Metrics, watch: "Watch") -> None:
    """Every sign of every modality, so that what is over reads 0."""
    from trainer.alarms import SIGNS

    active = {(alarm.modality, alarm.sign) for alarm in watch.active}
    for modality in watch.config.groups:
        for sign in SIGNS:
            there = float((modality, sign) in active)
            metrics.set("medswav_train_alarm", there, modality=modality, sign=sign)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("medswav")
    except PackageNotFoundError:
        return "unknown"
