"""Recording and alert rules for Prometheus, made from the metric table and a few thresholds.

Each alert says what to do. deploy/monitoring/prometheus/rules_test.yml holds each with promtool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Signs of trainer.alarms that mean that the features or the prototypes collapse.
COLLAPSE = "one_point|one_line|uniform_codes|dead_prototypes"
_DURATION = r"^[0-9]+(ms|s|m|h|d)$"


class Thresholds(BaseModel):
    """What `medswav monitoring --set name=value` changes. Seconds, shares of 1; durations as in "
    "Prometheus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: str = Field(default="5m", pattern=_DURATION, description="over which rates are taken")
    hold: str = Field(default="10m", pattern=_DURATION, description="how long most signs have to last")
    last: str = Field(default="15m", pattern=_DURATION, description="how long an ended job is spoken of")
    stalled_seconds: float = Field(default=1800, gt=0, description="without a commit while units remain")
    quarantine_ratio: float = Field(default=0.5, gt=0, le=1, description="refused inputs")
    data_wait_ratio: float = Field(default=0.2, gt=0, le=1, description="of the step time")
    modality_share: float = Field(default=0.1, gt=0, le=1, description="of an equal share of the images")
    checkpoint_seconds: float = Field(default=7200, gt=0, description="age of the newest checkpoint")
    disk_free_ratio: float = Field(default=0.05, gt=0, le=1, description="of a file system")
    gpu_utilisation_percent: float = Field(default=10, gt=0, le=100, description="of a GPU of a training run")


@dataclass(frozen=True)
class Recording:
    """name: level:metric:operation, as Prometheus recommends."""

    name: str
    expression: str


@dataclass(frozen=True)
class Alert:
    """hold: how long the expression has to hold. severity: page (the job stands, or data is at risk) | "
    "ticket."""

    name: str
    expression: str
    hold: str
    severity: str
    summary: str
    advice: str


def recordings(limits: Thresholds) -> tuple[Recording, ...]:
    window = limits.window
    wait = f"rate(medswav_loader_wait_seconds_sum[{window}])"
    step = f"rate(medswav_train_step_seconds_sum[{window}])"
    return (
        Recording(
            "medswav:ingest_files:rate",
            f"sum without (outcome, reason) (rate(medswav_ingest_files_total[{window}]))",
        ),
        Recording("medswav:ingest_bytes:rate", f"rate(medswav_ingest_bytes_total[{window}])"),
        Recording(
            "medswav:ingest_remaining:seconds",
            "medswav_ingest_units_remaining / (sum without (outcome) "
            f"(rate(medswav_ingest_units_total[{window}])) > 0)",
        ),
        Recording("medswav:train_samples:rate", f"rate(medswav_train_samples_total[{window}])"),
        Recording("medswav:train_data_wait:ratio", f"{wait} / ({step} > 0)"),
        Recording(
            "medswav:train_remaining:seconds",
            "medswav_train_steps_remaining * "
            f"rate(medswav_train_step_seconds_sum[{window}]) / "
            f"(rate(medswav_train_step_seconds_count[{window}]) > 0)",
        ),
        # 1: as many images as the other modalities get, on average.
        Recording(
            "medswav:loader_share:ratio",
            f"rate(medswav_loader_samples_total[{window}]) / on (job, instance) group_left () "
            f"(avg without (modality) (rate(medswav_loader_samples_total[{window}])) > 0)",
        ),
        Recording(
            "medswav:train_checkpoint_age:seconds", "time() - medswav_train_checkpoint_timestamp_seconds"
        ),
        Recording("medswav:output_free:ratio", "medswav_output_free_bytes / medswav_output_size_bytes"),
    )


def alerts(limits: Thresholds) -> tuple[Alert, ...]:
    """The alerts of ops.md section 4, in its order."""
    loss = f"last_over_time(medswav_train_loss[{limits.last}])"
    return (
        Alert(
            "MedswavIngestStalled",
            "medswav_ingest_units_remaining > 0 and "
            f"time() - medswav_ingest_commit_timestamp_seconds > {limits.stalled_seconds:g}",
            "1m",
            "page",
            "ingest has units left and has committed none for {{ $value | humanizeDuration }}",
            "Look at the job's log and at the source (is the PACS export or mount there?). Ctrl-C and "
            "the same "
            "command again lose nothing. A node lost without notice: docs/operations.md, environment of "
            "the nodes.",
        ),
        Alert(
            "MedswavQuarantineRatio",
            f"medswav_ingest_quarantine_ratio > {limits.quarantine_ratio:g}",
            limits.hold,
            "ticket",
            "{{ $value | humanizePercentage }} of the inputs are refused",
            "`ingest quarantine ls DATASET` says why. `modality_out_of_scope` and `duplicate` may be as "
            "they should "
            "be; `crashed` and `decode_failed` are not: `ingest quarantine retry` once the cause is "
            "mended.",
        ),
        Alert(
            "MedswavLoaderStarved",
            f"medswav:train_data_wait:ratio > {limits.data_wait_ratio:g}",
            limits.hold,
            "ticket",
            "the ranks wait for data {{ $value | humanizePercentage }} of their time",
            '`--feeders auto`, more CPUs on the nodes, or `--overflow-feeders N`. Where `stage="read"` '
            "is the slow "
            "stage: `data.node_cache`, `data.read_threads`. See docs/operations.md, the feed.",
        ),
        Alert(
            "MedswavModalityStarved",
            f"medswav:loader_share:ratio < {limits.modality_share:g}",
            limits.hold,
            "ticket",
            "{{ $labels.modality }} gets {{ $value | humanizePercentage }} of an equal share of the images",
            "Equal sampling cannot do this. With another `data.sampling` the rare modality is drowned: "
            "choose "
            "`data.sampling=equal`, or weights; or its images have not been converted yet: `ingest "
            "status`.",
        ),
        Alert(
            "MedswavLossNotFinite",
            f"{loss} != {loss} or abs({loss}) == Inf",
            "0s",
            "page",
            "the loss, or a gradient, of a run was not finite; the run has ended",
            "The job's last line names the step and the last good checkpoint. Start another run folder "
            "with a lower "
            "`optim.learning_rate`, more `optim.warmup_steps` or `precision=fp32`.",
        ),
        Alert(
            "MedswavPrototypeCollapse",
            f'max by (job, instance, modality, sign) (medswav_train_alarm{{sign=~"{COLLAPSE}"}}) > 0',
            limits.hold,
            "ticket",
            "{{ $labels.modality }}: {{ $labels.sign }}",
            "docs/diagnostics.md says what each sign is and what to change.",
        ),
        Alert(
            "MedswavCheckpointTooOld",
            f"medswav:train_checkpoint_age:seconds > {limits.checkpoint_seconds:g}",
            "1m",
            "page",
            "the newest checkpoint is {{ $value | humanizeDuration }} old",
            "`medswav checkpoints ls RUN`, the job's log (`WARNING`: a full disk), free space of the run "
            "folder. "
            "Where steps are slow: a smaller `checkpoint.every_steps` (it may change at the next start).",
        ),
        Alert(
            "MedswavDiskLow",
            f"medswav:output_free:ratio < {limits.disk_free_ratio:g} "
            "or ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage) "
            f"< {limits.disk_free_ratio:g} or medswav_train_checkpoint_failures > 0",
            "1m",
            "page",
            "a disk of {{ $labels.instance }} is nearly full",
            "Free some space: old runs, `checkpoint.keep`, the node cache, Ray's temporary folder. A "
            "full disk costs "
            "a save and not the run, until `checkpoint.full_disk_saves` in a row.",
        ),
        Alert(
            "MedswavObjectStoreSpilling",
            'sum by (instance) (ray_object_store_memory{Location="SPILLED"}) > 0',
            "1m",
            "ticket",
            "the object store of {{ $labels.instance }} spills to disk",
            "Jobs of that node hold more batches than fit: a larger `ray start --object-store-memory`, "
            "fewer "
            "feeders, or fewer jobs on a node. /dev/shm has to be as large.",
        ),
        Alert(
            "MedswavGpuIdle",
            f"avg_over_time(ray_node_gpus_utilization[{limits.last}]) < {limits.gpu_utilisation_percent:g} "
            "and on () (count(medswav_train_gpu_memory_bytes) > 0)",
            limits.hold,
            "ticket",
            "GPU {{ $labels.GpuIndex }} of {{ $labels.instance }} is used {{ $value }} % while a run is "
            "at work",
            "MedswavLoaderStarved at the same time: see there. Else fewer ranks than GPUs, or a rank "
            "that died.",
        ),
        Alert(
            "MedswavJobFailed",
            f'max_over_time(medswav_job_failed[{limits.last}]) > 0 or up{{job="medswav"}} == 0 '
            f'or increase(medswav_ingest_units_total{{outcome="failed"}}[{limits.last}]) > 0 '
            'or kuberay_job_deployment_status{deployment_status="Failed"} > 0',
            "1m",
            "page",
            "a job has failed, was killed, or its machine is gone",
            "The last line of its log says why (`medswav jobs logs RUN`). The same command goes on where "
            "it stood. "
            "A target that stays down after the job was given up: delete its entry in the targets folder.",
        ),
    )


def rules_file(limits: Thresholds) -> dict[str, Any]:
    """The contents of a rules file of Prometheus."""
    return {
        "groups": [
            {"name": "medswav-records", "rules": [_record(one) for one in recordings(limits)]},
            {"name": "medswav-alerts", "rules": [_alert(one) for one in alerts(limits)]},
        ]
    }


def _record(rule: Recording) -> dict[str, Any]:
    return {"record": rule.name, "expr": rule.expression}


def _alert(rule: Alert) -> dict[str, Any]:
    return {
        "alert": rule.name,
        "expr": rule.expression,
        "for": rule.hold,
        "labels": {"severity": rule.severity},
        "annotations": {"summary": rule.summary, "description": rule.advice},
    }


def alert_table(rules: Sequence[Alert]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [f"| `{r.name}` | {r.severity} | {r.hold} | `{r.expression}` | {r.advice} |" for r in rules]
    cells = [
        row.replace("|one_", "\\|one_").replace("|uniform", "\\|uniform").replace("|dead", "\\|dead")
        for row in rows
    ]
    return ["| alert | severity | lasts | when | what to do |", "|---|---|---|---|---|", *cells]
