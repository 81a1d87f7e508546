"""Capacity: the paper's facts come out, the narrow resource is named, each figure says where it is from."""

import json
from dataclasses import replace

import pytest

from orchestration import capacity_rates as known
from orchestration.capacity import Job, cached_reads, ingest, pretrain, samples_per_second_for
from orchestration.capacity_probe import measure
from orchestration.capacity_rates import Cluster, Figure, Rates, documented_gpu, documented_views, quantity
from orchestration.capacity_text import render
from orchestration.cli import main
from shards import catalog
from tests.batches import make
from trainer.config import load_config

PAPER = {"ct": 75_604_550, "mr": 26_251_580, "xr": 1_297_699, "us": 1_852_491}  # D_M: 105,006,320 images
EPOCHS = 10_500_632_000  # 100 of them
HARDWARE = Cluster(32, 4, known.CORES, known.MEMORY)


def given(value: float) -> Figure:
    return Figure(value, "of something", "given", "a test")


def rates(**changed) -> Rates:
    stored, views = dict.fromkeys(PAPER, known.STORED_BYTES), dict.fromkeys(PAPER, given(100))
    rows = (known.ROW_BYTES, known.TABLE_ROW_BYTES)
    base = Rates(known.SCAN, known.CONVERT, known.SOURCE_BYTES, stored, views, given(96.5), *rows)
    return replace(base, **changed)


def job(samples: int = EPOCHS, **changed) -> Job:
    base = Job(samples, 1024, dict.fromkeys(PAPER, 0.25), 151_136, 29_500_480, 236_233_136, 3, 256 << 20)
    return replace(base, **changed)


def test_ingest_of_the_papers_images_is_16_and_175_core_hours_and_15_to_17_tb():
    needs = ingest(PAPER, HARDWARE, rates()).needs
    assert round(needs["scan_core_hours"]) == 16 and round(needs["convert_core_hours"]) == 175
    assert 15e12 < needs["stored_bytes"] < 17e12 and round(needs["source_bytes"] / 1e12) == 55
    stage = ingest(PAPER, HARDWARE, rates())
    assert stage.bottleneck == "cores"
    assert stage.seconds == pytest.approx(3600 * (16.4 + 175) / 320, rel=0.01)


def test_100_epochs_in_14_days_take_271_samples_a_second_of_each_of_32_gpus():
    assert round(samples_per_second_for(14, EPOCHS, 32)) == 271


@pytest.mark.parametrize(("published", "days"), [(91, 42), (102, 37)])
def test_at_the_published_rates_of_a_v100_they_take_37_to_42_days(published, days):
    stage = pretrain(PAPER, job(), HARDWARE, rates(gpu=given(published)))
    assert round(stage.seconds / 86400) == days and stage.bottleneck == "GPUs"


def test_1600_samples_a_second_are_16_cores_at_10_ms_a_sample():
    needs = pretrain(PAPER, job(), HARDWARE, rates(gpu=given(1600))).needs
    assert needs["cores_per_gpu"] == 16 + 1  # and one of its own for the rank


def test_a_batch_of_equal_parts_counts_the_slow_modality_as_often_as_it_is_drawn():
    """X-rays are 1 % of the archive and a quarter of a batch."""
    views = {"ct": given(100), "mr": given(100), "us": given(100), "xr": given(20)}
    needs = pretrain(PAPER, job(), HARDWARE, rates(views=views, gpu=given(1000))).needs
    assert needs["cores_per_gpu"] == pytest.approx(1 + 1000 * (0.75 / 100 + 0.25 / 20))


def test_the_catalogue_is_once_in_a_node_or_in_each_process_that_does_not_share_it():
    fast = rates(gpu=given(1900))
    shared = pretrain(PAPER, job(), HARDWARE, fast)
    assert shared.needs["catalogue_bytes_of_a_process"] == 0 and shared.bottleneck == "cores"
    assert shared.needs["catalogue_bytes_of_a_node"] == 105_006_320 * known.ROW_BYTES.value
    assert shared.needs["processes_that_fit"] == int(
        (0.8 * 512e9 - 105_006_320 * 128) / ((256 << 20) + 190e6)
    )
    alone = pretrain(PAPER, job(tables=frozenset(PAPER)), HARDWARE, fast)
    needs = alone.needs
    assert needs["catalogue_bytes_of_a_process"] == pytest.approx(105_006_320 * known.TABLE_ROW_BYTES.value)
    assert alone.bottleneck == "memory" and needs["processes_that_fit"] < needs["processes_of_a_node"]
    assert alone.limits["memory"] == 4 * needs["processes_that_fit"] * 100


def test_a_catalogue_of_few_rows_and_one_that_is_not_shared_are_of_the_process(capsys):
    command = [
        "capacity",
        "--gpus",
        "32",
        "--gpu-rate",
        "96.5",
        "--set",
        "model.backbone=resnet-tiny",
        "--json",
    ]
    found = {}
    for setting, images in (("auto", "20e6"), ("none", "20e6"), ("/local", "20e6")):
        assert main([*command, "--images", images, "--set", f"data.catalogue_cache={setting}"]) == 0
        needs = json.loads(capsys.readouterr().out)["pretraining"]["needs"]
        found[setting] = round(needs["catalogue_bytes_of_a_process"] / known.TABLE_ROW_BYTES.value)
    assert found == {"auto": 600_000, "none": 20_000_000, "/local": 0}  # 400,000 US and 200,000 X-rays


@pytest.mark.parametrize(
    ("resource", "cluster", "changed"),
    [
        ("GPUs", {}, {}),
        ("cores", {"cores_per_node": given(12)}, {}),
        ("memory", {"memory_per_node": given(18e9)}, {}),
        ("storage", {"storage": given(400e6)}, {}),
        ("network", {"network": given(200e6)}, {}),
        ("cores", {}, {"views": dict.fromkeys(PAPER, given(5))}),
    ],
)
def test_the_narrow_resource_of_pretraining_is_named(resource, cluster, changed):
    wide = replace(HARDWARE, storage=given(1e12), network=given(1e12))
    stage = pretrain(PAPER, job(), replace(wide, **cluster), rates(**changed))
    assert stage.bottleneck == resource
    assert stage.seconds == pytest.approx(EPOCHS / min(stage.limits.values()))


def test_nodes_that_can_make_no_batch_at_all_are_refused():
    with pytest.raises(known.UserError, match="raise --memory-per-node"):
        pretrain(PAPER, job(), replace(HARDWARE, memory_per_node=given(17e9)), rates())
    with pytest.raises(known.UserError, match="raise --cores-per-node"):
        pretrain(PAPER, job(), replace(HARDWARE, cores_per_node=given(8)), rates())


@pytest.mark.parametrize("resource", ["storage", "network"])
def test_the_narrow_resource_of_ingest_is_named(resource):
    stage = ingest(PAPER, replace(HARDWARE, **{resource: given(1e9)}), rates())
    assert stage.bottleneck == resource
    moved = 105_006_320 * (524_288 + 152e3)
    assert stage.seconds == pytest.approx(moved / (1e9 if resource == "storage" else 4e9))


def test_gradients_cross_the_network_once_a_step_and_not_at_all_on_one_node():
    one = replace(HARDWARE, gpus=8, nodes=1)
    assert pretrain(PAPER, job(), one, rates()).needs["gradient_bytes_of_a_step"] == 0
    needs = pretrain(PAPER, job(), HARDWARE, rates()).needs
    assert needs["gradient_bytes_of_a_step"] == pytest.approx(2 * 0.75 * 4 * 29_500_480)
    small = pretrain(PAPER, job(batch=256), HARDWARE, rates()).needs
    per_node = "network_bytes_per_second_of_a_node"
    read = 32 * 96.5 * 152e3 / 4
    assert (small[per_node] - read) == pytest.approx(4 * (needs[per_node] - read))


def test_a_small_cache_of_the_rare_modalities_saves_half_of_the_reads():
    found = cached_reads(PAPER, dict.fromkeys(PAPER, 0.25), rates())
    assert [(held, round(left, 2)) for held, _, left in found[:2]] == [(["xr"], 0.75), (["xr", "us"], 0.5)]
    assert found[1][1] == pytest.approx((1_297_699 + 1_852_491) * 152e3)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2GB/s", 2e9), ("512 GB", 512e9), ("1.5TiB", 1.5 * 2**40), ("152kb", 152e3), ("7", 7)],
)
def test_sizes_are_read_as_people_write_them(text, value):
    assert quantity("--size", text, "bytes/s a node").value == value


def test_the_command_says_where_each_figure_is_from(capsys):
    command = ["capacity", "--gpus", "32", "--days", "14", "--storage-bandwidth", "2GB/s", "--core-rate"]
    command += ["90", "--gpu-rate", "96.5", "--set", "model.backbone=resnet-tiny"]  # quick to count
    counts = [text for m, n in PAPER.items() for text in ("--share", f"{m}={n}")]
    assert main([*command, "--images", "105006320", *counts, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == PAPER
    assert {name: one["origin"] for name, one in found["figures"].items()} == {
        "cores": "docs",
        "memory": "docs",
        "storage": "given",
        "scan": "docs",
        "convert": "docs",
        "source": "docs",
        **{f"stored {m}": "docs" for m in PAPER},
        **{f"views {m}": "given" for m in PAPER},
        "GPU": "given",
        "catalogue": "docs",
    }
    assert round(found["needed_per_gpu"]) == 271
    assert round(found["passes"]["xr"] / found["passes"]["ct"]) == 58
    assert found["pretraining"]["needs"]["checkpoint_bytes"] > 3 * 4 * 1e5
    text = render(found)
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    assert "GPUS" in text and "[given: --storage-bandwidth]" in text and "[docs: " in text


def test_measured_rates_are_those_of_the_dataset(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    root = make.dataset(tmp_path / "data", tmp_path / "scratch")
    monkeypatch.setattr("orchestration.capacity_probe.SLICES", 2)
    config = make.config("")
    config = config.model_copy(update={"data": config.data.model_copy(update={"modalities": ("us", "xr")})})
    found = measure(config, root, seconds=1e-3)
    for m in ("us", "xr"):
        sizes = catalog.load(root, m, ["size"])["size"].to_numpy()
        assert found.stored_bytes[m].value == pytest.approx(sizes.mean())
        assert 1 < found.views[m].value < 1e6 and "2 x 40 + 3 x 24" in found.views[m].source
    every = [found.scan, found.convert, found.table_row_bytes, *found.views.values()]
    assert all(one.value > 0 and one.origin == "measured" for one in every)


def test_what_the_docs_do_not_know_is_not_guessed():
    assert documented_gpu(load_config("paper_2d_mixed"), "v100").value == 96.5
    views = documented_views(load_config("paper_2d_mixed"))
    assert (views["ct"].value, views["mr"].value, views["xr"].value) == (197.1, 197.1, 45.3)
    assert documented_views(load_config("recommended_2d_mixed"))["ct"].value == 155.1
    with pytest.raises(known.UserError, match="--step-seconds"):
        documented_gpu(load_config("demo"), "v100")
    with pytest.raises(known.UserError, match="--measure"):
        documented_views(load_config("demo"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpus", "0"], "gpus"),
        (["--gpus", "32", "--images", "0"], "--images 0"),
        (["--gpus", "32", "--images", "2"], "none for"),
        (["--gpus", "7"], "multiple of"),
        (["--gpus", "32", "--share", "ct=1"], "no images"),
        (["--gpus", "32", "--storage-bandwidth", "fast"], "2GB/s"),
        (["--gpus", "32", "--memory-per-node", "2GB/s"], "512GB"),
        (["--gpus", "32", "--step-seconds", "1", "--gpu-rate", "9"], "one of them"),
        (["--gpus", "32", "--step-seconds", "-1"], "--step-seconds"),
        (["--gpus", "32", "--gpu", "abacus"], "v100"),
        (["--gpus", "32", "--set", "model.backbone=resnet152"], "--step-seconds"),
        (["--gpus", "2", "--preset", "demo", "--step-seconds", "1"], "--measure"),
        (["--gpus", "32", "--preset", "nothing"], "nothing"),
        (["--gpus", "32", "--days", "-1"], "--days"),
        (["--gpus", "32", "--dataset", "x"], "--measure"),
        (["--gpus", "32", "--dataset", "nowhere", "--measure"], "nowhere"),
    ],
)
def test_impossible_input_is_one_line_and_code_2(arguments, text, capsys, monkeypatch):
    monkeypatch.setattr("orchestration.capacity_probe.SLICES", 2)
    assert main(["capacity", *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and text in err
