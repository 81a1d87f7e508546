"""`medswav evaluate`: arms from runs, their tables and figures, the page; the experiment that makes both."""

import base64
import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from orchestration import experiment, experiment_cell, finetune_job
from orchestration.cli import main
from orchestration.evaluate_runs import read_arms
from shards import catalog
from shards.objects import open_store
from tests.batches import make
from trainer.config import IntensityConfig
from trainer.export import EncoderInfo, save_encoder
from trainer.models.resnet import build_backbone

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLAN = """
preset: small.yaml
seeds: [0, 1]
fractions: [1.0, 0.5]
pretraining_seeds: [0]
tables: [all/labels.csv]
tasks: [{name: odd-even, table: all/labels.csv, classes: {a: a, b: b}}]
finetune: [finetune.epochs=2, finetune.batch_size=4, finetune.evaluate_test=true]
arms:
  - {name: pixels, kind: pixels}
  - {name: none, kind: random}
  - {name: ours}
  - {name: published, kind: library, weights: "torchvision:Nothing_Weights.V1"}
"""
PRESET = """
max_steps: 3
data: {batch_size: 6, modalities: [ct, us, xr]}
views: {crops: [{count: 2, size: 24, share: [0.8, 1.0]}]}
model: {backbone: resnet-tiny, hidden_dim: 8, feature_dim: 8}
swav: {prototypes: 4, queue_length: 0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a label table, an encoder, and a plan: all that an experiment needs."""
    folder = tmp_path_factory.mktemp("evaluate")
    dataset = make.dataset(folder / "data", folder / "scratch")
    rows = catalog.load(dataset, columns=["key", "patient"]).to_pylist()
    patients = sorted({row["patient"] for row in rows})
    numbers = [patients.index(row["patient"]) for row in rows]
    import pyarrow as pa

    table = pa.table(
        {
            "key": [row["key"] for row in rows],
            "label": ["ab"[n % 2] for n in numbers],
            "split": ["test" if n > 7 else "val" if n in (2, 3) else "train" for n in numbers],
        }
    )
    catalog.write_labels(open_store(dataset), "odd-even", table)
    for split in ("train", "all"):
        about = EncoderInfo("resnet-tiny", 1, 7, ("ct",), "", 24, 0, split, {"ct": IntensityConfig()})
        save_encoder(folder / f"{split}.safetensors", build_backbone("resnet-tiny", 1), about)
    (folder / "plan.yaml").write_text(PLAN)
    (folder / "small.yaml").write_text(PRESET)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Few draws; the jobs of an experiment run in this process. The names of those that ran."""
    ran: list[str] = []

    def here(waiting, *_, **__):
        for job in waiting:
            ran.append(job.name)
            for command in job.commands():
                assert command[2] == "orchestration.experiment_cell"
                assert experiment_cell.main(command[3:]) == 0
        return []

    monkeypatch.setattr(finetune_job, "DRAWS", 20)
    monkeypatch.setattr(experiment, "run_jobs", here)
    return ran


def run(place: Path, out: Path, *more: str) -> int:
    data = ["--dataset", str(place / "data"), "--encoder", str(place / "train.safetensors")]
    return main(["evaluate", "experiment", str(place / "plan.yaml"), *data, "--output", str(out), *more])


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiment") / "out"


def test_an_experiment_is_made_once_and_its_page_holds_every_task_table_and_figure(
    place, done, capsys, quick
):
    assert run(place, done) == 0
    text = capsys.readouterr().out
    assert quick == ["odd-even/pixels", "odd-even/none", "odd-even/ours-0"]
    assert "published was left out: torchvision has no weights" in text and "page.html" in text
    tree = json.loads((done / "results.json").read_text())
    assert tree["pretraining"] == "given encoders, 7 steps"
    found = tree["tasks"]["odd-even"]
    assert list(found) == ["fractions", "convergence", "robustness"]
    assert set(found["fractions"]["gains"]) == {"pixels", "ours"}  # over `none`
    assert [row["model"] for row in found["robustness"]["kinds"]["gamma"]] == ["none", "ours"]
    page = (done / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and page.count("data:text/csv;base64,") == 3
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "<script" not in page
    mean = found["fractions"]["arms"]["ours"]["0.5"]["test"]["auc"]["mean"]
    assert f">{mean:.3f}" in page and f"| {mean:.3f} [" in (done / "results.md").read_text()
    shown = base64.b64decode(page.split("data:text/csv;base64,")[1].split('"')[0])
    assert shown == (done / "odd-even" / "fractions.csv").read_bytes()
    quick.clear()
    assert run(place, done) == 0 and quick == []  # all is there
    assert "other settings: give another --output" in _refused(
        capsys, lambda: run(place, done, "--set", "seeds=[0]")
    )


def _arms(done: Path) -> list[str]:
    return [f"none={done / 'runs/odd-even/none'}", f"ours={done / 'runs/odd-even/ours-0'}"]


@pytest.mark.parametrize("name", ["fractions", "convergence", "curves", "robustness"])
def test_each_command_gives_figures_with_their_data_a_page_and_json(done, capsys, tmp_path, name):
    more = ["--images", "2", "--transforms", "3", "--device", "cpu"] if name == "robustness" else []
    assert main(["evaluate", name, *_arms(done), "--output", str(tmp_path), "--json", *more]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree == json.loads((tmp_path / f"{name}.json").read_text()) and tree["task"] == "classify"
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert pictures == (["curves-test", "curves-val"] if name == "curves" else [name])
    assert all((tmp_path / f"{stem}.csv").is_file() for stem in pictures)
    page = (tmp_path / f"{name}.html").read_text()
    assert page.count("<img") == len(pictures) and "none" in page and "ours" in page
    if name == "fractions":
        arms = {arm.name: arm for arm in read_arms(_arms(done))}
        gain = tree["gains"]["ours"]["0.5"]
        pairs = zip(arms["ours"].values(0.5, "auc"), arms["none"].values(0.5, "auc"), strict=True)
        assert gain["mean"] == pytest.approx(np.mean([a - b for a, b in pairs]))
        assert gain["low"] <= gain["mean"] <= gain["high"]
    if name == "convergence":
        with open(tmp_path / "convergence.csv") as file:
            names = {row["name"] for row in csv.DictReader(file)}
        assert names and names <= {"none", "ours"}  # an AUC of 0 on four images has no epoch at 98 % of it


def test_runs_that_cannot_be_compared_are_refused_in_one_line(place, done, capsys, tmp_path):
    ours = done / "runs/odd-even/ours-0"
    other = tmp_path / "other"
    shutil.copytree(ours, other)
    said = json.loads((other / "result.json").read_text())
    (other / "result.json").write_text(json.dumps(said | {"labels": ["x"]}))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(ours, elsewhere)
    (elsewhere / "result.json").write_text(json.dumps(said | {"test": "other patients"}))
    pixels = done / "runs/odd-even/pixels"
    for command, expected in {
        ("fractions", f"a={ours}", f"b={other}"): "b and a are of different label tables",
        ("fractions", f"a={ours}", f"b={elsewhere}"): "were tested on different samples",
        ("fractions", f"a={ours}", f"a={ours}"): "two runs of a have the same seed",
        ("fractions", str(ours / "fraction-1" / "seed-0")): "is one training, not a run",
        ("fractions", str(tmp_path)): "is no finished run of medswav finetune",
        ("convergence", str(ours), "--reference", "x"): "there is no arm 'x'",
        ("curves", str(ours), "--metric", "x"): "the runs have no x after each epoch",
        ("curves", str(ours), "--fraction", ".3"): "no run has --fraction 0.3",
        ("robustness", str(pixels)): "trained on features, not on images",
    }.items():
        call = ["evaluate", *command, "--output", str(tmp_path / "out")]
        assert expected in _refused(capsys, lambda call=call: main(call))
    seen = ["--encoder", str(place / "all.safetensors")]
    assert "was trained on split all" in _refused(capsys, lambda: run(place, tmp_path / "new", *seen))
    wrong = ["--set", "finetune=[colour=1]"]
    assert "colour" in _refused(capsys, lambda: run(place, tmp_path / "new", *wrong))
    assert not (tmp_path / "new").exists()


def _refused(capsys: pytest.CaptureFixture[str], call) -> str:
    capsys.readouterr()
    assert call() == 2
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_draws_the_page_on_a_phone(done, tmp_path):
    shot = tmp_path / "shot.png"
    options = [
        "--headless",
        "--no-sandbox",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=390,844",
    ]
    command = [str(BROWSER), *options, f"--screenshot={shot}", (done / "page.html").as_uri()]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert shot.stat().st_size > 1000
