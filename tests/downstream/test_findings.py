"""The task of chest findings: tables of boxes, images with their boxes, metrics by each truth, training."""

import cv2
import numpy as np
import pytest
import torch

from ingest.labels import join_labels
from ingest.synthetic import chest
from shards import catalog
from shards.errors import UserError
from tests.ingest.files import NAMES, ingest
from trainer.config import IntensityConfig
from trainer.downstream.box_images import AugmentConfig, Images, Placement, augment
from trainer.downstream.box_tables import read_boxes
from trainer.downstream.explain import step_cost
from trainer.downstream.findings import (
    PRESETS,
    Config,
    Found,
    Matches,
    Target,
    case_probability,
    example,
    is_case,
    metrics,
    prepare,
)
from trainer.downstream.finetune import finetune

LABELS = ("nodule", "pneumothorax")
SAMPLES = {"a": {"rows": 100, "columns": 80}, "b": {"rows": 50, "columns": 50}}
STILL = AugmentConfig(flip=0, zoom=(1, 1), shift=0, gain=(1, 1), offset=0)


def table(tmp_path, text, **settings):
    path = tmp_path / "truth.csv"
    path.write_text("key,label,x0,y0,x1,y1,split\n" + text)
    return read_boxes("", str(path), SAMPLES, LABELS, **settings)


def test_a_csv_gives_boxes_by_key_and_images_without_findings(tmp_path):
    found = table(
        tmp_path, "a,nodule,1,2,3,4.5,val\na,pneumothorax,0,0,80,100,val\nb,,,,,,\nz,nodule,1,1,2,2,\n"
    )
    assert found.name == "truth" and set(found.boxes) == {"a", "b"} and found.splits == {"a": "val"}
    assert found.boxes["a"].places.tolist() == [[1, 2, 3, 4.5], [0, 0, 80, 100]]
    assert found.boxes["a"].findings.tolist() == [0, 1] and found.boxes["b"].places.shape == (0, 4)
    kept = table(tmp_path, "a,rib,1,2,3,4,\na,nodule,1,2,3,4,\n", ignored=("rib",))
    assert kept.boxes["a"].findings.tolist() == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,nodule,1,2,81,4,\n",
            r"'truth', image a: the box \(1, 2, 81, 4\) does not lie in its image of 80 x 100 px",
        ),
        ("a,nodule,3,2,1,4,\n", r"the box \(3, 2, 1, 4\) has no area"),
        (
            "a,mass,1,2,3,4,\n",
            "have the labels 'mass', none of nodule, pneumothorax: add them to `findings`, or",
        ),
        ("a,nodule,1,2,,4,\n", "line 2 of truth.csv: x0, y0, x1, y1 are four numbers, or four empty cells"),
        ("a,nodule,1,2,3,4,val\na,nodule,1,2,3,4,test\n", "line 3 of truth.csv: an image is in two splits"),
        ("z,nodule,1,2,3,4,\n", "are of no image that is there"),
    ],
)
def test_tables_that_cannot_be_used_get_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        table(tmp_path, text)


def test_a_table_without_its_columns_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("key,label,x0,y0\na,nodule,1,2\n")
    with pytest.raises(UserError, match=r"the table t.csv has no column x1, y1: boxes have key, label, x0"):
        read_boxes("", str(path), SAMPLES, LABELS)
    with pytest.raises(UserError, match=r"there is no table gone\.csv"):
        read_boxes("", str(tmp_path / "gone.csv"), SAMPLES, LABELS)


def bright(image: np.ndarray) -> list[float]:
    rows, columns = (np.flatnonzero((image > 0.5).any(axis)) for axis in (1, 0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def test_boxes_move_with_what_is_in_them():
    image = np.zeros((64, 64), np.float32)
    image[20:30, 8:24] = 1
    box = np.array([[8.0, 20, 24, 30]])
    same, boxes, kept = augment(image, box, np.random.default_rng(0), STILL)
    assert (same == image).all() and (boxes == box).all() and kept.tolist() == [0]
    mirrored, boxes, _ = augment(image, box, np.random.default_rng(0), STILL.model_copy(update={"flip": 1.0}))
    assert boxes.tolist() == [[40, 20, 56, 30]] == [bright(mirrored)]
    moving = STILL.model_copy(update={"flip": 0.5, "zoom": (0.8, 1.3), "shift": 0.1})
    for seed in range(20):
        moved, boxes, _ = augment(image, box, np.random.default_rng(seed), moving)
        assert np.abs(boxes[0] - bright(moved)).max() <= 1


def test_a_box_that_leaves_the_image_goes_and_one_that_stays_in_part_is_cut():
    image = np.zeros((64, 64), np.float32)
    boxes = np.array([[0.0, 10, 10, 20], [20, 10, 30, 20], [4, 4, 40, 40]])
    # twice as large, about the middle: x becomes 2 x - 32
    twice = STILL.model_copy(update={"zoom": (2.0, 2.0)})
    _, found, kept = augment(image, boxes, np.random.default_rng(0), twice)
    assert kept.tolist() == [1, 2]  # (8, -12, 28, 8): .4 of it; (-24, -24, 48, 48): .44
    assert found.tolist() == [[8, 0, 28, 8], [0, 0, 48, 48]]


def test_a_placement_goes_there_and_back():
    place = Placement(0.5, 0.25, 3, 7)
    boxes = np.array([[2.0, 4, 10, 20]])
    assert place.place(boxes).tolist() == [[4, 8, 8, 12]]
    assert place.back(place.place(boxes)).tolist() == boxes.tolist()


def test_metrics_are_of_each_finding_and_each_truth():
    config = Config()
    none, box = np.zeros((0, 4)), np.array([[10.0, 10, 20, 20]])
    zero, no = np.zeros(1, np.int64), np.zeros(0, np.int64)
    # Three images: strict has a nodule in the first, any_reader one in the second too.
    targets = [
        Target((box, box), (zero, zero)),
        Target((none, box), (no, zero)),
        Target((none, none), (no, no)),
    ]
    predictions = [
        Found(np.array([[11.0, 11, 19, 19], [40, 40, 50, 50]]), np.array([0.9, 0.95]), np.array([0, 1])),
        Found(np.array([[11.0, 11, 19, 19]]), np.array([0.6]), zero),
        Found(np.array([[1.0, 1, 9, 9]]), np.array([0.7]), zero),
    ]
    found = metrics(config, ["strict", "any_reader"], Matches(), predictions, targets)
    assert found["auc"] == found["auc/nodule"] == 1 and np.isnan(found["auc/pneumothorax"])
    assert found["froc"] == found["froc/nodule"] == 1
    assert found["any_reader:auc"] == 0.5
    assert case_probability(predictions).tolist() == [0.95, 0.6, 0.7]
    assert [is_case(target) for target in targets] == [True, False, False]
    # .9 hit, .7 false, .6 hit: half below 1/3 false positive an image (5 of 9 rates), all above
    assert found["any_reader:froc"] == pytest.approx((4 * 0.5 + 5 * 1) / 9)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cv2.setNumThreads(1)
    folder = tmp_path_factory.mktemp("chest")
    chest.build(folder / "source", 12, seed=4, workers=1)
    ingest(folder / "source", folder / "out", split_fractions=(0.4, 0.3, 0.3))
    for name in ("strict", "any_reader"):
        join_labels(folder / "out", folder / "source" / f"{name}.csv", NAMES, name, kind="boxes")
    return folder / "out"


SMALL = PRESETS["small"].model_copy(
    update={"finetune": PRESETS["small"].finetune.model_copy(update={"epochs": 1, "batch_size": 4})}
)


def test_the_task_trains_from_files_and_is_judged_by_both_truths(made, tmp_path):
    task = prepare(SMALL, made, ["strict", "any_reader"], None)
    assert sum(map(len, (task.train, task.val, task.test))) == 24
    result = finetune(task, SMALL.finetune, tmp_path)
    names = {
        f"{p}{m}{f}"
        for p in ("", "any_reader:")
        for m in ("auc", "froc")
        for f in ("", "/nodule", "/pneumothorax")
    }
    assert set(result.test) == names and result.val["auc"] is not None
    with pytest.raises(UserError, match="two ground truths have one name"):
        prepare(SMALL, made, ["strict", "strict"], None)
    with pytest.raises(UserError, match="has no labels 'gone'"):
        prepare(SMALL, made, ["gone"], None)


def test_boxes_lie_on_the_same_pixels_at_full_resolution_and_resized(made):
    rows = catalog.load(made, "xr").to_pylist()
    truth = read_boxes(made, "any_reader", {row["key"]: row for row in rows}, LABELS)
    index = next(i for i, row in enumerate(rows) if len(truth.boxes[row["key"]].places))
    boxes = truth.boxes[rows[index]["key"]].places
    intensity = IntensityConfig()
    full, small = (Images(made, "xr", rows, size, intensity, 1 << 28) for size in ("full", 128))
    assert full.size % 32 == 0 and full.size >= max(max(r["rows"], r["columns"]) for r in rows)
    means = []
    for images in (full, small):
        x0, y0, x1, y1 = np.round(images.placement(index).place(boxes)[0]).astype(int)
        means.append(images[index][y0:y1, x0:x1].mean())
    assert (full.placement(index).place(boxes) == boxes).all()
    assert means[0] == pytest.approx(means[1], abs=0.03)
    uncached = Images(made, "xr", rows, 128, intensity, 0)
    assert (uncached[index] == small[index]).all() and (small[index] == small[index]).all()


def test_a_patient_in_two_splits_is_refused(made, tmp_path):
    rows = catalog.load(made, "xr", ["key", "patient"]).to_pylist()
    first = rows[0]["patient"]
    parts = ["train", "val", "test"]
    splits = [parts[k % 3] if row["patient"] != first else parts[k % 2] for k, row in enumerate(rows)]
    mine = [k for k, row in enumerate(rows) if row["patient"] == first]
    splits[mine[0]], splits[mine[1]] = "train", "test"
    text = "".join(f"{row['key']},,,,,,{split}\n" for row, split in zip(rows, splits, strict=True))
    (tmp_path / "t.csv").write_text("key,label,x0,y0,x1,y1,split\n" + text)
    with pytest.raises(UserError, match="patients are in two splits"):
        finetune(prepare(SMALL, made, [str(tmp_path / "t.csv")], None), SMALL.finetune, tmp_path / "run")


def test_an_encoder_of_another_kind_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="needs the stages of a ResNet"):
        prepare(SMALL.model_copy(update={"backbone": "torchvision:convnext_tiny"}), made, ["strict"], None)


def test_the_presets_are_built_and_a_step_of_the_small_one_is_counted():
    cost = step_cost(example(SMALL, None), 4)
    assert cost.parameters == cost.trained and cost.flops > 1e9 and np.isfinite(cost.loss)
    with torch.device("meta"):
        net = example(PRESETS["full"], None).network()
    backbone = sum(p.numel() for p in net.encoder.parameters())
    assert net.strides == (8, 16, 32, 64, 128) and backbone == pytest.approx(93.9e6, rel=1e-3)
    assert sum(p.numel() for p in net.parameters()) == 103_421_575
