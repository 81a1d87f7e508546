"""`medswav compare` on generated images: one split a patient, finished arms are kept, a mistake is a line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ingest.convert import dataset_info, run_unit
from ingest.discover import inventory
from ingest.labels import join_labels
from ingest.plan import plan_units
from orchestration import compare_data
from orchestration.cli import main
from orchestration.cluster import StopFlag
from orchestration.compare import folders_of, jobs_of, write_results
from orchestration.compare_plan import load_plan
from orchestration.processes import run_jobs
from shards import catalog
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.ids import Pseudonymizer, load_key
from shards.objects import open_store

PLAN = """
preset: small.yaml
seeds: [0]
fractions: [1.0, 0.5]
tables: [ct/labels.csv, mr/labels.csv]
tasks:
  - {name: ct-bright, table: ct/labels.csv, classes: {bright: bright, dark: dark}}
  - {name: mr-bright, table: mr/labels.csv, classes: {bright: high, dark: low}}
arms:
  - {name: pixels, kind: pixels}
  - {name: swav}
"""
PRESET = """
max_steps: 3
data: {batch_size: 4, modalities: [ct, mr]}
views:
  energy_probability: 0
  crops: [{count: 2, size: 16, share: [0.5, 1.0]}, {count: 1, size: 8, share: [0.2, 0.5]}]
model: {backbone: resnet-tiny, hidden_dim: 8, feature_dim: 8}
swav: {prototypes: 4, queue_length: 0, freeze_prototypes_steps: 0}
optim: {optimizer: adamw, learning_rate: 0.001}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tables of PNGs; patient 0 of both is one person, in train of one and in test of the other."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for modality, first in (("ct", "train"), ("mr", "test")):
        (root / modality).mkdir()
        with open(root / modality / "labels.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "modality", "patient", "split", "label"])
            for i in range(24):
                split = first if i == 0 else ("train", "train", "val", "test")[i % 4]
                bright = i // 4 % 2
                pixels = random.integers(0, 120, (40, 40))
                pixels[10:30, 10:30] += 130 * bright
                Image.fromarray(pixels.astype(np.uint8)).save(root / modality / f"{i}.png")
                patient = "p0" if i == 0 else f"{modality}{i}"
                table.writerow([f"{i}.png", modality.upper(), patient, split, ("dark", "bright")[bright]])
    (root / "plan.yaml").write_text(PLAN)
    (root / "small.yaml").write_text(PRESET)
    return root


def ingest_here(plan, data: Path, out: Path) -> None:
    """What run_ingest does, without Ray."""
    config = compare_data.ingest_config(plan, data, out)
    names = Pseudonymizer(load_key(config.key_file))
    store = open_store(config.output)
    open_or_create(store, dataset_info(config, names))
    for unit in plan_units(store, inventory(config), config, names).units:
        run_unit(unit, config, names, Path(config.output), out / "scratch")
    for table in config.labels:
        join_labels(config.output, table.path, names, table.name, sources=config.sources)


@pytest.fixture(scope="module")
def out(data, tmp_path_factory) -> Path:
    """A comparison that has its dataset."""
    folder = tmp_path_factory.mktemp("out")
    ingest_here(load_plan(data / "plan.yaml"), data, folder)
    return folder


def test_a_comparison_holds_patients_apart_keeps_what_is_done_and_writes_its_table(data, out):
    plan = load_plan(data / "plan.yaml")
    rows = catalog.load(str(out / "dataset"), columns=["modality", "patient", "split"]).to_pylist()
    splits = {row["patient"]: {r["split"] for r in rows if r["patient"] == row["patient"]} for row in rows}
    assert all(len(of_one) == 1 for of_one in splits.values())
    assert len(rows) == 47  # the train image of the patient who is also in test is gone

    listed = jobs_of(plan, out)
    with StopFlag() as stop:
        assert run_jobs(listed, 2, stop, None) == []
    figures = [row for job in listed for row in job.judged()]
    assert {(r["arm"], r["task"], r["fraction"]) for r in figures} == {
        (arm, task, f)
        for arm in ("pixels", "swav")
        for task in ("ct-bright", "mr-bright")
        for f in (1.0, 0.5)
    }
    assert all(row["auc"] == 1 for row in figures if row["arm"] == "pixels")
    text = write_results(plan, listed, figures, out)
    assert "| ct-bright | 1.000 |" in text and "3 steps of 4 images" in text
    assert json.loads((out / "results.json").read_text())["rows"] == figures

    again = jobs_of(plan, out)
    assert all(job.judged() is not None for job in again)
    (out / "runs" / "swav-0" / "encoder.safetensors").write_bytes(b"another")
    assert [job.name for job in again if job.judged() is None] == ["swav-0"]


def test_tuning_leaves_the_test_images_out_and_holds_out_a_third_of_the_patients_of_train(data, tmp_path):
    plan = load_plan(data / "plan.yaml")
    tables = {}
    for third in (None, 0, 1, 2):
        folder = tmp_path / str(third)
        compare_data.ingest_config(plan, data, folder, third=third)
        with open(folder / "tables" / "images.csv", newline="") as file:
            tables[third] = {row["file"]: row for row in csv.DictReader(file)}
    real, held = tables[None], tables[0]
    assert held.keys() == {file for file, row in real.items() if row["split"] != "test"}
    moved = [row for row in held.values() if row["split"] == "test"]
    assert all(real[row["file"]]["split"] == "train" for row in moved)
    of_train = [row for row in real.values() if row["split"] == "train"]
    assert len(of_train) == 22 and len(moved) == 8  # of two tables and two classes a third each, rounded up
    judged = [f for third in (0, 1, 2) for f, row in tables[third].items() if row["split"] == "test"]
    assert sorted(judged) == sorted(row["file"] for row in of_train)  # each once
    by_patient = {row["patient"]: row["split"] for row in held.values()}
    assert all(by_patient[row["patient"]] == row["split"] for row in held.values())


def test_each_seed_of_tuning_has_a_third_of_its_own(data, tmp_path):
    plan = load_plan(data / "plan.yaml", ["seeds=[0, 1, 2, 3]"])
    folders = folders_of(plan, tmp_path, tune=True)
    assert [(f.name, third) for f, third in folders.values()] == [(f"third-{s % 3}", s % 3) for s in range(4)]
    assert set(folders_of(plan, tmp_path, tune=False).values()) == {(tmp_path, None)}


def test_the_hybrid_arm_trains_on_exactly_the_labels_that_its_probe_fits(data, out):
    plan = load_plan(data / "plan.yaml")
    names = compare_data.labels_for_training(plan, out, 0.5, 0)
    assert len(names) == len(set(names)) == len(plan.tasks)
    table = catalog.labels(str(out / "dataset"), names[0])
    train = set(catalog.load(str(out / "dataset"), "ct", ["key"], split="train")["key"].to_pylist())
    whole = compare_data.task_labels(out, "ct-bright")
    assert set(table["key"].to_pylist()) < train & whole.keys()
    assert all(whole[k] == v for k, v in zip(*(table[c].to_pylist() for c in ("key", "label")), strict=True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seeds=[]", "seeds"),
        ("fractions=[2.0]", "fractions"),
        ("colour=red", "colour"),
        ("tables=[ct/labels.csv]", "mr/labels.csv"),
        ("preset=nowhere.yaml", "nowhere.yaml"),
        ("set=['swav.colour=1']", "swav.colour"),
    ],
)
def test_a_mistake_in_the_plan_is_one_line_before_anything_is_written(
    data, tmp_path, capsys, change, expected
):
    out = tmp_path / "out"
    plan = str(data / "plan.yaml")
    assert main(["compare", plan, "--data", str(data), "--out", str(out), "--set", change]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and expected in last
    assert not out.exists()


def test_an_unknown_arm_is_refused_with_the_ones_there_are(data):
    with pytest.raises(UserError, match="pixels, swav"):
        load_plan(data / "plan.yaml", only=["swov"])
