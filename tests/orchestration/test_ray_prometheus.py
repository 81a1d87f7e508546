"""A real Prometheus scrapes a running ingest and a running pretraining on a Ray cluster with its token on."""

import json
import math
import shutil
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.alert_rules import Thresholds, rules_file
from orchestration.metric_table import FOLDER, QUEUE, SWAV, metrics_of, series
from orchestration.metrics_endpoint import TARGETS_VARIABLE
from tests.batches.make import dataset
from tests.orchestration import jobs
from tests.orchestration.conftest import free_ports
from tests.orchestration.test_ray_pretrain import MEDSWAV, arguments

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not here: apt-get install prometheus"
    ),
]
# As deployed, but for the times.
QUICK = Thresholds(window="10s", hold="0s")
STARVED_SECONDS = 4.0
THERE = ("", FOLDER, SWAV, QUEUE)  # what the two jobs below have of what a metric may need


class Prometheus:
    """Questions to a running server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **arguments: str) -> Any:
        with urllib.request.urlopen(
            f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}", timeout=10
        ) as response:
            return json.load(response)["data"]

    def names(self, task: str) -> set[str]:
        """Of every series that it has ever had of a task, also of one that has ended."""
        return set(self.ask("label/__name__/values", **{"match[]": f'{{job="medswav",task="{task}"}}'}))

    def value(self, query: str) -> float:
        """Of the one sample that it gives; nan: none."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else math.nan

    def is_up(self) -> bool:
        try:
            self.ask("status/buildinfo")
        except OSError:
            return False
        return True

    def firing(self, name: str) -> list[dict[str, Any]]:
        found = [alert for alert in self.ask("alerts")["alerts"] if alert["labels"]["alertname"] == name]
        return [alert for alert in found if alert["state"] == "firing"]


@pytest.fixture
def prometheus(ray_cluster, tmp_path) -> Iterator[Prometheus]:
    """The deployed configuration with other paths and times, and with the same rules."""
    deployed = Path(__file__).parents[2] / "deploy/monitoring/prometheus/prometheus.yml"
    config = yaml.safe_load(deployed.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(tmp_path / "rules.yml")]
    folders = {"/targets": str(tmp_path / "targets"), "/ray": ray_cluster.env["TMPDIR"]}
    for scraped in config["scrape_configs"]:
        (one,) = scraped["file_sd_configs"]
        (pattern,) = one["files"]
        folder, _, name = pattern.rpartition("/")
        scraped["file_sd_configs"] = [{"files": [f"{folders[folder]}/{name}"], "refresh_interval": "1s"}]
    (tmp_path / "targets").mkdir()
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules_file(QUICK)))
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    server = Prometheus(f"http://127.0.0.1:{port}")
    with jobs.child(command, tmp_path / "prometheus.log", jobs.environment()) as process:
        jobs.poll("prometheus", server.is_up, process)
        yield server


class Starver:
    """Holds up the process that makes the batches, until no step is done any more; then lets it go."""

    def __init__(self, root: int, prometheus: Prometheus) -> None:
        self._process = jobs.poll("augmenter", lambda: jobs.workers(root, "ray::Augmenter"))[0]
        self._prometheus = prometheus
        self._steps, self._since, self._held = -1.0, time.monotonic(), False

    def fires(self) -> list[dict[str, Any]]:
        """The alert, once it fires. Called again and again."""
        now, steps = time.monotonic(), self._prometheus.value("medswav_train_steps")
        if steps != self._steps:
            self._steps, self._since = steps, now
        if not self._held:
            self._process.suspend()
            self._held = True
        elif now - self._since > STARVED_SECONDS:
            self._process.resume()
            self._held, self._since = False, now
            jobs.poll("a step", lambda: self._prometheus.value("medswav_train_steps") > steps)
        return self._prometheus.firing("MedswavLoaderStarved")

    def end(self) -> None:
        self._process.resume()


def test_every_documented_metric_is_scraped_and_a_starved_loader_fires(
    patients, ray_cluster, prometheus, tmp_path
):
    """Ingest and pretraining at once; then the process that makes the batches is held up."""
    env = ray_cluster.env | {TARGETS_VARIABLE: str(tmp_path / "targets")}
    dataset(tmp_path / "data", tmp_path / "scratch")
    convert = jobs.ingest(patients, tmp_path / "out", "--address", ray_cluster.address)
    train = arguments(tmp_path / "data", tmp_path / "run", "--address", ray_cluster.address)
    train += ["--ranks", "1", "--set", "max_steps=5000", "--set", "data.cache_bytes=10000000"]
    with (
        jobs.child([MEDSWAV, *train], tmp_path / "train.log", env) as training,
        jobs.child(convert, tmp_path / "ingest.log", env) as converting,
    ):
        wanted = {series(m) for m in metrics_of("ingest") if m.when in THERE}
        jobs.poll("the end of ingest", lambda: converting.poll() is not None, training)
        assert converting.returncode == 0, (tmp_path / "ingest.log").read_text()
        jobs.poll("the metrics of ingest", lambda: wanted <= prometheus.names("ingest"), training)
        wanted = {series(m) for m in metrics_of("train") if m.when in THERE}
        jobs.poll("the metrics of training", lambda: wanted <= prometheus.names("pretrain"), training)
        starver = Starver(ray_cluster.root, prometheus)
        (alert,) = jobs.poll("a starved loader", starver.fires, training)
        starver.end()
        training.send_signal(signal.SIGTERM)
        assert training.wait(timeout=120) == 130, (tmp_path / "train.log").read_text()
    assert alert["labels"]["task"] == "pretrain" and alert["labels"]["severity"] == "ticket"
    assert "wait for data" in alert["annotations"]["summary"]
    assert list((tmp_path / "targets").iterdir()) == []  # neither stays, and
    assert prometheus.ask("query", query='up{job="ray"} == 1')["result"]  # Ray's own are found too
