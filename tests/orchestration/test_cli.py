"""Bad input gets one clear line and exit code 2; nothing is written or lost. No Ray is started here."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.cli import ingest_main, main
from shards.ids import create_key
from shards.store import OPS
from tests.batches.make import dataset
from tests.shards.make import PSEUDONYMS, build


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of several kinds of mistake, a key, a small dataset."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    for name in ("one.txt", "two.csv", "three.dcm"):
        (root / "texts" / name).write_text("no image at all\n")
    create_key(root / "key")
    (root / "open_key").write_text("00" * 32)
    (root / "open_key").chmod(0o644)
    dataset(root / "data", root / "scratch")
    return root


def one_line(capsys, *expected: str) -> str:
    err = capsys.readouterr().err.strip()
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in err
    for text in expected:
        assert text in last
    return last


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "{}/empty", "{}/out", "--key", "{}/key"], "empty"),
        (["run", "{}/texts", "{}/out", "--key", "{}/key"], "no DICOM"),
        (["run", "{}/nowhere", "{}/out", "--key", "{}/key"], "does not exist"),
        (["run", "{}/texts", "{}/out", "--key", "{}/nokey"], "ingest key"),
        (["run", "{}/texts", "{}/out", "--key", "{}/open_key"], "chmod 600"),
        (["run", "{}/texts", "{}/out"], "no DICOM"),
        (["run", "{}/texts", "{}/data"], "first `ingest run`"),
        (["run", "{}/texts"], "output folder"),
        (["run", "{}/texts", "{}/out", "--key", "{}/key", "--set", "colour=1"], "colour"),
        (["run", "{}/texts", "{}/out", "--key", "{}/key", "--set", "codec=jpeg"], "codec"),
        (["run", "{}/texts", "{}/out", "--key", "{}/key", "--config", "{}/nowhere.yaml"], "configuration"),
        (["plan", "{}/empty"], "empty"),
        (["status", "{}/empty"], "no dataset"),
        (["verify", "{}/empty"], "no dataset"),
        (["label", "{}/data", "{}/nowhere.csv", "--key", "{}/key"], "key"),
        (["key", "{}/key"], "exists already"),
        (["convert"], "No such command"),
        (["run", "--fast"], "No such option"),
    ],
)
def test_bad_input_of_ingest_is_one_line_and_code_2(inputs, capsys, monkeypatch, arguments, expected):
    monkeypatch.delenv("MEDSWAV_KEY", raising=False)
    assert ingest_main([argument.format(inputs) for argument in arguments]) == 2
    one_line(capsys, expected)
    assert not (inputs / "out").exists()
    assert not (inputs / "out.key").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "nosuch"], "no preset is called 'nosuch'"),
        (["--preset", "nosuch.yaml"], "does not exist"),
        (["--set", "data.batch_size=31"], "use 30 or 33"),
        (["--set", "data.batch_size=33", "--ranks", "2"], "multiple of 6"),
        (["--set", "swav.queue_length=13"], "nearest valid lengths"),
        (["--set", "model.depth=3"], "unknown setting model.depth"),
        (["--set", "seed"], "a.b=value"),
        (["--dataset", "{}/empty"], "no dataset"),
        (["--set", "data.modalities=[ct,us,mr]"], "no mr images"),
        (["--ranks", "0"], "--ranks"),
    ],
)
def test_bad_input_of_pretrain_is_one_line_and_code_2(inputs, tmp_path, capsys, arguments, expected):
    good = ["pretrain", "--dataset", f"{inputs}/data", "--run-dir", str(tmp_path / "run")]
    settings = ["--set", "data.modalities=[ct,us,xr]", "--set", "data.batch_size=12"]
    given = [argument.format(inputs) for argument in arguments]
    assert main([*good, *settings, *given]) == 2
    one_line(capsys, expected)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_an_output_folder_of_another_configuration_is_refused_by_name(inputs, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    arguments = ["run", str(source), f"{inputs}/data", "--key", f"{inputs}/key"]
    before = sorted(p.name for p in (inputs / "data").rglob("*"))
    assert ingest_main([*arguments, "--set", "codec=png16"]) == 2
    one_line(capsys, "codec was", "another output folder")
    assert sorted(p.name for p in (inputs / "data").rglob("*")) == before


def test_labels_under_another_key_are_refused(inputs, capsys):
    labels = inputs / "labels.csv"
    labels.write_text("file,label\na,1\n")
    assert ingest_main(["label", f"{inputs}/data", str(labels), "--key", f"{inputs}/key"]) == 2
    one_line(capsys, "not the one of the dataset", PSEUDONYMS.key_id)


def test_a_full_disk_is_one_line_and_code_2(inputs, tmp_path, capsys, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "image").write_bytes(bytes(128) + b"DICM" + bytes(400))

    def full(operation: str) -> None:
        if operation == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(OPS, "before", full)
    arguments = ["run", str(source), str(tmp_path / "out"), "--key", f"{inputs}/key"]
    assert ingest_main(arguments) == 2
    one_line(capsys, "disk is full")


def test_an_interrupt_is_code_130(capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestration.ingest_report.status_report", interrupt)
    assert ingest_main(["status", "anything"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_status_and_verify_of_a_dataset(tmp_path, capsys):
    build(tmp_path / "data", tmp_path / "scratch", units=2, number=4)
    assert ingest_main(["status", str(tmp_path / "data"), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["units_committed"] == 2
    assert sum(status["quarantined"].values()) == 2
    assert ingest_main(["verify", str(tmp_path / "data"), "--deep"]) == 0
    assert capsys.readouterr().out.startswith("clean: 2 units, 8 images")


def test_verify_of_a_damaged_dataset_is_code_1(tmp_path, capsys):
    dataset(tmp_path / "data", tmp_path / "scratch")
    shard = next((tmp_path / "data" / "shards").rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    assert ingest_main(["verify", str(tmp_path / "data")]) == 1
    assert "problems" in capsys.readouterr().out


def test_fit_energy_writes_a_file_once(inputs, tmp_path, capsys):
    arguments = ["fit-energy", str(tmp_path / "bands.json"), "--dataset", f"{inputs}/data"]
    arguments += ["--set", "data.modalities=[ct]"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out == "ct: 11 images\n" and "fit-energy: 11/11 images" in told.err and "ETA 0:00" in told.err
    written = (tmp_path / "bands.json").read_bytes()
    assert json.loads(written)["version"] == 1
    assert main(arguments) == 2
    one_line(capsys, "exists already")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("bands.json", written)]


def test_a_folder_s_name_is_never_read_as_yaml(inputs, tmp_path):
    folder = tmp_path / "study #2: a"
    folder.symlink_to(f"{inputs}/data")
    arguments = ["fit-energy", str(tmp_path / "bands.json"), "--dataset", str(folder), "--images", "2"]
    assert main([*arguments, "--set", "data.modalities=[ct]"]) == 0


def test_the_command_line_imports_neither_ray_nor_torch_nor_numpy():
    code = (
        "import sys; from orchestration.cli import main, ingest_main; main(['--help']);"
        "sys.exit(bool({'ray', 'torch', 'numpy', 'cv2', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


def test_every_command_has_a_help_text(capsys):
    for command in ("pretrain", "submit", "fit-energy", "probe", "doctor", "demo", "bench", "ingest"):
        assert main([command, "--help"]) == 0
        assert len(capsys.readouterr().out) > 200
