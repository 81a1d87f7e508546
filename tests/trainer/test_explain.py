"""`--explain`: the derived values are those that a run has, and asking for them leaves nothing behind."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from orchestration.cli import main
from shards import catalog
from shards.errors import UserError
from shards.store import Store
from tests.batches import make
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer.__main__ import main as trainer_main
from trainer.augment.crops import DRAWS_PER_CROP, place
from trainer.batches import BatchMaker, fit_bands, open_modality
from trainer.checkpoint import flat_settings
from trainer.config import CropConfig, TrainConfig, load_config
from trainer.explain import explain, open_points
from trainer.explain_model import measure_model
from trainer.explain_text import render
from trainer.loop import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("explained")
    (folder / "scratch").mkdir()
    return make.dataset(folder / "data", folder / "scratch")


def settings(root: str, *more: str) -> list[str]:
    own = ["modalities=[ct,us,xr]", "batch_size=12", f"dataset={root}"]
    return [argument for item in (*(f"data.{o}" for o in own), *more) for argument in ("--set", item)]


def test_table_one_on_four_modalities_and_eight_ranks():
    found = explain(load_config("paper_2d_mixed"), 8, "paper_2d_mixed")
    batch, queue, codes = found["batch"], found["queue"], found["prototypes"]
    assert (batch["global"], batch["per_rank"]) == (256, 32)
    assert set(batch["per_modality"].values()) == {64} and set(batch["per_modality_and_rank"].values()) == {8}
    assert (queue["of_each_group_and_crop"], queue["of_each_rank"], queue["batches"]) == (960, 120, 15)
    assert queue["bytes_of_every_rank"] == 4 * 2 * 960 * 128 * 4
    assert codes["ratio"] == pytest.approx((64 + 960) / 3000) and found["warnings"] == []
    assert codes["frozen"]["step"] == 10_000
    assert queue["starts"]["step"] == -(-10 * 105_006_320 // 256)
    assert found["horizon"]["epochs"] == pytest.approx(100, abs=1e-5)
    at = found["learning_rate"]["at"]
    assert [at[name]["value"] for name in ("first", "middle", "last")] == pytest.approx([0.6, 0.3003, 0.0006])
    passes = {m: about["passes"] for m, about in found["modalities"].items()}
    assert passes["xr"] / passes["ct"] == pytest.approx(58.26, abs=0.01)  # method.md 3-E
    share = found["crops"]["ct"]["crops"][0]["share"]
    assert share == pytest.approx([(224 / 1200) ** 2, (224 / 600) ** 2])
    assert found["bytes"]["batch"] == 256 * (2 * 224**2 + 6 * 92**2)
    text = render(found)
    assert "960 of each group and assigned crop (0, 1); 120 scored by a rank" in text
    assert "xr: 1,297,699 images, 2,625,157,952 drawn, 2,023 passes" in text


@pytest.mark.parametrize(
    ("backbone", "gflop", "parameters"), [("resnet50", 75, 23.5), ("resnet50w2", 298, 93.9)]
)
def test_operations_and_parameters_are_those_of_the_literature(backbone, gflop, parameters):
    cost = measure_model(load_config("paper_2d_xray", [f"model.backbone={backbone}"]))
    assert cost.flop_per_sample() / 1e9 == pytest.approx(gflop, rel=0.015)
    assert cost.parameters["backbone"] / 1e6 == pytest.approx(parameters, abs=0.05)


def test_the_3d_column_of_table_one_on_eight_ranks():
    found = explain(load_config("paper_3d_ct"), 8, "paper_3d_ct")
    assert found["batch"]["per_rank"] == 4 and found["horizon"]["steps"] == 2_444_000 // 32
    assert found["compute"]["parameters"]["backbone"] == 167_480
    assert found["compute"]["gflop_per_sample"] == pytest.approx(80, rel=0.02)  # method.md section 8
    assert found["bytes"]["batch"] == 32 * 40 * (224 * 192 + 4 * 112 * 96)
    assert 4e9 < found["bytes"]["activations_of_a_rank"] < 16e9  # it ran on GPUs of 16 GB
    assert found["queue"]["starts"]["step"] == -(-3 * 24_440 // 32)
    text = render(found)
    assert "32 volumes of all ranks, 4 of a rank" in text and "rescaled to 112x96-250x200 px" in text


@pytest.mark.parametrize("optimizer", ["adamw", "larc-sgd"])
def test_the_bytes_of_a_checkpoint_are_those_that_a_run_writes(tmp_path, optimizer):
    config = tiny(max_steps=3, optim={"optimizer": optimizer}, swav__freeze_prototypes_steps=0)
    train(config, FakeBatches(config), tmp_path, dataset_fingerprint=FINGERPRINT)
    written = sum(
        p.stat().st_size for p in (tmp_path / "checkpoints" / "step-00000003").glob("*.safetensors")
    )
    told = explain(config, 1, "demo")["bytes"]["checkpoint"]
    assert told == pytest.approx(written, abs=30_000)  # the header with the tensors' names


def test_a_dataset_gives_passes_and_the_shape_of_its_images(root):
    config = make.config(root)
    found = explain(config, 2, "demo")
    assert found["modalities"]["us"] == {"images": 7, "drawn": 400_000, "passes": 400_000 / 7}
    assert found["crops"]["ct"]["image"] == [65, 69]
    proportional = config.model_copy(
        update={"data": config.data.model_copy(update={"sampling": "proportional", "batch_size": 54})}
    )
    told = explain(proportional, 2, "demo")
    assert told["batch"]["per_modality"] == {"ct": 22, "us": 14, "xr": 18}
    batch = BatchMaker(proportional, 0, 1, fit_bands(config, limit=2))(0)
    assert batch.sizes == (22, 14, 18)
    assert told["prototypes"]["samples_of_a_group"] == 14 and "14 samples per rarest" in told["warnings"][0]
    with pytest.raises(UserError, match=r"no mr images in split train \(modalities there: ct, us, xr\)"):
        explain(load_config("demo", [f"data.dataset={root}"]), 2, "demo")


def test_the_share_of_a_crop_is_that_of_where_it_is_placed():
    config = load_config("demo", ["views.border=[0.05, 0.1]"])
    crop = CropConfig(count=1, size=64, share=(0.2, 0.5))
    config = config.model_copy(update={"views": config.views.model_copy(update={"crops": (crop,)})})
    low, high = explain(config, 1, "demo")["crops"]["xr"]["crops"][0]["share"]
    inside = 0.9 * 0.8
    assert (low, high) == pytest.approx((0.2 * inside, 0.5 * inside), rel=0.03)
    u = np.full(DRAWS_PER_CROP, 0.5)
    placed = place((1000, 1000), crop, config.views, (600, 1200), u)
    assert low < 64 * 64 / (placed.rows * placed.columns) < high


def test_every_open_point_names_settings_that_there_are():
    points = open_points(TrainConfig())
    assert list(points) == list("ABCDEFGHIJ")
    assert all(about["reading"] and (about["settings"] or name == "I") for name, about in points.items())
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for about in points.values():
        for key in about["settings"]:
            assert f"`{key}`" in text, key


def test_what_cannot_go_well_is_said():
    few = ["data.batch_size=32", "swav.queue_length=0", "model.backbone=resnet50w2"]
    warnings = explain(load_config("paper_2d_mixed", few), 1, "paper_2d_mixed")["warnings"]
    assert "ratio of 0.00, below .3" in warnings[0] and "303 without a queue, 106 with 960" in warnings[0]
    assert "8192 in SwAV" in warnings[1]
    short = [
        "model.backbone=resnet-tiny",
        "max_steps=20",
        "swav.freeze_prototypes_steps=20",
        "swav.queue_start_step=6",
    ]
    warnings = explain(load_config("paper_2d_xray", short), 1, "paper_2d_xray")["warnings"]
    assert [w.split(":")[0] for w in warnings] == [
        "the prototypes stay frozen for the whole run",
        "the queue is never used",
    ]


def test_micro_batches_go_forward_twice_but_for_one_and_labels_have_heads(root):
    plain = explain(make.config(root, batch_size=24), 1, "demo")
    keys = open_modality(make.config(root).data, "ct").table["key"]
    labels = pa.table({"key": keys, "label": ["ill", "well"] * 5 + ["ill"]})
    catalog.write_labels(Store(Path(root)), "findings", labels)
    tree = make.config(root, batch_size=24).model_dump()
    tree["optim"]["accumulation"] = 4
    tree["supervision"] = {"labels": [{"name": "findings", "beta": 0.5, "modalities": ["ct"]}]}
    found = explain(TrainConfig.model_validate(tree), 1, "demo")
    ratio = found["compute"]["gflop_per_sample"] / plain["compute"]["gflop_per_sample"]
    assert ratio == pytest.approx(1 + 0.75 / 3, abs=0.01)  # a forward is a third of the work
    assert found["compute"]["parameters"]["label_heads"] == 2 * (2048 + 1)
    text = render(found)
    assert "in 4 micro-batches of 6, one Sinkhorn over all of them" in text
    assert "labels          findings: 2 classes, kind classes, for ct; alpha 1, beta 0.5" in text


@pytest.mark.parametrize(
    "more",
    [
        ["method=simclr", "swav={}", "views.crops=[{count: 2, size: 40}]"],
        ["model.backbone=torchvision:resnet18", "views.crops=[{count: 2, size: 32}]"],
        ["model.sync_batchnorm=global", "swav.groups=shared"],
        ["data.sampling=temperature", "data.sampling_temperature=2"],
    ],
)
def test_settings_away_from_the_presets_are_explained_too(more):
    found = explain(load_config("demo", more), 4, "demo")
    assert found["compute"]["gflop_per_sample"] > 0 and found["compute"]["parameters"]["backbone"] > 0
    assert ("prototypes" in found["compute"]["parameters"]) == (found["method"] == "swav")
    text = render(found)
    assert "batch           32 images of all ranks, 8 of a rank" in text
    assert ("shares depend on a dataset" in text) == ("data.sampling_temperature=2" in more)


def test_the_commands_exit_0_and_write_nothing(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(Path(root).rglob("*"))
    run = ["--run-dir", str(tmp_path / "run")]
    assert main(["pretrain", "--explain", "--json", "--ranks", "2", *run, *settings(root)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"]["per_rank"], found["data"]["images_from"]) == (6, "the dataset, split train")
    assert trainer_main(["--preset", "demo", "--explain", "--json", "--ranks", "2", *settings(root)]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["pretrain", "--explain"]) == 0  # without dataset and run folder
    assert "xr: ? images, 32,000 drawn, ? passes" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and sorted(Path(root).rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--explain", "--ranks", "3"], "multiple of 12"),
        (["--explain", "--dataset", "nowhere"], "nowhere"),
        (["--run-dir", "run"], "pretrain needs --dataset"),
        (["--dataset", "data"], "pretrain needs --run-dir"),
        (["--json", "--dataset", "data", "--run-dir", "run"], "pretrain needs --explain with --json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *arguments]) == 2
    told = capsys.readouterr().err
    assert text in told and told.count("\n") == 1 and not list(tmp_path.iterdir())


SWAV_FLAGS = [
    "data_path",
    "nmb_crops",
    "size_crops",
    "min_scale_crops",
    "max_scale_crops",
    "crops_for_assign",
    "temperature",
    "epsilon",
    "sinkhorn_iterations",
    "feat_dim",
    "nmb_prototypes",
    "queue_length",
    "epoch_queue_starts",
    "epochs",
    "batch_size",
    "base_lr",
    "final_lr",
    "freeze_prototypes_niters",
    "wd",
    "warmup_epochs",
    "start_warmup",
    "dist_url",
    "world_size",
    "rank",
    "local_rank",
    "arch",
    "hidden_mlp",
    "workers",
    "checkpoint_freq",
    "use_fp16",
    "sync_bn",
    "syncbn_process_group_size",
    "dump_path",
    "seed",
]


def test_every_flag_of_swav_has_a_row_and_every_setting_in_it_is_one():
    text = (Path(__file__).parents[2] / "docs" / "from-swav.md").read_text()
    rows = [line for line in text.split("## eval_linear")[0].splitlines() if line.startswith("| `--")]
    assert [flag for row in rows for flag in re.findall(r"`--(\w+)`", row.split("|")[1])] == SWAV_FLAGS
    settings_there = set(flat_settings(TrainConfig().model_dump(mode="json")))
    for name in re.findall(r"`((?:data|views|model|swav|optim|checkpoint)\.\w+)", text):
        assert name in settings_there, name


def test_the_order_of_samples_is_explained_with_what_a_node_cache_has_to_hold(root):
    small = "data.order={block_samples: 2, group_blocks: 2}"
    found = explain(load_config("demo", [o for o in settings(root, small) if o != "--set"]), 2, "demo")
    order = found["order"]
    assert (order["block_samples"], order["group_blocks"], order["virtual_ranks"]) == (2, 2, 4)
    ct = order["modalities"]["ct"]  # 11 images, 4 in a batch: a lane of 4 steps is cut to 2
    size = np.mean(catalog.load(root, "ct", ["size"], "train")["size"].to_pylist())
    assert (ct["whole"], ct["pool"], ct["steps"]) == (False, 11, 2)
    assert ct["pool_bytes"] == pytest.approx(11 * size)
    assert "blocks of 2 neighbours, 2 of them shuffled together; 4 virtual ranks" in render(found)
    by_key = [*settings(root), "--set", "data.order.layout=keys"]
    found = explain(load_config("demo", [o for o in by_key if o != "--set"]), 2, "demo")
    assert "keys: single images" in render(found)
