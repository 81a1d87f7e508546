"""`medswav demo --task`: what is refused before anything is made, and steps that are not done twice."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration import demo_haemorrhage, demo_tasks
from orchestration.cli import main
from orchestration.demo_tasks import TaskOptions
from shards.errors import UserError
from trainer.downstream.haemorrhage import PRESETS


def options(folder: Path, **changes) -> TaskOptions:
    return replace(TaskOptions("haemorrhage", folder, stream=io.StringIO()), **changes)


def test_tasks_and_options_that_do_not_go_together_are_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("")
    for given, said in (
        (["--task", "stroke", "--output", str(tmp_path / "a")], "there is no demo of the task 'stroke'"),
        (["--task", "haemorrhage", "--source", str(tmp_path)], "leave --source and --labels away"),
        (["--task", "haemorrhage", "--output", str(tmp_path / "own")], "holds no demo: give a new folder"),
        (
            ["--task", "haemorrhage", "--output", str(tmp_path / "b"), "--set", "max_stps=3"],
            "max_stps",
        ),
    ):
        assert main(["demo", *given]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_another_demo_in_the_folder_is_refused_and_the_same_goes_on(tmp_path):
    made = []

    def build(folder, told):
        made.append(folder.name)
        folder.mkdir()
        (folder / "file").write_text("x")
        told(1, 1)

    for _ in range(2):
        log = demo_tasks.begin(options(tmp_path), {"patients": 4})
        demo_tasks.generate(options(tmp_path), log, build, 4)
    assert made == ["source.partial"] and [p.name for p in (tmp_path / "source").iterdir()] == ["file"]
    with pytest.raises(UserError, match="another patients: give a new folder"):
        demo_tasks.begin(options(tmp_path), {"patients": 5})


def test_the_pretraining_of_the_demo_makes_the_encoder_that_its_fine_tuning_takes(tmp_path):
    config = demo_haemorrhage.pretraining(options(tmp_path, overrides=("max_steps=7",)))
    assert config.max_steps == 7 and config.model.backbone == "densenet3d"
    assert config.data.split == "train"  # it sees no volume of val and test
    assert config.views.volume is not None and config.views.volume.box == PRESETS["small"].box
