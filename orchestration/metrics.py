"""The Prometheus metrics of a job: one table, one registry, one HTTP endpoint (ops.md section 4).

Names are `medswav_` + subject + unit, counters end in `_total`, units are base units, and label values come
from closed sets (modality, stage, reason, outcome, direction): never a UID, a path, a patient or a site.
Workers return small statistics with their results; the driver keeps the metrics.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from shards.errors import UserError
from shards.store import clear_errors

if TYPE_CHECKING:
    from trainer.alarms import Watch

Kind = Literal["counter", "gauge", "histogram"]
TARGETS_FILE = "metrics-targets.json"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One row of the table. Dashboards and alert rules are generated from it, so that they cannot drift."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    job: str = "train"  # ingest | train: which dashboard it belongs to


METRICS: tuple[Metric, ...] = (
    Metric("medswav_build_info", "gauge", "1, labelled with the version", ("version",), "both"),
    # ingest
    Metric(
        "medswav_ingest_files_total",
        "counter",
        "samples written and inputs refused (reason `none` for samples)",
        ("outcome", "reason"),
        "ingest",
    ),
    Metric("medswav_ingest_bytes_total", "counter", "bytes read and written", ("direction",), "ingest"),
    Metric(
        "medswav_ingest_stage_seconds",
        "histogram",
        "seconds that one unit spent in a stage",
        ("stage",),
        "ingest",
    ),
    Metric("medswav_ingest_shards_total", "counter", "shards committed", ("modality",), "ingest"),
    Metric("medswav_ingest_units_total", "counter", "units of work by outcome", ("outcome",), "ingest"),
    Metric("medswav_ingest_units_remaining", "gauge", "units of work not yet committed", (), "ingest"),
    Metric("medswav_ingest_quarantine_ratio", "gauge", "refused inputs / inputs", (), "ingest"),
    Metric(
        "medswav_ingest_commit_timestamp_seconds", "gauge", "Unix time of the newest commit", (), "ingest"
    ),
    # loader
    Metric("medswav_loader_samples_total", "counter", "images that the ranks received", ("modality",)),
    Metric("medswav_loader_wait_seconds", "histogram", "seconds that a rank waited for one batch"),
    Metric("medswav_loader_stage_seconds", "histogram", "seconds of one batch in a stage", ("stage",)),
    Metric("medswav_loader_batch_requests", "gauge", "reads that the last logged batch asked of the store"),
    Metric("medswav_loader_batch_store_bytes", "gauge", "bytes that it read of the store"),
    Metric(
        "medswav_loader_batch_cached_samples",
        "gauge",
        "samples that it found in the node cache, and not (outcome)",
        ("outcome",),
    ),
    Metric("medswav_loader_queue_depth", "gauge", "batches ready or in the making ahead of a rank"),
    Metric("medswav_loader_feeders", "gauge", "actors or processes that make the batches of rank 0"),
    # training
    Metric("medswav_train_steps", "gauge", "optimizer steps done"),
    Metric("medswav_train_step_seconds", "histogram", "seconds of one optimizer step, waiting included"),
    Metric("medswav_train_samples_total", "counter", "images trained on, all ranks"),
    Metric("medswav_train_loss", "gauge", "swapped-prediction loss", ("modality",)),
    Metric("medswav_train_loss_minus_ln_k", "gauge", "loss less ln K; 0: nothing learned", ("modality",)),
    Metric(
        "medswav_train_loss_minus_chance",
        "gauge",
        "the same of SimCLR, whose chance is ln(2N - 1)",
        ("modality",),
    ),
    Metric("medswav_train_loss_supervised", "gauge", "hybrid: sum over the label tables, without beta"),
    Metric("medswav_train_target_entropy", "gauge", "entropy of the codes in nats", ("modality",)),
    Metric("medswav_train_target_perplexity", "gauge", "exp of the entropy of the codes", ("modality",)),
    Metric("medswav_train_prediction_entropy", "gauge", "entropy of the predictions in nats", ("modality",)),
    Metric(
        "medswav_train_effective_prototypes", "gauge", "exp of the entropy of prototype use", ("modality",)
    ),
    Metric("medswav_train_dead_prototypes", "gauge", "prototypes hardly used of late", ("modality",)),
    Metric("medswav_train_dead_prototypes_ratio", "gauge", "share of the prototypes", ("modality",)),
    Metric(
        "medswav_train_feature_std", "gauge", "mean standard deviation of the unit features", ("modality",)
    ),
    Metric("medswav_train_effective_rank", "gauge", "effective rank of the features", ("modality",)),
    Metric("medswav_train_queue_fill_ratio", "gauge", "share of the queue that is filled", ("modality",)),
    Metric("medswav_train_queue_age_steps", "gauge", "mean age of the queue's entries", ("modality",)),
    Metric("medswav_train_queue_oldest_steps", "gauge", "age of the queue's oldest entry", ("modality",)),
    Metric("medswav_train_online_knn_auc", "gauge", "AUC of kNN on the val split", ("modality",)),
    Metric("medswav_train_online_linear_auc", "gauge", "AUC of a linear probe on it", ("modality",)),
    Metric("medswav_train_online_seconds", "histogram", "seconds of one evaluation during training"),
    Metric(
        "medswav_train_alarm",
        "gauge",
        "1 while this sign of a run that goes wrong is there (trainer.alarms)",
        ("modality", "sign"),
    ),
    Metric("medswav_train_learning_rate", "gauge", "learning rate of the step"),
    Metric("medswav_train_data_wait_ratio", "gauge", "share of the step time spent waiting for data"),
    Metric("medswav_train_gpu_memory_bytes", "gauge", "peak memory that torch allocated on the GPU, rank 0"),
    Metric("medswav_train_checkpoint_seconds", "histogram", "seconds until a checkpoint was verified"),
    Metric("medswav_train_checkpoint_blocked_seconds", "histogram", "seconds that training waited for one"),
    Metric("medswav_train_checkpoint_failures", "gauge", "saves in a row that found the disk full"),
    Metric("medswav_train_checkpoint_timestamp_seconds", "gauge", "Unix time of the newest checkpoint"),
    Metric("medswav_train_restarts_total", "counter", "restarts of the ranks after a failure"),
)

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
        self._by_name = {m.name: self._make(m) for m in METRICS if m.job in (job, "both")}
        self.set("medswav_build_info", 1, version=_version())

    def _make(self, metric: Metric) -> Any:
        if metric.kind == "histogram":
            return Histogram(
                metric.name, metric.help, metric.labels, registry=self.registry, buckets=_SECONDS
            )
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(metric.name, metric.help, metric.labels, registry=self.registry)

    def _child(self, name: str, labels: Mapping[str, str]) -> Any:
        metric = self._by_name[name]
        return metric.labels(**labels) if labels else metric

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        self._child(name, labels).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._child(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._child(name, labels).observe(value)

    def value(self, name: str, **labels: str) -> float | None:
        """One sample's value (a counter's `_total`, a histogram's `_count` by that name); None: not there."""
        return self.registry.get_sample_value(name, labels)


def observe_step(metrics: Metrics, step: Mapping[str, float]) -> None:
    """Book what `trainer.loop` reports of a logged step: flat keys, per modality `m/<modality>/<name>`."""
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
        for modality in modalities:  # equal subsets
            metrics.add("medswav_loader_samples_total", step["samples"] / len(modalities), modality=modality)
    if "gpu_memory_bytes" in step:
        metrics.set("medswav_train_gpu_memory_bytes", step["gpu_memory_bytes"])
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
        elif kind == "loader" and name == "depth":
            metrics.set("medswav_loader_queue_depth", value)
        elif kind == "loader" and name == "feeders":
            metrics.set("medswav_loader_feeders", value)


def observe_alarms(metrics: Metrics, watch: "Watch") -> None:
    """Every sign of every modality, so that what is over reads 0."""
    from trainer.alarms import SIGNS

    active = {(alarm.modality, alarm.sign) for alarm in watch.active}
    for modality in watch.config.groups:
        for sign in SIGNS:
            there = float((modality, sign) in active)
            metrics.set("medswav_train_alarm", there, modality=modality, sign=sign)


@contextlib.contextmanager
def endpoint(
    metrics: Metrics,
    folder: Path | None,
    job: str,
    port: int = 0,
    host: str = "127.0.0.1",
) -> Iterator[str]:
    """Serve /metrics while the body runs; yields the URL. `port` 0: a free one.

    `folder`/metrics-targets.json is the file-based service discovery entry of Prometheus; it goes when the
    job ends. Raises UserError when the port is taken.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except OSError:
        raise UserError(
            f"port {port} on {host} is not free for the metrics: give another --metrics-port, or 0 for any"
        ) from None
    actual = server.server_port
    reachable = socket.gethostname() if host in ("0.0.0.0", "::") else host
    entry = folder / TARGETS_FILE if folder is not None else None
    try:
        if entry is not None:
            _write_targets(entry, f"{reachable}:{actual}", job)
        yield f"http://{reachable}:{actual}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
        if entry is not None:
            entry.unlink(missing_ok=True)


def _write_targets(entry: Path, target: str, job: str) -> None:
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}")
    with clear_errors(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([{"targets": [target], "labels": {"job": "medswav", "task": job}}]))
        temporary.replace(entry)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("medswav")
    except PackageNotFoundError:
        return "unknown"
