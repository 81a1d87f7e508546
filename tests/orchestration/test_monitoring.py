"""Rules, dashboards and the page of metrics: generated, equal to what is committed, sound for promtool."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestration import monitoring
from orchestration.alert_rules import Thresholds, alerts, recordings
from orchestration.cli import main
from orchestration.dashboards import expressions
from orchestration.metric_table import METRICS, metrics_of
from shards.errors import UserError

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / monitoring.MONITORING / "prometheus"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here: apt-get install prometheus"
)


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_committed_files_are_the_generated_ones():
    """Else: python -m orchestration.monitoring"""
    for name, text in monitoring.files(Thresholds()).items():
        assert (ROOT / monitoring.MONITORING / name).read_text() == text, name
    assert (ROOT / monitoring.DOCS).read_text() == monitoring.metrics_page(Thresholds())


def test_every_metric_is_on_the_page_and_on_the_dashboard_of_its_job():
    page = monitoring.metrics_page(Thresholds())
    for metric in METRICS:
        assert f"| `{metric.name}` |" in page
    for job in ("ingest", "train"):
        asked = " ".join(expressions(job))
        assert [m.name for m in metrics_of(job) if m.name not in asked] == []


def test_rules_and_dashboards_ask_for_nothing_that_is_not_served():
    known = {m.name + suffix for m in METRICS for suffix in ("", "_sum", "_count", "_bucket")}
    known |= {one.name for one in recordings(Thresholds())}
    asked = [rule.expression for rule in (*recordings(Thresholds()), *alerts(Thresholds()))]
    asked += expressions("ingest") + expressions("train")
    names = {name for text in asked for name in re.findall(r"medswav[a-z_:]+", text)} - {"medswav"}
    assert names - known == set()


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_before(tmp_path):
    promtool("check", "rules", str(PROMETHEUS / "rules.yml"))
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations", None)  # promtool would have every text repeated in the tests
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    cases = Path(__file__).with_name("alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(cases)
    promtool("test", "rules", str(tmp_path / "alerts.yml"))
    checks = [check for case in yaml.safe_load(cases)["tests"] for check in case["alert_rule_test"]]
    names = {rule.name for rule in alerts(Thresholds())}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == names
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == names


@needs_promtool
def test_every_query_of_the_dashboards_is_promql(tmp_path):
    queries = [*expressions("ingest"), *expressions("train")]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", str(path))


@needs_promtool
def test_the_configuration_of_prometheus_is_sound():
    assert "valid prometheus config" in promtool(
        "check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yml")
    )


def test_panels_do_not_overlap_and_have_ids():
    for name in ("medswav-ingest", "medswav-pretraining"):
        board = json.loads((ROOT / monitoring.MONITORING / f"grafana/dashboards/{name}.json").read_text())
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids) > 10
        taken = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {
                (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
            }
            assert not cells & taken and at["x"] + at["w"] <= 24
            taken |= cells


def test_thresholds_are_changed_or_refused_with_their_names(tmp_path, capsys):
    assert main(["monitoring", str(tmp_path), "--set", "data_wait_ratio=0.07", "--set", "hold=3m"]) == 0
    text = (tmp_path / "prometheus/rules.yml").read_text()
    assert "medswav:train_data_wait:ratio > 0.07" in text and "for: 3m" in text
    with pytest.raises(UserError, match="checkpoint_seconds"):
        monitoring.thresholds(["wait=1"])
    with pytest.raises(UserError, match="--set hold"):
        monitoring.thresholds(["hold=10 minutes"])


def test_thresholds_are_refused_where_pictures_are_drawn(tmp_path, capsys):
    drawn = ["--plot-from", "http://127.0.0.1:9"]
    assert main(["monitoring", str(tmp_path), "--set", "data_wait_ratio=0.1", *drawn]) == 2
    assert "--set is for the rules" in capsys.readouterr().err
