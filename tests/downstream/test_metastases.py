"""Lesions in slices: the mask network, the classifier that is shown its mask, the whole way from files."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ingest.labels import join_labels
from ingest.synthetic import metastases as generated
from orchestration import finetune_job
from orchestration.cli import main
from shards import catalog
from shards.errors import UserError
from tests.ingest.files import NAMES, ingest
from trainer.config import IntensityConfig
from trainer.downstream import metastases, metastases_mask
from trainer.downstream.finetune import FinetuneConfig, finetune, load_best
from trainer.downstream.metastases_nets import Detector, MaskShape, Segmenter, SliceClassifier, load_segmenter
from trainer.downstream.slices import (
    SliceAugment,
    SliceVolume,
    augmented,
    drawn,
    places_of,
    read_slices,
    stack,
)
from trainer.export import EncoderInfo, save_encoder
from trainer.models.encoders import build_encoder
from trainer.models.resnet import build_backbone

SIZE = 32


def volumes(n: int = 4, size: int = SIZE, slices: int = 6) -> list[SliceVolume]:
    """Noise with a line that runs through all slices; every third slice has a bright square beside it."""
    random = np.random.default_rng(5)
    found = []
    for split, count in (("train", n), ("val", 2), ("test", 2)):
        for i in range(count):
            pixels = random.integers(0, 60, (slices, size, size), np.uint8)
            labels = (np.arange(slices) % 3 == 1).astype(np.int8)
            masks = np.zeros_like(pixels)
            for z in np.flatnonzero(labels):
                y, x = random.integers(2, size - 8, 2)
                masks[z, y : y + 5, x : x + 5] = 1
            pixels[:, :, 3] = 200
            pixels[masks > 0] = 200
            name = f"{split}{i}"
            found.append(SliceVolume(name, name, split, pixels, labels, masks, np.ones(slices, np.bool_)))
    return found


def mask_config(**changes) -> metastases_mask.Config:
    loop = FinetuneConfig(epochs=8, batch_size=4, learning_rate=1e-2, patience=0)
    given = {"size": SIZE, "width": 8, "levels": 2, "augment": None, "finetune": loop, **changes}
    return metastases_mask.Config(**given)


def config(**changes) -> metastases.Config:
    loop = FinetuneConfig(epochs=3, batch_size=8, learning_rate=3e-3, patience=0)
    return metastases.Config(**{"size": SIZE, "augment": None, "finetune": loop, **changes})


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """The folder of a trained mask network."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("masks")
    one = mask_config()
    result = finetune(metastases_mask.masks_task(one, volumes(8)), one.finetune, folder)
    assert result.test["dice"] > 0.6 and result.test["auc"] > 0.9
    return folder


def test_with_the_mask_the_classifier_finds_what_the_mask_network_found(masks, tmp_path):
    segmenter = load_segmenter(masks)
    data = volumes(8)
    shown = metastases.predicted(segmenter, data, "cpu")
    assert all(shown[v.key].shape == v.pixels.shape for v in data)
    with_mask = config(segmenter=str(masks))
    make, name = metastases.encoder_maker(with_mask, None)
    assert name == "none"
    task = metastases.slices_task(with_mask, data, shown, make, "a")
    assert task.train.sample(0, None).input.shape == (6, SIZE, SIZE)
    seen = finetune(task, with_mask.finetune, tmp_path / "mask")
    assert set(seen.test) == {"auc", "average_precision", "accuracy", "sensitivity", "specificity"}
    assert seen.test["auc"] > 0.9 and seen.test["average_precision"] > 0.8
    plain = config(attention=False)
    other = metastases.slices_task(plain, data, None, make, "a")
    assert other.train.sample(0, None).input.shape == (5, SIZE, SIZE)
    with pytest.raises(UserError, match="holds a training with task=metastases, not metastases, no mask"):
        finetune(other, plain.finetune, tmp_path / "mask")

    network = task.network()
    load_best(network, tmp_path / "mask")
    inputs = torch.from_numpy(np.stack([stack(data[-1].pixels, z, 5) for z in range(6)]))
    with torch.inference_mode():
        probability, mask = Detector(segmenter, network).eval()(inputs)
    places = [task.test.sample(i, None) for i in range(len(task.test)) if task.test.patients[i] == "test1"]
    alone = task.predict(network, torch.from_numpy(np.stack([s.input for s in places])))
    order = [1, 4, 0, 2, 3, 5]  # slices with a lesion are the first samples of a volume
    assert torch.allclose(probability[order].double(), torch.tensor(alone, dtype=torch.float64), atol=2e-2)
    assert mask.shape == (6, SIZE, SIZE)


def test_a_mask_training_that_was_stopped_goes_on_to_the_same_numbers(tmp_path):
    one = mask_config(augment=SliceAugment(), without_lesion=0.5)
    loop = one.finetune.model_copy(update={"epochs": 2})
    task = metastases_mask.masks_task(one, volumes(3))

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(task, loop, tmp_path / "a", progress=stop)
    assert finetune(task, loop, tmp_path / "a") == finetune(task, loop, tmp_path / "b")


def test_dice_and_the_score_of_a_mask_by_hand():
    truth = np.zeros((3, 16, 16), np.uint8)
    truth[0, :2, :4], truth[1, 0, :2] = 1, 1
    mine = np.zeros((3, 16, 16), bool)
    mine[0, :2, :2], mine[2, 0, 0] = True, True
    found = [metastases_mask.Found(np.packbits(m), top) for m, top in zip(mine, (0.9, 0.2, 0.6), strict=True)]
    got = metastases_mask.metrics(found, [np.packbits(t) for t in truth])
    assert got["dice"] == pytest.approx(2 * 4 / (5 + 10))
    assert got["dice_slices"] == pytest.approx((2 * 4 / (4 + 8) + 0) / 2)
    assert got["auc"] == 0.5 and got["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(metastases_mask.metrics(found[2:], [np.packbits(truth[2])])["dice"])


def test_a_pretrained_encoder_is_shown_the_middle_slice_with_the_mask_added_at_first():
    network = SliceClassifier(build_encoder("resnet-tiny", 3), 5, attention=True)
    weight = network.mix.weight.detach()[:, :, 0, 0]
    assert weight.shape == (3, 6)
    expected = torch.tensor([0.0, 0, 1, 0, 0, 1]).expand(3, 6)
    assert (weight - expected).abs().max() < 0.25 and not torch.equal(weight[0], weight[1])
    assert SliceClassifier(build_encoder("resnet-tiny", 3), 5, attention=False).mix.weight.shape[1] == 5


def test_neighbours_end_at_the_volume_and_move_together():
    pixels = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    assert (stack(pixels, 0, 5)[:, 0, 0] * 255).round().tolist() == [0, 0, 0, 1, 2]
    assert (stack(pixels, 3, 5)[:, 0, 0] * 255).round().tolist() == [1, 2, 3, 3, 3]
    images = np.zeros((3, 24, 24), np.float32)
    images[:, 8:12, 5:9] = 0.5
    config = SliceAugment(gain=(1, 1), offset=(0, 0))
    moved = augmented(images, config, np.random.default_rng(3), grey=2)
    assert np.allclose(moved[0], moved[2]) and not np.allclose(moved[0], images[0])
    brighter = augmented(images, SliceAugment(gain=(1.1, 1.1)), np.random.default_rng(3), grey=2)
    assert np.allclose(brighter[2], moved[2]) and brighter[0].max() > moved[0].max()


def test_slices_without_a_lesion_are_drawn_from_their_own_volume():
    data = volumes(2)[:2]
    places = places_of(data, 0.5, masks=True)
    assert [len(slices) for _, slices in places] == [1, 1, 4, 4] * 2
    random = np.random.default_rng(0)
    found = {drawn(places, 2, random)[1] for _ in range(60)}
    assert found == {0, 2, 3, 5} and drawn(places, 2, random)[0] is data[0]
    assert len(places_of(data, 1.0, masks=False)) == 12


def test_the_full_presets_have_the_sizes_of_the_paper():
    with torch.device("meta"):
        one = metastases.PRESETS["full"]
        network = SliceClassifier(build_encoder(one.backbone, 3), one.slices, one.attention)
        assert network(torch.empty(2, one.channels, one.size, one.size)).shape == (2,)
        assert 93e6 < sum(p.numel() for p in network.encoder.parameters()) < 95e6
        masks = Segmenter(metastases_mask.PRESETS["full"].shape)
        assert masks(torch.empty(2, 5, 224, 224)).shape == (2, 224, 224)
        folded = Segmenter(MaskShape(5, 4, 2, 4, 64))
        assert folded(torch.empty(2, 5, 64, 64)).shape == (2, 64, 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Generated patients, ingested with their volumes, labels and masks joined; an encoder."""
    folder = tmp_path_factory.mktemp("metastases")
    size = {"slices": (7, 8), "side": (64, 65)}
    generated.build(folder / "source", 10, seed=1, workers=1, **size)
    fractions = {"outputs": ("slices", "volumes"), "split_fractions": (0.5, 0.25, 0.25)}
    ingest(folder / "source", folder / "data", **fractions)
    for name, kind in (("slices", "classes"), ("masks", "masks")):
        join_labels(folder / "data", folder / "source" / f"{name}.csv", NAMES, name=name, kind=kind)
    about = EncoderInfo("resnet-tiny", 1, 7, ("mr",), "", 24, 0, "train", {"mr": IntensityConfig()})
    save_encoder(folder / "encoder.safetensors", build_backbone("resnet-tiny", 1), about)
    return folder


def call(place: Path, task: str, labels: str, out: Path, *arguments: str) -> int:
    small = ["finetune.epochs=1", f"size={SIZE}", "finetune.batch_size=16"]
    settings = [part for one in small for part in ("--set", one)]
    fixed = ["--data", str(place / "data"), "--labels", labels, "--output", str(out), "--device", "cpu"]
    return main(["finetune", task, *fixed, *settings, *arguments])


def test_from_dicom_files_to_both_results(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune_job, "DRAWS", 10)
    small = ["--set", "width=4", "--set", "levels=2"]
    assert call(place, "metastases-mask", "masks", tmp_path / "masks", *small) == 0
    tuned = ["--encoder", str(place / "encoder.safetensors"), "--set", f"segmenter={tmp_path / 'masks'}"]
    assert call(place, "metastases", "slices", tmp_path / "tuned", *tuned) == 0, capsys.readouterr().err
    tree = json.loads((tmp_path / "tuned" / "result.json").read_text())
    assert 0 <= tree["summary"][0]["test"]["auc"]["mean"] <= 1
    samples = catalog.counts(place / "data")["mr"]
    assert tree["rows"][0]["n_train"] == samples["train"]
    assert set(tree["inputs"]) == {"segmenter"}
    rows = catalog.load(place / "data", "mr").to_pylist()
    other = {"train": "test", "val": "val", "test": "train"}  # whom the mask network was trained on is test
    lines = [f"{row['key']},{i % 2},{other[row['split']]}" for i, row in enumerate(rows)]
    (tmp_path / "leak.csv").write_text("key,label,split\n" + "\n".join(lines) + "\n")
    capsys.readouterr()
    assert call(place, "metastases", str(tmp_path / "leak.csv"), tmp_path / "leak", *tuned) == 2
    assert "mask network was trained or chosen on" in capsys.readouterr().err


def test_a_lesion_of_one_pixel_is_still_there_when_its_slice_shrinks(place):
    row = catalog.load(place / "data", "mr_volumes").to_pylist()[0]
    mask = np.zeros((row["rows"], row["columns"]), np.uint8)
    empty = bytes(cv2.imencode(".png", mask)[1])
    mask[30, 31] = 255
    masks = dict(zip(row["slice_keys"], (bytes(cv2.imencode(".png", mask)[1]), empty), strict=False))
    (volume,) = read_slices(str(place / "data"), "mr", 16, masks=masks)
    assert volume.masks is not None
    assert volume.masks[0].any() and volume.masks[0].sum() <= 4 and not volume.masks[1:].any()


@pytest.mark.parametrize(
    ("task", "labels", "settings", "message"),
    [
        ("metastases", "slices", (), "the attention channel needs a mask network"),
        ("metastases", "slices", ("attention=false", "positive=7"), "no slice has the label '7'"),
        ("metastases", "masks", ("attention=false",), "has no column label"),
        ("metastases-mask", "slices", (), "has no column mask"),
        ("metastases", "slices", ("slices=4",), "slices=4 has no middle: use an odd number"),
        ("metastases-mask", "masks", ("size=50",), "no multiple of reduce"),
        ("metastases", "slices", ("attention=false", "modality=ct"), "the dataset has no volumes of ct"),
        ("metastases", "slices", ("segmenter=nowhere",), "holds no trained mask network"),
        ("metastases", "wrong.csv", ("attention=false",), "slices of one volume are in the splits"),
        ("metastases-mask", "small.parquet", (), "a mask is 5x5, its slice 64x"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, capsys, task, labels, settings, message):
    if labels == "wrong.csv":
        row = catalog.load(place / "data", "mr_volumes").to_pylist()[0]
        lines = [f"{key},{i % 2},{'train' if i % 2 else 'val'}" for i, key in enumerate(row["slice_keys"])]
        labels = str(tmp_path / "wrong.csv")
        Path(labels).write_text("key,label,split\n" + "\n".join(lines) + "\n")
    if labels == "small.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        key = catalog.load(place / "data", "mr").to_pylist()[0]["key"]
        png = bytes(cv2.imencode(".png", np.zeros((5, 5), np.uint8))[1])
        labels = str(tmp_path / "small.parquet")
        pq.write_table(pa.table({"key": [key], "mask": pa.array([png], pa.binary())}), labels)
    given = [part for one in settings for part in ("--set", one)]
    assert call(place, task, labels, tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error


def test_an_encoder_of_another_architecture_is_refused(place, tmp_path, capsys):
    given = ["--encoder", str(place / "encoder.safetensors"), "--set", "backbone=resnet18"]
    assert call(place, "metastases", "slices", tmp_path / "o", "--set", "attention=false", *given) == 2
    assert "holds a resnet-tiny, not backbone=resnet18" in capsys.readouterr().err
