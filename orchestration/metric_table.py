"""Every metric of medswav, in one table (ops.md section 4): the registry, docs/metrics.md, the dashboards and
the alert rules are made from it, so that they cannot drift.

Names are `medswav_` + subject + unit, counters end in `_total`, units are base units, and label values come
from closed sets (modality, stage, reason, outcome, direction, sign): never a UID, a path, a patient or
a site.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Job = Literal["ingest", "train", "both"]


@dataclass(frozen=True)
class Metric:
    """One row of the table. job: which endpoint has it, and which dashboard. when: what it needs, beside a
    job that works; empty: it is there in every such job once the first unit, or a logged step, is done."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    job: Job = "train"
    when: str = ""

    @property
    def subject(self) -> str:
        """ingest, loader, train ...: the part behind medswav_."""
        return self.name.split("_")[1]


_MODALITY = ("modality",)
FOLDER = "the output is a folder, not a bucket"
QUEUE = "a queue (swav.queue_length), once it has entries"
_ONLINE = "evaluation during training (online)"
SWAV = "method=swav"
_SIMCLR = "method=simclr"
_HYBRID = "label tables (supervision.labels)"
_GPU = "ranks on GPUs"

_BOTH: tuple[Metric, ...] = (
    Metric("medswav_build_info", "gauge", "1, labelled with the version", ("version",), "both"),
    Metric("medswav_job_start_timestamp_seconds", "gauge", "Unix time of the job's start", (), "both"),
    Metric("medswav_job_failed", "gauge", "1 when the job has failed; it ends after one scrape", (), "both"),
    Metric("medswav_output_free_bytes", "gauge", "free where the job writes to", (), "both", FOLDER),
    Metric("medswav_output_size_bytes", "gauge", "size of that file system", (), "both", FOLDER),
)

_INGEST: tuple[Metric, ...] = (
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
    Metric("medswav_ingest_shards_total", "counter", "shards committed", _MODALITY, "ingest"),
    Metric("medswav_ingest_units_total", "counter", "units of work by outcome", ("outcome",), "ingest"),
    Metric("medswav_ingest_units_remaining", "gauge", "units of work not yet committed", (), "ingest"),
    Metric("medswav_ingest_quarantine_ratio", "gauge", "refused inputs / inputs", (), "ingest"),
    Metric(
        "medswav_ingest_commit_timestamp_seconds",
        "gauge",
        "Unix time of the newest commit; until there is one, of the start",
        (),
        "ingest",
    ),
)

_LOADER: tuple[Metric, ...] = (
    Metric("medswav_loader_samples_total", "counter", "images that the ranks received", _MODALITY),
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
    Metric("medswav_loader_cache_bytes", "gauge", "decoded images kept in memory by one maker of batches"),
    Metric("medswav_loader_queue_depth", "gauge", "batches ready or in the making ahead of a rank"),
    Metric("medswav_loader_feeders", "gauge", "actors or processes that make the batches of rank 0"),
)

_TRAIN: tuple[Metric, ...] = (
    Metric("medswav_train_steps", "gauge", "optimizer steps done"),
    Metric("medswav_train_steps_remaining", "gauge", "optimizer steps to max_steps"),
    Metric("medswav_train_ranks", "gauge", "ranks at work"),
    Metric("medswav_train_step_seconds", "histogram", "seconds of one optimizer step, waiting included"),
    Metric("medswav_train_samples_total", "counter", "images trained on, all ranks"),
    Metric(
        "medswav_train_loss",
        "gauge",
        "swapped-prediction loss; NaN when the run ends since it, or a gradient, is not finite",
        _MODALITY,
    ),
    Metric(
        "medswav_train_loss_minus_ln_k",
        "gauge",
        "loss less ln K; 0: nothing learned",
        _MODALITY,
        when=SWAV,
    ),
    Metric(
        "medswav_train_loss_minus_chance",
        "gauge",
        "the same of SimCLR, whose chance is ln(2N - 1)",
        _MODALITY,
        when=_SIMCLR,
    ),
    Metric(
        "medswav_train_loss_supervised",
        "gauge",
        "hybrid: sum over the label tables, without beta",
        when=_HYBRID,
    ),
    Metric("medswav_train_target_entropy", "gauge", "entropy of the codes in nats", _MODALITY, when=SWAV),
    Metric(
        "medswav_train_target_perplexity",
        "gauge",
        "exp of the entropy of the codes",
        _MODALITY,
        when=SWAV,
    ),
    Metric(
        "medswav_train_prediction_entropy",
        "gauge",
        "entropy of the predictions in nats",
        _MODALITY,
        when=SWAV,
    ),
    Metric(
        "medswav_train_effective_prototypes",
        "gauge",
        "exp of the entropy of prototype use",
        _MODALITY,
        when=SWAV,
    ),
    Metric(
        "medswav_train_dead_prototypes",
        "gauge",
        "prototypes hardly used of late",
        _MODALITY,
        when=SWAV,
    ),
    Metric(
        "medswav_train_dead_prototypes_ratio",
        "gauge",
        "share of the prototypes",
        _MODALITY,
        when=SWAV,
    ),
    Metric("medswav_train_feature_std", "gauge", "mean standard deviation of the unit features", _MODALITY),
    Metric("medswav_train_effective_rank", "gauge", "effective rank of the features", _MODALITY),
    Metric(
        "medswav_train_queue_fill_ratio", "gauge", "share of the queue that is filled", _MODALITY, when=QUEUE
    ),
    Metric(
        "medswav_train_queue_age_steps", "gauge", "mean age of the queue's entries", _MODALITY, when=QUEUE
    ),
    Metric(
        "medswav_train_queue_oldest_steps", "gauge", "age of the queue's oldest entry", _MODALITY, when=QUEUE
    ),
    Metric("medswav_train_online_knn_auc", "gauge", "AUC of kNN on the val split", _MODALITY, when=_ONLINE),
    Metric(
        "medswav_train_online_linear_auc", "gauge", "AUC of a linear probe on it", _MODALITY, when=_ONLINE
    ),
    Metric("medswav_train_online_seconds", "histogram", "seconds of one evaluation during training"),
    Metric(
        "medswav_train_alarm",
        "gauge",
        "1 while this sign of a run that goes wrong is there (docs/diagnostics.md)",
        ("modality", "sign"),
    ),
    Metric("medswav_train_learning_rate", "gauge", "learning rate of the step"),
    Metric("medswav_train_data_wait_ratio", "gauge", "share of the step time spent waiting for data"),
    Metric(
        "medswav_train_model_flop_per_second",
        "gauge",
        "operations of the network's forward and backward, by rank 0 (a product and its sum are two)",
        when=_GPU + " and a backbone of ours",
    ),
    Metric(
        "medswav_train_model_flop_utilisation_ratio",
        "gauge",
        "the same as a share of the GPU's peak at this precision (MFU)",
        when=_GPU + " of a known peak and a backbone of ours",
    ),
    Metric(
        "medswav_train_gpu_memory_bytes",
        "gauge",
        "peak memory that torch allocated on the GPU, rank 0",
        when=_GPU,
    ),
    Metric("medswav_train_checkpoint_seconds", "histogram", "seconds until a checkpoint was verified"),
    Metric("medswav_train_checkpoint_blocked_seconds", "histogram", "seconds that training waited for one"),
    Metric("medswav_train_checkpoint_failures", "gauge", "saves in a row that found the disk full"),
    Metric(
        "medswav_train_checkpoint_timestamp_seconds",
        "gauge",
        "Unix time of the newest checkpoint; until there is one, of the start",
    ),
    Metric("medswav_train_restarts_total", "counter", "restarts of the ranks after a failure"),
)

METRICS: tuple[Metric, ...] = _BOTH + _INGEST + _LOADER + _TRAIN


def metrics_of(job: str) -> tuple[Metric, ...]:
    """The rows that the endpoint of `job` (ingest | train) has."""
    return tuple(metric for metric in METRICS if metric.job in (job, "both"))


def series(metric: Metric) -> str:
    """The name under which a sample of it is found in Prometheus."""
    return f"{metric.name}_count" if metric.kind == "histogram" else metric.name
