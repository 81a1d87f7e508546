"""`medswav export`, `embed` and `assign` as a person calls them: files, summaries, one line for a mistake."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch

from orchestration.cli import main
from tests.batches import make
from tests.encoders.conftest import config, trained
from trainer.models.resnet import build_backbone


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and an unfinished run on it."""
    folder = tmp_path_factory.mktemp("model")
    dataset = make.dataset(folder / "data", folder / "scratch")
    trained(config(dataset), folder / "run", stop=True)
    safetensors.torch.save_file(build_backbone("resnet-tiny").state_dict(), folder / "bare.safetensors")
    (folder / "there.parquet").write_text("keep me")
    return folder


def call(place: Path, capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([argument.format(place) for argument in arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_run_is_exported_with_its_card_and_embedded_from_the_file(place, capsys, tmp_path):
    out = str(tmp_path / "e.safetensors")
    code, text, _ = call(place, capsys, "export", "{}/run", "--out", out)
    assert code == 0 and "resnet-tiny of step 6 (the run is not finished)" in text
    assert "Not a medical device" in (tmp_path / "e.safetensors.md").read_text()
    table = str(tmp_path / "f.parquet")
    code, text, err = call(
        place,
        capsys,
        "embed",
        "--dataset",
        "{}/data",
        "--encoder",
        out,
        "--out",
        table,
        "--json",
        "--device",
        "cpu",
    )
    facts = json.loads(text)
    assert code == 0 and "embed: 33/33 images" in err and "ETA" in err
    assert facts["images"] == 33 and facts["features"] == 128 and facts["step"] == 6
    assert facts["modalities"]["ct"] == {"train": 11, "val": 0, "test": 2}
    assert pq.read_table(table).num_rows == 33


def test_assign_writes_table_and_sheet(place, capsys, tmp_path):
    table, sheet = str(tmp_path / "a.parquet"), str(tmp_path / "s.html")
    command = ["assign", "--dataset", "{}/data", "--run", "{}/run", "--out", table, "--sheet", sheet]
    code, text, _ = call(place, capsys, *command, "--nearest", "2", "--modality", "ct", "--device", "cpu")
    assert code == 0 and "of 8 prototypes have images" in text and "as sensitive as the dataset" in text
    assert set(pq.read_table(table)["modality"].to_pylist()) == {"ct"}
    assert "<h2>CT</h2>" in Path(sheet).read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "{}/nowhere", "--out", "{}/e.safetensors"], "does not exist"),
        (["export", "{}/data", "--out", "{}/e.safetensors"], "is no run folder"),
        (["export", "{}/bare.safetensors", "--out", "{}/e.safetensors"], "no description of an encoder"),
        (["export", "{}/run", "--out", "{}/e.onnx"], "call it e.safetensors"),
        (["export", "{}/run", "--out", "{}/bare.safetensors"], "exists already"),
        (["export", "{}/run", "--out", "{}/e.safetensors", "--format", "caffe"], "'caffe' is not one of"),
        (
            ["export", "{}/run", "--out", "{}/e.safetensors", "--format", "timm"],
            "no network like resnet-tiny",
        ),
        (["export", "{}/run", "--out", "{}/e.safetensors", "--channels", "2"], "1 or 3 channels"),
        (["export", "{}/run", "--out", "{}/e.safetensors", "--backbone", "os:abort"], "not os:abort"),
        (
            ["embed", "--dataset", "{}/data", "--encoder", "{}/run", "--out", "{}/there.parquet"],
            "exists already",
        ),
        (["embed", "--dataset", "{}/run", "--encoder", "{}/run", "--out", "{}/f.parquet"], "is no dataset"),
        (
            [
                "embed",
                "--dataset",
                "{}/data",
                "--encoder",
                "{}/run",
                "--out",
                "{}/f.parquet",
                "--split",
                "dev",
            ],
            "dev",
        ),
        (["embed", "--dataset", "{}/data", "--encoder", "{}/run", "--out", "s3://b/f.parquet"], "local path"),
        (
            [
                "embed",
                "--dataset",
                "{}/data",
                "--encoder",
                "{}/run",
                "--out",
                "{}/f.parquet",
                "--modality",
                "mr",
            ],
            "no mr",
        ),
        (["assign", "--dataset", "{}/data", "--run", "{}/run", "--out", "{}/a.csv"], "call it a.parquet"),
        (
            [
                "assign",
                "--dataset",
                "{}/data",
                "--run",
                "{}/run",
                "--out",
                "{}/a.parquet",
                "--sheet",
                "{}/data/s.html",
            ],
            "lies inside the dataset",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2_and_writes_nothing(place, capsys, arguments, said):
    before = {p: p.stat().st_mtime_ns for p in place.iterdir()}
    code, _, err = call(place, capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and said in last and "Traceback" not in err
    assert {p: p.stat().st_mtime_ns for p in place.iterdir()} == before


@pytest.mark.parametrize("command", ["export", "embed", "assign"])
def test_help_has_an_example(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"Example: medswav {command} " in " ".join(capsys.readouterr().out.split())
