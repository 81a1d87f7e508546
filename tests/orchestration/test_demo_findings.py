"""The demo of chest findings: its settings are valid, and trainings become table, curve and picture."""

import csv
import json
from dataclasses import replace

import cv2
import pytest
import torch

from ingest.labels import join_labels
from orchestration import demo_findings
from orchestration.demo_tasks import TaskOptions
from orchestration.finetune_job import finetune
from tests.ingest.files import NAMES, ingest
from trainer.export import encoder_info, save_encoder
from trainer.models.encoders import build_encoder


@pytest.fixture
def options(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    one = TaskOptions("findings", tmp_path, patients=12, seeds=1, overrides=("max_steps=7",), seed=4)
    demo_findings._build(12, 4, one.source, lambda done, total: None)
    ingest(one.source, one.dataset, split_fractions=(0.4, 0.3, 0.3))
    for name in demo_findings.TRUTHS:
        join_labels(one.dataset, one.source / f"{name}.csv", NAMES, name, kind="boxes")
    yield one
    torch.set_num_threads(threads)


def test_trainings_become_a_table_of_both_truths_with_the_blob_filter_beside_it(options, capsys):
    config = demo_findings.pretraining(options)
    assert config.max_steps == 7 and config.data.modalities == ("xr",) and config.data.split == "train"
    options.run.mkdir()
    save_encoder(options.encoder, build_encoder("resnet-tiny"), encoder_info(config, 7, ""))
    for request in demo_findings.requests(options).values():
        finetune(replace(request, overrides=("finetune.epochs=1",)))
    text = demo_findings._report(options)
    lines = text.splitlines()
    assert lines[0] == "| test | pretrained | random | blob filter |"
    assert any(line.startswith("| auc, strict | ") for line in lines)
    assert any(line.startswith("| froc/nodule, any_reader | ") for line in lines)
    table = json.loads((options.tuned / "table.json").read_text())
    assert set(table) == {"pretrained", "random", "blob filter"}
    for finding in ("nodule", "pneumothorax"):
        assert (options.tuned / f"froc-{finding}.png").is_file()
        with (options.tuned / f"froc-{finding}.csv").open(newline="") as file:
            assert {row["name"] for row in csv.DictReader(file)} == set(table)
    assert cv2.imread(str(options.tuned / "examples.png")).shape[1] == 3 * 3 * 128
    assert demo_findings._report(options) == text
