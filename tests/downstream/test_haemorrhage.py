"""Haemorrhage: labels of volumes and slices from tables to losses and metrics, from files to the ablation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ingest.labels import join_labels
from ingest.synthetic.heads import COLUMNS, FILES, SLICES, TYPES, VOLUMES, HeadSize, build_heads
from orchestration.cli import main
from shards import catalog
from shards.errors import UserError
from tests.ingest.files import NAMES, ingest
from trainer.augment.boxes import BoxAugmentConfig, augmented
from trainer.config import TrainConfig
from trainer.downstream import haemorrhage, haemorrhage_ablation, haemorrhage_data
from trainer.downstream.finetune import FinetuneConfig
from trainer.downstream.haemorrhage import Config, HaemorrhageNet, LossWeights, Prediction, example, prepare
from trainer.downstream.haemorrhage_data import FINDINGS, Truth, load_heads, truth, values
from trainer.downstream.task import check_task
from trainer.export import encoder_info, save_encoder
from trainer.labels import UNKNOWN
from trainer.models.densenet3d import DenseNet3d
from trainer.models.encoders import build_encoder

BOX = (8, 16, 16)
SMALL = Config(box=BOX, finetune=FinetuneConfig(epochs=1, batch_size=4, patience=0))
BOTH = ("haemorrhage", "haemorrhage_slices")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """14 heads, with labels of volumes and slices."""
    folder = tmp_path_factory.mktemp("heads")
    size = HeadSize(slices=(10, 12), side=(40, 48))
    build_heads(folder / "source", 14, seed=2, size=size, workers=1)
    root = folder / "dataset"
    ingest(folder / "source" / FILES, root, outputs=("slices", "volumes"), split_fractions=(0.5, 0.25, 0.25))
    table = folder / "source" / VOLUMES
    join_labels(root, table, NAMES, BOTH[0], kind="multi", values=COLUMNS, of="volumes")
    join_labels(root, folder / "source" / SLICES, NAMES, BOTH[1], label_column="haemorrhage")
    return root


def rows(n: int, findings=None, slices=None) -> list[Truth]:
    one = np.zeros(6, np.int8) if findings is None else np.array(findings, np.int8)
    shown = np.zeros(8, np.int8) if slices is None else np.array(slices, np.int8)
    return [truth(one, shown, np.eye(8, dtype=np.float32))] * n


def test_truth_of_series_slices_reaches_the_slices_of_the_box_and_back():
    weights = np.array([[0, 1, 0, 0, 0], [0, 0.25, 0.75, 0, 0], [0, 0, 0, 0.4, 0.6]], np.float32)
    found = truth(np.zeros(6, np.int8), np.array([1, 0, 1, UNKNOWN, UNKNOWN], np.int8), weights)
    np.testing.assert_allclose(found.box_slices, [0, 0.75, np.nan])  # of the last, nothing is known
    scores = np.array([0.1, 0.5, 0.9])
    # the first slice lies outside of the box: that of its neighbour
    np.testing.assert_allclose(found.back @ scores, [0.18, 0.18, 0.5, 0.9, 0.9], rtol=1e-6)


def test_missing_labels_of_every_kind_are_left_out_of_the_loss():
    weights = LossWeights(volume=1, types=2, slices=4)
    logits = torch.tensor([[1.0, -1, 0.5, 0, 2, 3]]), torch.tensor([[0.3, -0.2, 1, 1, 1, 1, 1, 1]])

    def net(inputs):
        return logits

    target = rows(1, [1, UNKNOWN, 1, 0, UNKNOWN, UNKNOWN], [1, 0, *[UNKNOWN] * 6])
    found = haemorrhage.loss(weights, net, torch.zeros(1), target)

    def bce(logit, wanted):
        p = 1 / (1 + np.exp(-logit))
        return -np.log(p if wanted else 1 - p)

    by_hand = bce(1, 1) + 2 * (bce(0.5, 1) + bce(0, 0)) / 2 + 4 * (bce(0.3, 1) + bce(-0.2, 0)) / 2
    assert float(found) == pytest.approx(by_hand, rel=1e-5)
    nothing = rows(1, [UNKNOWN] * 6, [UNKNOWN] * 8)
    assert float(haemorrhage.loss(weights, net, torch.zeros(1), nothing)) == 0


def test_metrics_by_hand_and_heads_that_were_not_trained_have_none():
    bleeding = rows(1, [1, 1, 0, 0, 0, 0], [1] * 4 + [0] * 4)
    targets = [*rows(1, [0] * 6), *bleeding, *rows(1, [1, UNKNOWN, *[0] * 4])]
    scores = [0.5, 0.6, 0.4]
    predictions = [Prediction(np.full(6, s), np.linspace(s, 0, 8)) for s in scores]
    found = haemorrhage.metrics(LossWeights(), predictions, targets)
    assert found["auc"] == 0.5  # of two positives one is above the negative
    assert found["auc_subarachnoid"] == found["auc_types"] == 1 and np.isnan(found["auc_subdural"])
    assert found["auc_slices"] > 0.9
    alone = haemorrhage.metrics(LossWeights(types=0, slices=0), predictions, targets)
    assert alone["auc"] == 0.5 and np.isnan([alone["auc_types"], alone["auc_slices"]]).all()


def test_with_a_weight_of_zero_labels_of_that_kind_are_not_looked_at():
    net, alone = HaemorrhageNet(DenseNet3d()), LossWeights(types=0, slices=0)
    boxes = torch.rand(2, 1, *BOX)
    loss = haemorrhage.loss(alone, net, boxes, rows(2, [1] * 6, [1] * 8))
    loss.backward()
    assert net.findings.weight.grad[0].any() and not net.findings.weight.grad[1:].any()
    other = haemorrhage.loss(alone, net, boxes, rows(2, [1, 0, 0, 0, 0, 0], [0] * 8))
    assert other.item() == pytest.approx(loss.item(), abs=1e-6)


def test_slices_are_judged_by_their_own_place():
    """A bright slice changes the logits of its neighbourhood most."""
    torch.manual_seed(0)
    net = HaemorrhageNet(DenseNet3d()).eval()
    box = torch.full((1, 1, 16, 32, 32), 0.4)
    other = box.clone()
    other[:, :, 3] += 0.5
    with torch.inference_mode():
        change = (net(other)[1] - net(box)[1]).abs()[0]
    assert change.shape == (16,) and int(change.argmax()) in (2, 3, 4)


def test_augmentation_keeps_slices_and_range_and_follows_its_stream():
    box = np.repeat(np.linspace(0, 1, 8, dtype=np.float32), 12 * 10).reshape(8, 12, 10)
    config = BoxAugmentConfig(shift=0, scale=(1, 1), noise=0, bias=(0, 0))
    found = augmented(box, config, np.random.default_rng(1))
    assert found.shape == box.shape and found.min() >= 0 and found.max() <= 1
    assert (np.diff(found[:, 6, 5]) > 0).all()  # slices are in their order
    again = augmented(box, config, np.random.default_rng(1))
    other = augmented(box, config, np.random.default_rng(2))
    assert np.array_equal(found, again) and not np.array_equal(found, other)
    ramp = np.broadcast_to(np.arange(10, dtype=np.float32) / 10, (8, 12, 10))
    mirrored = augmented(ramp, BoxAugmentConfig(mirror=1, move=0, shade=0), np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored, ramp[:, :, ::-1])


def test_from_files_to_volumes_with_the_truth_of_each_slice(dataset):
    heads = load_heads(str(dataset), BOTH, BOX, (55.0, 200.0))
    assert len(heads.rows) == 14 and set(heads.splits) == {"train", "val", "test"}
    assert (heads.findings[:, 0] == (heads.findings[:, 1:] == 1).any(1)).all()
    assert int(heads.findings[:, 0].sum()) == 7
    for i in range(14):
        found = heads.truth(i)
        assert heads.box(i).shape == BOX and 0.05 < heads.box(i).mean() < 0.8
        assert bool((found.slices == 1).any()) == bool(found.findings[0] == 1)
        shown = found.box_slices[~np.isnan(found.box_slices)]
        assert (shown.max() > 0) == (found.findings[0] == 1)
        assert found.back.shape == (len(found.slices), BOX[0])
    few = load_heads(str(dataset), BOTH, BOX, (55.0, 200.0), cache_bytes=0)
    assert np.array_equal(few.box(3), heads.box(3)) and not few._boxes


def test_a_table_with_the_volume_label_alone_is_enough_where_only_it_is_trained(dataset, tmp_path):
    keys = catalog.load(dataset, "ct_volumes", columns=["key"])["key"].to_pylist()
    table = tmp_path / "labels.csv"
    lines = [f"{key},{'yes' if i % 2 else 'no'}" for i, key in enumerate(keys)]
    table.write_text("\n".join(["key,label", *lines]) + "\n")
    alone = SMALL.model_copy(update={"weights": LossWeights(types=0, slices=0)})
    check_task(prepare(alone, str(dataset), [str(table)], None))
    with pytest.raises(UserError, match=r"no training volume has labels of types: .*weights\.types=0"):
        prepare(SMALL, str(dataset), [str(table)], None)


def test_tables_that_do_not_fit_are_refused_in_one_line_and_their_own_splits_count(dataset, tmp_path):
    def refused(match, *labels):
        with pytest.raises(UserError, match=match):
            check_task(prepare(SMALL, str(dataset), list(labels), None))

    def csv(text: str) -> str:
        path = tmp_path / "t.csv"
        path.write_text(text)
        return str(path)

    volumes = catalog.load(dataset, "ct_volumes", columns=["key", "slice_keys", "split"]).to_pylist()
    key, one_slice = volumes[0]["key"], volumes[0]["slice_keys"][0]
    refused("has no column label or labels", csv(f"key,verdict\n{key},1\n"))
    refused("must be 1 or 0 .yes or no., not 'perhaps'", csv(f"key,label\n{key},perhaps\n"))
    refused("name stroke and none of haemorrhage, subarachnoid", csv(f"key,labels\n{key},stroke\n"))
    refused("with a type but without haemorrhage", csv(f"key,labels\n{key},subdural\n"))
    refused(
        "is one of the volumes or their slices: join it with --of volumes", csv(f"key,label\n{one_slice},1\n")
    )
    refused("join it to images", BOTH[0], csv(f"key,label\n{key},1\n"))
    refused("takes one table of volumes and one of slices, not 3", *BOTH, "more")
    own = "".join(
        f"{v['key']},haemorrhage;subdural,{'val' if i % 2 else ''}\n" for i, v in enumerate(volumes)
    )
    heads = load_heads(str(dataset), [csv("key,labels,split\n" + own)], BOX, (55.0, 200.0))
    of_catalog = [v["split"] for v in volumes]
    assert heads.splits.tolist() == ["val" if i % 2 else s for i, s in enumerate(of_catalog)]
    refused("a split of the labels is 'dev'", csv(f"key,labels,split\n{key},subdural;haemorrhage,dev\n"))


def test_unknown_types_of_a_joined_table_stay_unknown():
    table = pa.table(
        {
            "key": ["a", "b", "c"],
            "labels": [["haemorrhage", "subdural"], [], ["subdural"]],
            "unknown": [["epidural"], ["subdural"], ["haemorrhage"]],
        }
    )
    found = values(table, FINDINGS, "t")
    assert found["a"].tolist() == [1, 0, 1, UNKNOWN, 0, 0]
    assert found["b"].tolist() == [0, 0, UNKNOWN, 0, 0, 0]
    assert found["c"].tolist() == [1, 0, 1, 0, 0, 0]  # a type is a haemorrhage


def test_labels_of_a_table_may_be_integers_and_zero_is_no():
    found = values(pa.table({"key": ["a", "b", "c"], "label": [1, 0, None]}), FINDINGS, "t")
    assert {key: int(row[0]) for key, row in found.items()} == {"a": 1, "b": 0}


def test_labels_of_the_slices_of_a_coronal_series_are_not_used(dataset, monkeypatch):
    first = catalog.load(dataset, "ct_volumes", columns=["key", "affine"]).to_pylist()[0]
    real = haemorrhage_data.affine_of

    def turned(row):
        affine = real(row)
        return affine[[0, 2, 1]] if row["key"] == first["key"] else affine  # slices from front to back

    monkeypatch.setattr(haemorrhage_data, "affine_of", turned)
    heads = load_heads(str(dataset), BOTH, BOX, (55.0, 200.0))
    place = [row["key"] for row in heads.rows].index(first["key"])
    assert (heads.slices[place] == UNKNOWN).all() and (heads.slices[place - 1] != UNKNOWN).any()
    assert np.isnan(heads.truth(place).box_slices).all()


def encoder(path: Path, backbone: str) -> Path:
    info = encoder_info(TrainConfig.model_validate({"data": {"dataset": "d"}}), 1, "f")
    save_encoder(path, build_encoder(backbone), replace(info, backbone=backbone))
    return path


def test_pretrained_weights_are_loaded_strictly_and_other_networks_refused(dataset, tmp_path):
    good = encoder(tmp_path / "good.safetensors", "densenet3d")
    net = prepare(SMALL, str(dataset), BOTH, good).network()
    saved = haemorrhage.read_encoder(good)[0]
    assert all(torch.equal(value, saved[name]) for name, value in net.encoder.state_dict().items())
    with pytest.raises(UserError, match=r"holds a resnet-tiny of 1 channels, haemorrhage takes a densenet3d"):
        prepare(SMALL, str(dataset), BOTH, encoder(tmp_path / "2d.safetensors", "resnet-tiny"))


def test_the_ablation_adds_each_in_turn_and_goes_on_to_the_same_table(dataset, tmp_path, monkeypatch):
    wanted = haemorrhage_ablation.Ablation(
        config=SMALL,
        dataset=str(dataset),
        labels=BOTH,
        encoder=encoder(tmp_path / "encoder.safetensors", "densenet3d"),
        folder=tmp_path / "out",
        seeds=(1,),
        jobs=1,
    )
    told = []
    tree = haemorrhage_ablation.run(wanted, lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4)
    assert [list(tree["arms"]), len(tree["arms"]["volume"])] == [list(haemorrhage_ablation.ARMS), 1]
    trained = {
        arm: [name for name in ("auc_types", "auc_slices") if rows[0]["test"][name] is not None]
        for arm, rows in tree["arms"].items()
    }
    assert (
        trained["volume"] == [] and "auc_slices" in trained["slices"] and "auc_slices" not in trained["types"]
    )
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| + self-supervision | " in table and "HU histogram" in table
    assert (tmp_path / "out" / "curves.png").exists() and (tmp_path / "out" / "curves.csv").exists()
    one_kind = {name: {"val": None, "test": 0.5} for name in tree["baselines"]}
    assert "| - | 0.500 | - |" in haemorrhage_ablation.markdown({**tree, "baselines": one_kind})
    (wanted.place("types", 1) / "result.json").unlink()  # as if killed before its end
    trainings = []
    real = haemorrhage_ablation.finetune
    monkeypatch.setattr(haemorrhage_ablation, "finetune", lambda *a: trainings.append(a[2]) or real(*a))
    assert haemorrhage_ablation.run(wanted) == tree
    assert (tmp_path / "out" / "ablation.md").read_text() == table


def test_the_full_preset_builds_and_says_what_the_paper_has():
    full = haemorrhage.PRESETS["full"]
    assert full.box == (40, 224, 192) and full.window_hu == (55.0, 200.0)
    task = example(full.model_copy(update={"box": (40, 32, 32)}), None)
    net = task.network()
    assert sum(p.numel() for p in net.encoder.parameters()) == 167_480
    assert [tuple(part.shape) for part in net(torch.rand(2, 1, 40, 32, 32))] == [(2, 6), (2, 40)]
    assert TYPES == haemorrhage.TYPES and COLUMNS == FINDINGS


def test_the_command_trains_it_with_intervals_by_patient(dataset, tmp_path, capsys):
    given = ["finetune", "haemorrhage", "--data", str(dataset), "--output", str(tmp_path / "run")]
    settings = ["box=[8,16,16]", "finetune.epochs=1", "finetune.batch_size=4"]
    tables = [part for name in BOTH for part in ("--labels", name)]
    assert main([*given, *tables, *[part for one in settings for part in ("--set", one)], "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["task"] == "haemorrhage" and tree["selection"] == "auc"
    assert {"auc", "auc_types", "auc_slices", "average_precision"} <= tree["rows"][0]["test"].keys()
    assert main(["ablate", "stroke", "--data", "x", "--output", "y", "--labels", "z"]) == 2
    assert "there is no ablation of 'stroke': choose haemorrhage" in capsys.readouterr().err
    given = ["ablate", "haemorrhage", "--data", str(dataset), "--output", str(tmp_path / "t"), *tables]
    for setting, said in {
        "finetune.seed=3": "use --seeds",
        "weights.types=0": "rows of the table are",
    }.items():
        assert main([*given, "--set", setting]) == 2
        assert said in capsys.readouterr().err
