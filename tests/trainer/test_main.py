"""The command `python -m trainer` on a small real dataset: exit codes, signals, one line for a mistake."""

import dataclasses
import io
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from orchestration.demo_evaluate import prototype_use
from orchestration.pretrain_job import pretrain
from shards import catalog
from shards.commit import commit_unit
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.ids import digest
from shards.store import Store
from tests.shards.make import info, samples
from tests.trainer.fake import tiny
from trainer import checkpoint, journal
from trainer.__main__ import main
from trainer.batches import BatchMaker, open_modality
from trainer.config import TrainConfig, load_config
from trainer.export import load_encoder
from trainer.export_heads import load_heads
from trainer.prepare import bands_digest, dataset_fingerprint, prepare

ROOT = Path(__file__).parents[2]


def add_unit(store: Store, scratch: Path, modality: str, first: int = 0) -> None:
    unit = digest("unit", modality, str(first))
    commit_unit(store, unit, samples(unit, modality, first, 12), [], scratch, 12)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    store = Store(folder / "root")
    open_or_create(store, info())
    for modality in ("ct", "xr"):
        add_unit(store, folder / "scratch", modality)
    return folder / "root"


@pytest.fixture(scope="module")
def preset(dataset) -> Path:
    """The tiny run, on the dataset, with the energy augmentation."""
    config = tiny(views__energy_probability=0.8, views__sigmas=[1, 2], data__split="all", log_every_steps=1)
    tree = config.model_dump(mode="json")
    tree["data"]["dataset"] = str(dataset)
    path = dataset.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(preset: Path, run_dir: Path, *more: str) -> list[str]:
    run = ["--preset", str(preset), "--run-dir", str(run_dir), "--device", "cpu", *more]
    return [sys.executable, "-m", "trainer", *run]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in journal.read(journal.journal_path(run_dir))]


def test_sigterm_saves_and_exits_130_and_the_same_command_goes_on_exactly(preset, tmp_path):
    more = ("--set", "max_steps=40", "--set", "checkpoint.every_steps=100")
    first = subprocess.Popen(
        command(preset, tmp_path / "run", *more),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("step 3/40"):
            first.send_signal(signal.SIGTERM)
            first.send_signal(signal.SIGINT)  # torchrun sends one more after Ctrl-C
            break
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    (step,) = checkpoint.list_steps(tmp_path / "run")
    assert 3 <= step < 40
    assert output == f"stopped at step {step}, checkpoint saved: the same command continues\n"
    # Without worker processes, in this process: neither changes a loss.
    rest = [*command(preset, tmp_path / "run", *more)[3:], "--workers", "0"]
    assert main(rest) == 0
    assert main([*command(preset, tmp_path / "straight", *more)[3:], "--workers", "0"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "run")) == 40


def test_labels_of_the_dataset_train_heads_and_a_changed_table_is_refused(preset, dataset, tmp_path, capsys):
    keys = catalog.load(dataset, columns=["key"])["key"].to_pylist()
    table = pa.table({"key": keys[1:], "label": [f"c{i % 2}" for i in range(len(keys) - 1)]})
    catalog.write_labels(Store(dataset), "finding", table)
    more = ["--set", "supervision.labels=[{name: finding}]", "--set", "swav.groups=shared"]
    arguments = [*command(preset, tmp_path)[3:], "--workers", "1", "--set", "max_steps=4", *more]
    assert main(arguments) == 0
    assert load_heads(tmp_path / "heads.safetensors")["finding"].classes == ("c0", "c1")
    assert losses(tmp_path)
    use = prototype_use(dataset, tmp_path)  # the checkpoint of a run with labels, and one group for all
    assert {m: sum(counts) for m, counts in use.items()} == {"ct": 12, "xr": 12}
    catalog.write_labels(Store(dataset), "finding", table.slice(1))
    assert main(arguments) == 2
    assert "the labels 'finding' are not those that the run began with" in capsys.readouterr().err


def test_a_finished_run_has_an_encoder_and_says_that_nothing_is_left_to_do(preset, tmp_path, capsys):
    arguments = [*command(preset, tmp_path)[3:], "--workers", "0", "--set", "max_steps=4"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.startswith("finished 4 steps; the encoder is")
    assert "step 4/4  loss" in told.err and "left" in told.err
    _, about = load_encoder(tmp_path / "encoder.safetensors")
    assert (about.step, about.modalities, about.backbone) == (4, ("ct", "xr"), "resnet-tiny")
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("nothing to do: the run was complete at step 4")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--set", "optim.learning_rat=1"], "unknown setting optim.learning_rat"),
        (["--set", "data.batch_size=9"], "is no multiple of the 2 modalities: use 8 or 10"),
        (["--set", "data.dataset=/nowhere"], "dataset"),
        (["--set", "data.dataset=''"], "data.dataset is not set"),
        (["--set", "data.modalities=[ct, us]"], "the dataset has no us images"),
        (["--preset", "papper"], "no preset is called 'papper': choose from demo, paper_2d_mixed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(preset, tmp_path, capsys, more, text):
    assert main([*command(preset, tmp_path)[3:], *more, "--workers", "0"]) == 2
    told = capsys.readouterr().err
    assert text in told and told.startswith("error: ") and told.count("\n") == 1


def test_world_size_that_cannot_share_a_batch_is_refused(preset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert main(command(preset, tmp_path)[3:]) == 2
    assert "use a batch_size that is a multiple of 6" in capsys.readouterr().err


def config_of(preset: Path) -> TrainConfig:
    return load_config(str(preset))


def test_band_statistics_are_fitted_once_a_run_and_kept(preset, tmp_path, monkeypatch):
    config = config_of(preset)
    first = prepare(config, tmp_path)
    data = (tmp_path / "bands.json").read_bytes()
    assert prepare(config, tmp_path) == first and (tmp_path / "bands.json").read_bytes() == data
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)

    def never(*_: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("trainer.prepare.fit_bands", never)
    assert prepare(config, tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bands.json", "checkpoints"]


def test_the_digest_of_the_band_statistics_changes_with_any_number(preset, tmp_path):
    bands = prepare(config_of(preset), tmp_path).bands
    assert bands is not None
    ct = bands["ct"]
    other = dataclasses.replace(ct, mean=(ct.mean[0] * (1 + 1e-15), *ct.mean[1:]))
    assert bands_digest({**bands, "ct": other}) != bands_digest(bands) == bands_digest(dict(bands))


def test_the_fingerprint_changes_with_the_data_alone(dataset, tmp_path):
    before = dataset_fingerprint(str(dataset))
    assert dataset_fingerprint(str(dataset)) == before
    store = Store(tmp_path / "copy")
    open_or_create(store, info())
    for modality in ("ct", "xr"):
        add_unit(store, tmp_path / "scratch", modality)
    assert dataset_fingerprint(str(tmp_path / "copy")) == before
    add_unit(store, tmp_path / "scratch", "ct", 100)
    assert dataset_fingerprint(str(tmp_path / "copy")) != before


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_world_size_trains_on_the_same_samples_in_the_same_steps(preset, tmp_path, world):
    config = config_of(preset)
    bands = prepare(config, tmp_path).bands
    makers = [BatchMaker(config, rank, world, bands) for rank in range(world)]
    for step in (0, 7):
        parts = [maker(step) for maker in makers]
        whole = BatchMaker(config, 0, 1, bands)(step)
        assert sorted(key for part in parts for key in part.keys) == sorted(whole.keys)
        of = {
            key: m
            for m in config.data.modalities
            for key in open_modality(config.data, m).table["key"].to_pylist()
        }
        for part in parts:  # G14: equal subsets of each modality on every rank
            share = config.data.per_modality // world
            assert Counter(of[key] for key in part.keys) == dict.fromkeys(config.data.modalities, share)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("views.gamma=[-2, -1]", "must be above 0"),
        ("views.gamma=[0, 1]", "must be above 0"),
        ("views.gamma=[2, 1]", "must be a rising range"),
        ("views.linear_gain=[3, 1]", "must be a rising range"),
        ("views.linear_offset=[.nan, 1]", "must be a rising range"),
        ("optim.momentum=1", "optim.momentum"),
        ("optim.momentum=-0.1", "optim.momentum"),
        ("optim.warmup_steps=100001", "optim.warmup_steps=100001 is more than max_steps"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(setting, text):
    with pytest.raises(UserError, match=text):
        load_config("paper_2d_xray", [setting, "max_steps=100000"])


def test_a_stop_during_the_fit_of_the_bands_exits_130_and_leaves_nothing(
    preset, tmp_path, monkeypatch, capsys
):
    def fit(config, progress):
        signal.raise_signal(signal.SIGTERM)
        progress(1, 24)
        raise AssertionError("went on")

    monkeypatch.setattr("trainer.prepare.fit_bands", fit)
    assert main([*command(preset, tmp_path / "run")[3:], "--workers", "0"]) == 130
    assert "stopped before the first step" in capsys.readouterr().err
    result = pretrain(config_of(preset), tmp_path / "ray", stream=io.StringIO())
    assert (result.exit_code, result.step) == (130, 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_fit_of_the_bands_tells_each_image(preset, tmp_path):
    seen: list[tuple[int, int]] = []
    prepare(config_of(preset), tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 24) for done in range(1, 25)]
