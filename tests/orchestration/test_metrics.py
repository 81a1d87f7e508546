"""The metric table, what is booked, and the endpoint over real HTTP."""

import json
import re
import urllib.request
from pathlib import Path

import pytest

from orchestration.metrics import ALL, METRICS, TARGETS_FILE, Metrics, endpoint, observe_step
from shards.errors import UserError
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer.loop import train

STEP = {
    "step": 9.0,
    "loss": 3.5,
    "loss_minus_ln_k": -0.6,
    "learning_rate": 0.1,
    "step_seconds": 0.5,
    "wait_seconds": 0.1,
    "samples": 64.0,
    "m/ct/loss": 3.4,
    "m/xr/loss": 3.6,
    "m/ct/dead_prototypes": 2.0,
    "m/ct/dead_share": 0.25,
    "m/ct/queue_age_steps": 8.0,
    "m/ct/something_new": 1.0,
    "online/ct/knn_auc": 0.8,
    "online_seconds": 2.0,
    "loader/decode": 0.02,
    "loader/depth": 3.0,
}


def test_names_follow_the_convention():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) >= 20
    for metric in METRICS:
        assert re.fullmatch(r"medswav_[a-z]+(_[a-z]+)+", metric.name), metric.name
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert metric.help
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")


def test_labels_come_from_closed_sets_only():
    allowed = {"modality", "stage", "reason", "outcome", "direction", "version", "sign"}
    assert {label for metric in METRICS for label in metric.labels} <= allowed


def test_a_step_is_booked_per_modality_and_in_sum():
    metrics = Metrics("train")
    observe_step(metrics, STEP)
    observe_step(metrics, STEP | {"step": 10.0})
    assert metrics.value("medswav_train_steps") == 11
    assert metrics.value("medswav_train_loss", modality="ct") == 3.4
    assert metrics.value("medswav_train_loss", modality=ALL) == 3.5
    assert metrics.value("medswav_train_dead_prototypes", modality="ct") == 2
    assert metrics.value("medswav_train_dead_prototypes_ratio", modality="ct") == 0.25
    assert metrics.value("medswav_train_queue_age_steps", modality="ct") == 8
    assert metrics.value("medswav_train_online_knn_auc", modality="ct") == 0.8
    assert metrics.value("medswav_train_online_seconds_count") == 2
    assert metrics.value("medswav_train_samples_total") == 128
    assert metrics.value("medswav_loader_samples_total", modality="xr") == 64
    assert metrics.value("medswav_train_data_wait_ratio") == pytest.approx(0.2)
    assert metrics.value("medswav_train_step_seconds_count") == 2
    assert metrics.value("medswav_loader_stage_seconds_count", stage="decode") == 2
    assert metrics.value("medswav_loader_queue_depth") == 3


def test_every_diagnostic_of_a_step_has_a_metric(tmp_path):
    """Of a real run: a diagnostic that is added to the training is served, too."""
    seen: list[dict[str, float]] = []
    config = tiny(max_steps=4, log_every_steps=3)  # the queue has entries from step 2 on
    train(config, FakeBatches(config), tmp_path, dataset_fingerprint=FINGERPRINT, on_metrics=seen.append)
    names = {name.split("/")[2] for name in seen[-1] if name.startswith("m/xr/")}
    assert len(names) == 13
    metrics = Metrics("train")
    observe_step(metrics, seen[-1])
    served = {m.name: metrics.value(m.name, modality="xr") for m in METRICS if m.labels == ("modality",)}
    values = [value for name, value in served.items() if value is not None and "_train_" in name]
    assert sorted(values) == sorted(seen[-1][f"m/xr/{name}"] for name in names)


def test_two_jobs_in_one_process_do_not_share_a_registry():
    first, second = Metrics("ingest"), Metrics("ingest")
    first.add("medswav_ingest_bytes_total", 5, direction="read")
    assert second.value("medswav_ingest_bytes_total", direction="read") is None


def test_the_endpoint_is_scraped_over_http_and_found_by_its_entry(tmp_path: Path):
    metrics = Metrics("ingest")
    metrics.add("medswav_ingest_files_total", 3, outcome="refused", reason="too_small")
    with endpoint(metrics, tmp_path, "ingest") as url:
        (entry,) = json.loads((tmp_path / TARGETS_FILE).read_text())
        assert url == f"http://{entry['targets'][0]}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    assert 'medswav_ingest_files_total{outcome="refused",reason="too_small"} 3.0' in text
    assert "medswav_train_loss" not in text
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_refused_with_the_fix(tmp_path: Path):
    with endpoint(Metrics("ingest"), None, "ingest") as url:
        port = int(url.split(":")[2].split("/")[0])
        with (
            pytest.raises(UserError, match="another --metrics-port"),
            endpoint(Metrics("train"), tmp_path, "pretrain", port),
        ):
            pass
