"""`medswav finetune` as a person calls it: trainings, their table, a resume, and one line for a mistake."""

import json
from pathlib import Path

import numpy as np
import pytest

from orchestration import finetune_job
from orchestration.cli import main
from shards import catalog
from tests.batches import make
from trainer.config import IntensityConfig
from trainer.downstream.images import NO_AUGMENTATION, AugmentConfig, augmented
from trainer.export import EncoderInfo, save_encoder
from trainer.models.resnet import build_backbone

SMALL = ["--set", "finetune.epochs=2", "--set", "finetune.batch_size=4", "--device", "cpu"]
RANDOM = ["--set", "backbone=resnet-tiny", "--set", "size=24"]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_job, "DRAWS", 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, an encoder, and CSV tables of labels: patient n has the class n % 2, and a split."""
    folder = tmp_path_factory.mktemp("finetune")
    dataset = make.dataset(folder / "data", folder / "scratch")
    rows = catalog.load(dataset, columns=["key", "patient", "modality"]).to_pylist()
    patients = sorted({row["patient"] for row in rows})
    lines = []
    for row in rows:
        n = patients.index(row["patient"])
        split = "test" if n % 4 > 1 and n > 5 else "val" if n in (2, 3) else "train"
        lines.append((row["key"], "ab"[n % 2], split, row["modality"]))
    tables = {
        "labels": ["key,label,split", *(f"{k},{c},{s}" for k, c, s, _ in lines)],
        "nothing": ["key,diagnosis", *(f"{k},{c}" for k, c, _, _ in lines)],
        "twice": ["key,label", f"{lines[0][0]},a", f"{lines[0][0]},b"],
        "strangers": ["key,label", "abc,a"],
        "leak": ["key,label,split", *(f"{k},{c},{'val' if m == 'ct' else s}" for k, c, s, m in lines)],
        "new": ["key,label,split", *(f"{k},{'c' if s == 'test' else c},{s}" for k, c, s, _ in lines)],
        "findings": ["key,labels,split", *(f"{k},{'x;y' if c == 'a' else ''},{s}" for k, c, s, _ in lines)],
    }
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text("\n".join(text) + "\n")
    about = EncoderInfo("resnet-tiny", 1, 7, ("ct",), "", 24, 0, "train", {"ct": IntensityConfig()})
    save_encoder(folder / "encoder.safetensors", build_backbone("resnet-tiny", 1), about)
    return folder


def call(place: Path, capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["finetune", "classify", "--data", str(place / "data"), *arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def table(place: Path, name: str = "labels") -> list[str]:
    return ["--labels", str(place / f"{name}.csv")]


def test_fractions_and_seeds_are_trained_and_the_same_command_goes_on_to_the_same_result(
    place, capsys, tmp_path
):
    command = [*table(place), *RANDOM, *SMALL, "--fraction", "1", "--fraction", ".5", "--seeds", "2"]
    out = tmp_path / "run"
    code, text, err = call(place, capsys, *command, "--output", str(out))
    assert code == 0 and "| 50 % (" in text and "mean of 2 seeds" in text and "ETA" in err
    first = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.*") if p.is_file()}
    tree = json.loads((out / "result.json").read_text())
    assert [(row["fraction"], row["seed"]) for row in tree["rows"]] == [(1, 0), (1, 1), (0.5, 0), (0.5, 1)]
    whole, half = tree["summary"]
    assert half["n_patients"] == round(whole["n_patients"] / 2) and half["seeds"] == [0, 1]
    auc = whole["test"]["auc"]
    assert auc["low"] <= auc["mean"] <= auc["high"] and auc["n"] == 2
    for cell in ("fraction-1/seed-1", "fraction-0.5/seed-0"):  # as after a kill between the files
        (out / cell / "result.json").unlink()
        (out / cell / "metrics.jsonl").unlink()
    (out / "fraction-0.5/seed-1/test.json").unlink()
    code, again, _ = call(place, capsys, *command, "--output", str(out), "--json")
    assert code == 0 and json.loads(again) == tree
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*.*") if p.is_file()} == first
    code, text, _ = call(place, capsys, *command[:-2], "--fraction", ".25", "--output", str(out))
    assert code == 0 and "| 25 % (" in text and "| 100 % (" in text  # a fraction is added to the folder


@pytest.mark.parametrize("name", ["labels", "findings"])
def test_a_linear_head_on_a_frozen_encoder_and_on_pixels(place, capsys, tmp_path, name):
    for number, given in enumerate(
        (["--encoder", str(place / "encoder.safetensors")], ["--set", "features=pixels"])
    ):
        out = str(tmp_path / str(number))
        code, text, err = call(
            place, capsys, *table(place, name), *given, *SMALL, "--mode", "frozen", "--output", out
        )
        assert code == 0, err
        assert "auc" in text


def test_what_does_not_fit_is_refused_in_one_line(place, capsys, tmp_path):
    encoder = ["--encoder", str(place / "encoder.safetensors")]
    other = tmp_path / "other"
    assert call(place, capsys, *table(place), *encoder, *SMALL, "--output", str(other))[0] == 0
    for given, said in {
        (*table(place, "nothing"), *encoder): "has no column label or labels",
        (*table(place, "twice"), *encoder): "each key once",
        (*table(place, "strangers"), *encoder): "none of the 1 keys",
        (*table(place, "leak"), *encoder): "patients are in two splits",
        (*table(place, "new"), *encoder): "no training image has the label 'c'",
        (*table(place, "gone"), *encoder): "there is no label table",
        ("--labels", "unheard", *encoder): "has no labels 'unheard'",
        (*table(place), *encoder, "--set", "backbone=resnet50"): "holds a resnet-tiny, not backbone=resnet50",
        (*table(place), "--encoder", "nowhere"): "there is no encoder nowhere",
        (*table(place), "--encoder", "none"): "random weights need a network",
        (*table(place), *encoder, "--set", "colour=1"): "colour",
        (*table(place), *encoder, "--set", "finetune.seed=1"): "use --seeds",
        (*table(place), *encoder, "--fraction", "2"): "--fraction 2 must be above 0",
        (*table(place), *encoder, "--preset", "huge"): "choose from small, full",
        (*encoder,): "finetune needs --labels",
    }.items():
        code, _, err = call(place, capsys, *given, *SMALL, "--output", str(tmp_path / "new"))
        assert (code, err.count("\n")) == (2, 1) and said in err, err
    assert not (tmp_path / "new" / "run.json").exists()
    code, _, err = call(
        place, capsys, *table(place), *encoder, "--mode", "frozen", *SMALL, "--output", str(other)
    )
    assert code == 2 and "other holds trainings with mode=full, not frozen: give another --output" in err
    code, _, err = call(place, capsys, *table(place), *RANDOM, *SMALL, "--output", str(other))
    assert code == 2 and "holds trainings with another encoder" in err
    assert main(["finetune", "walk", "--data", "x", "--labels", "y", "--output", "z"]) == 2
    assert "there is no task 'walk'" in capsys.readouterr().err


def test_weights_of_a_library_have_a_file_for_each_name(tmp_path, monkeypatch):
    saved = lambda name, path: path.write_text(name)  # noqa: E731
    monkeypatch.setattr("trainer.downstream.library.save_library_encoder", saved)
    names = ["torchvision:A.V1", "torchvision:B.V1", "torchvision:A.V1"]
    found = [finetune_job.encoder_file(name, tmp_path) for name in names]
    assert [path.read_text() for path in found] == names and found[0] == found[2]


def test_explain_takes_a_step_and_counts_it(capsys):
    command = ["finetune", "classify", "--explain", "--json", "--set", "finetune.batch_size=4"]
    assert main([*command, *RANDOM, "--set", "size=32"]) == 0
    tiny = json.loads(capsys.readouterr().out)
    assert main([*command, *RANDOM, "--set", "size=64"]) == 0
    large = json.loads(capsys.readouterr().out)
    parameters = sum(p.numel() for p in build_backbone("resnet-tiny", 1).parameters()) + 2 * 128 + 2
    assert tiny["parameters"] == tiny["trained"] == parameters
    assert 3.9 < large["flops"] / tiny["flops"] < 4.1 and tiny["loss"] > 0
    assert (
        tiny["memory_bytes"] > 4 * 4 * parameters and large["activation_bytes"] > 3 * tiny["activation_bytes"]
    )


def test_augmentation_is_off_by_zeros_mirrors_shifts_and_keeps_the_range():
    image = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)
    random = np.random.default_rng(0)
    assert np.array_equal(augmented(image, NO_AUGMENTATION, random), image)
    mirrored = augmented(image, NO_AUGMENTATION.model_copy(update={"flip": 1.0}), random)
    assert np.allclose(mirrored, image[:, ::-1], atol=1e-5)
    strong = AugmentConfig(flip=0.5, shift=0.2, crop=(0.5, 1.5), gamma=(0.3, 3))
    for seed in range(20):
        one, again = (augmented(image, strong, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(one, again) and one.shape == image.shape and 0 <= one.min() <= one.max() <= 1
    halved = augmented(image, NO_AUGMENTATION.model_copy(update={"crop": (0.5, 0.5)}), random)
    assert halved[10, 15] == pytest.approx(image[10, 15], abs=0.02)  # the middle stays
    assert np.ptp(halved) == pytest.approx(np.ptp(image) / 2, rel=0.05)
