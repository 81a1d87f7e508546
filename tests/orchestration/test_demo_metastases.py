"""`medswav demo --task metastases`: its pretraining, its trainings, its table; the trainings themselves are
those of tests/downstream."""

import io
from dataclasses import replace

import numpy as np
import pytest

from orchestration import demo_metastases, finetune_job
from orchestration.demo_tasks import TaskOptions
from trainer.evaluate.masks_figure import MaskExample, masks_figure


@pytest.fixture
def options(tmp_path) -> TaskOptions:
    return TaskOptions("metastases", tmp_path, stream=io.StringIO())


def test_pretraining_is_on_slices_of_the_training_patients_with_the_network_that_is_tuned(options):
    config = demo_metastases.pretraining(replace(options, overrides=("max_steps=9",)))
    assert config.data.modalities == ("mr",) and config.data.split == "train" and config.max_steps == 9
    _, small = finetune_job.configured("metastases", "small", ())
    assert config.model.backbone == small.backbone


def test_every_training_of_the_demo_has_settings_that_its_task_takes(options):
    found = demo_metastases.requests(options)
    assert set(found) == set(demo_metastases.ARMS) and next(iter(found)) == "masks"
    for name, request in found.items():
        _, config = finetune_job.configured(request.task, request.preset, request.overrides)
        if request.task == "metastases":
            assert config.attention == name.endswith("mask")
            assert config.segmenter == (str(found["masks"].output) if config.attention else "")
            assert (request.encoder == "none") == name.startswith("none")
    assert len({request.output for request in found.values()}) == len(found)


def test_the_table_has_a_row_for_each_arm_and_says_what_is_not_measured():
    def tree(**test):
        number = {"mean": 0.5, "min": 0.5, "max": 0.5, "n": 1}
        one = {"test": {n: {**number, "mean": v} for n, v in test.items()}, "best_epoch": {"mean": 3.0}}
        return {"summary": [{**one, "test_patients": 7}]}

    trees = {name: tree(auc=0.75, average_precision=0.25, accuracy=0.875) for name in demo_metastases.ARMS}
    trees["masks"] = tree(auc=0.625, average_precision=0.5, dice=0.4375, dice_slices=0.375)
    lines = demo_metastases.table(trees).splitlines()
    assert len(lines) == 2 + 6 + 2
    assert "| pretrained, with the mask | 0.750 | 0.250 | 0.875 | 3.0 |" in lines
    assert lines[3].endswith("| 0.625 | 0.500 | - | 3.0 |")
    assert "0.438" in lines[-1] and "7 test patients" in lines[-1]


def test_the_figure_of_masks_has_its_numbers_beside_it(tmp_path):
    truth = np.zeros((8, 8), bool)
    truth[2:4, 2:4] = True
    half = np.where(np.arange(8) < 3, truth, 0).astype(np.float32)
    image = np.zeros((8, 8), np.float32)
    examples = [MaskExample("a", image, truth, half), MaskExample("b", image, truth & False, half * 0)]
    png, table = masks_figure(tmp_path / "masks.png", examples)
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert table.read_text().splitlines() == [
        "name,truth_pixels,found_pixels,dice,highest",
        "a,4,2,0.666667,1",
        "b,0,0,,0",
    ]
