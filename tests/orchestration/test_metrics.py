"""The metric table, what is booked, and the endpoint over real HTTP."""

import json
import re
import socket
import threading
import urllib.request
from pathlib import Path

import pytest

from orchestration.metric_table import METRICS
from orchestration.metrics import ALL, Metrics, observe_not_finite, observe_step
from orchestration.metrics_endpoint import TARGETS_FILE, TARGETS_VARIABLE, endpoint, forget_targets
from shards.errors import UserError
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer.loop import train
from trainer.utilisation import figures, peak_of

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


def test_unequal_parts_of_a_batch_are_counted_as_they_are():
    metrics = Metrics("train")
    observe_step(metrics, STEP | {"samples/ct": 60.0, "samples/xr": 4.0})
    assert metrics.value("medswav_loader_samples_total", modality="ct") == 60
    assert metrics.value("medswav_loader_samples_total", modality="xr") == 4


def test_what_was_not_measured_is_absent_and_not_zero():
    metrics = Metrics("train")
    assert metrics.value("medswav_train_gpu_memory_bytes") is None
    assert metrics.value("medswav_train_checkpoint_timestamp_seconds") > 1e9  # no age since 1970
    observe_step(metrics, STEP | {"gpu_memory_bytes": 5.0, "model_flop_utilisation_ratio": 0.4})
    assert metrics.value("medswav_train_gpu_memory_bytes") == 5
    assert metrics.value("medswav_train_model_flop_utilisation_ratio") == 0.4


def test_utilisation_is_a_share_of_the_peak_at_16_bits():
    peak = peak_of("NVIDIA H100 80GB HBM3", "bf16")
    assert peak == 989e12
    assert figures(1e15, 2.0, peak)["model_flop_utilisation_ratio"] == pytest.approx(0.5e15 / 989e12)
    assert (
        peak_of("NVIDIA H100 PCIe", "fp16") == 756e12 and peak_of("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    )
    assert peak_of("NVIDIA H100 80GB HBM3", "fp32") is None and peak_of("NVIDIA A1000", "bf16") is None
    assert figures(1e15, 2.0, None) == {"model_flop_per_second": 0.5e15}


def test_an_address_of_ipv6_is_served_and_written_as_one(tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with endpoint(Metrics("train"), tmp_path, "pretrain", host="::1") as url:
        assert url.startswith("http://[::1]:") and "medswav_job_failed" in _get(url)
        (entry,) = json.loads((tmp_path / TARGETS_FILE).read_text())
        assert entry["targets"][0].startswith("[::1]:")


def test_a_failed_job_is_seen_by_one_more_scrape_and_waits_for_nobody_else(tmp_path):
    """A run that is not finite ends with it: the NaN has to be scraped once."""
    metrics, seen = Metrics("train"), []

    def ends(scraped: bool) -> None:
        with pytest.raises(RuntimeError), endpoint(metrics, tmp_path, "pretrain") as url:
            if scraped:
                _get(url)
                again = threading.Timer(0.2, lambda: seen.append(_get(url)))
                again.start()
            observe_not_finite(metrics)
            raise RuntimeError

    ends(scraped=True)
    assert "medswav_job_failed 1.0" in seen[0] and 'medswav_train_loss{modality="all"} NaN' in seen[0]
    ends(scraped=False)  # at once: a test that hangs here has waited for a scrape that nobody makes


def test_jobs_are_found_in_one_folder_and_a_killed_one_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv(TARGETS_VARIABLE, str(tmp_path / "targets"))
    with (
        endpoint(Metrics("ingest"), None, "ingest", name="s3://b/one"),
        endpoint(Metrics("train"), tmp_path, "x"),
    ):
        found = sorted((tmp_path / "targets").glob("medswav-*.json"))
        assert [path.name.split("-")[1] for path in found] == ["ingest", "x"]
        left = found[0].read_text()
    assert list((tmp_path / "targets").iterdir()) == []
    found[0].write_text(left)  # as after kill -9
    forget_targets(None, "ingest", "s3://b/one")
    assert not found[0].exists()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


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
