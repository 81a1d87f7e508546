"""The page of a run says how it stands and what is wrong, loads nothing, and shows no picture unasked."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest

from orchestration import run_list
from orchestration.cli import main
from orchestration.report_figures import Line, line_chart
from orchestration.run_data import gather
from orchestration.run_findings import findings
from orchestration.run_report import report
from shards.errors import UserError
from tests.batches.make import MODALITIES, dataset
from tests.browser import BROWSER, DESKTOP, PHONE, look
from tests.report.runs import OneImage, full, run, starve
from tests.report.test_report import Outline
from trainer import files, journal, run_state
from trainer.batches import BatchMaker
from trainer.config import load_config, text_setting
from trainer.files import DiskFullError
from trainer.loop import train
from trainer.prepare import prepare

SECTIONS = ("attention", "loss", "prototypes", "entropies", "features", "rate", "use", "speed", "checkpoints")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "good")


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "collapsed", OneImage, swav__prototypes=6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on a real (if small) dataset, which has pictures; `dataset` lies beside it."""
    root = tmp_path_factory.mktemp("trained")
    place = dataset(root / "dataset", root / "scratch")
    settings = [
        text_setting("data.dataset", place),
        f"data.modalities=[{','.join(MODALITIES)}]",
        "data.batch_size=6",
        "max_steps=4",
        "log_every_steps=2",
        "checkpoint.every_steps=2",
        "swav.prototypes=4",
        "swav.freeze_prototypes_steps=1",
    ]
    config = load_config("demo", settings)
    found = prepare(config, root / "run")
    about = {"dataset_fingerprint": found.dataset_fingerprint, "bands_digest": found.bands_digest}
    train(config, BatchMaker(config, 0, 1, found.bands), root / "run", **about)
    return root / "run"


def page_of(tmp_path: Path, *runs: Path, **options) -> str:
    given = {"dataset": None, "pictures": True, "sheet_images": 8, "as_json": False} | options
    out = tmp_path / "page.html"
    report(runs, out, **given)
    return out.read_text()


def kinds(run_dir: Path) -> list[str]:
    return [one.kind for one in findings(gather(run_dir))]


def test_a_page_has_every_section_with_its_curves_and_loads_nothing(good, tmp_path):
    text = page_of(tmp_path, good)
    outline = Outline(text)
    assert set(SECTIONS) <= set(outline.ids) and outline.open == [] and "settings" in outline.ids
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", text)
    assert text.count('<path class="line ') > 12 and "ln K = 2.08" in text
    assert "24 of 24" in text and "done" in text and (tmp_path / "page.html").stat().st_mode & 0o077 == 0
    assert str(good) not in text and "madeup" not in text


def test_a_page_while_a_run_goes_on_and_before_its_first_step(tmp_path, good):
    state = run_state.of_this_process(1, 0, 1, "cpu", "", run_state.read(good).config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(state.__dict__))
    text = page_of(tmp_path, tmp_path / "run")
    assert "No step is logged yet" in text and ">running<" in text and "no checkpoint yet" in text


def test_a_collapsed_run_is_named_with_the_advice_of_its_alarm(collapsed, tmp_path):
    text = page_of(tmp_path, collapsed)
    assert "one_point" in kinds(collapsed) and "<h1>Features are one point (collapse)" in text
    assert "freeze the prototypes longer" in text and "docs/diagnostics.md" in text


@pytest.mark.parametrize(("stage", "advice"), [("read", "node_cache"), ("decode", "--feeders")])
def test_a_starved_run_is_told_which_part_of_making_a_batch_is_slow(good, tmp_path, stage, advice):
    where = starve(Path(shutil.copytree(good, tmp_path / "run")), stage)
    (found,) = [one for one in findings(gather(where)) if one.kind == "starved"]
    assert found.title.startswith("75%") and advice in found.advice and "1,700 ms" in found.advice


def test_a_run_that_filled_its_disk_says_so_though_nothing_could_be_written(tmp_path, monkeypatch):
    where = tmp_path / "run"

    def before(operation: str, path: Path) -> None:
        if (where / "checkpoints" / "step-00000006").exists():
            full(operation, path)

    monkeypatch.setattr(files, "before", before)
    with pytest.raises(DiskFullError):
        run(where, checkpoint__every_steps=6, max_steps=14)
    monkeypatch.undo()
    assert kinds(where)[0] == "disk_full" and gather(where).standing.state == "broken"
    assert "free some space" in page_of(tmp_path, where)


def test_a_process_that_was_killed_is_not_taken_for_a_running_one(good, tmp_path):
    state = run_state.read(good)
    where, now = tmp_path, 1e9
    mine = run_state.of_this_process(1, 0, 1, "cpu", "", state.config)
    assert run_state.standing(where, mine, now).state == "running"
    gone = run_state.RunState(**{**mine.__dict__, "process": 1})
    assert run_state.standing(where, gone, now).state == "stopped"
    other = run_state.RunState(**{**mine.__dict__, "host": "another"})
    (where / "timing.jsonl").write_text("")
    written = (where / "timing.jsonl").stat().st_mtime
    assert run_state.standing(where, other, written + 10).state == "running"
    assert "no sign of life" in run_state.standing(where, other, written + 1000).why


def test_several_runs_stand_side_by_side_with_what_differs_in_their_settings(good, collapsed, tmp_path):
    text = page_of(tmp_path, good, collapsed)
    assert "2 runs side by side" in text and "swav.prototypes" in text and "Loss, CT" in text
    assert "A  good" in text and "B  collapsed" in text


def test_pictures_are_made_again_and_can_be_left_out(trained, tmp_path):
    text = page_of(tmp_path, trained)
    views = len(MODALITIES) * (1 + 2 + 6)
    assert text.count("data:image/png") > views + 10 and "pixels of patients" in text
    assert "Nearest images of the prototypes: CT" in text
    bare = page_of(tmp_path, trained, pictures=False)
    assert "<img" not in bare and "pixels of patients" not in bare
    assert page_of(tmp_path, trained, sheet_images=0).count("<img") == views


def test_pictures_of_another_dataset_are_not_shown(trained, tmp_path):
    where = Path(shutil.copytree(trained, tmp_path / "run"))
    state = run_state.read(where)
    changed = state.__dict__ | {"dataset_fingerprint": "of another dataset"}
    (where / "run.json").write_text(json.dumps(changed))
    text = page_of(tmp_path, where)
    assert "<img" not in text and "not as it was when the run began" in text


def test_a_folder_that_is_no_run_and_a_page_without_a_place_are_refused(good, tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "p.html")]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert main(["report", str(good)]) == 2 and "--output FILE.html" in capsys.readouterr().err
    with pytest.raises(UserError, match="twice"):
        page_of(tmp_path, good, good)
    assert main(["report", str(good), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["state"] == "done" and told["step"] == 24 and told["metrics"]["m/ct/loss"] is not None


def test_ls_tells_runs_and_datasets_apart_and_how_each_stands(good, tmp_path, capsys):
    run(tmp_path / "deep" / "stopped", stop_after=3, max_steps=12)
    dataset(tmp_path / "data", tmp_path / "scratch")
    broken = shutil.copytree(tmp_path / "deep" / "stopped", tmp_path / "broken")
    next(broken.glob("checkpoints/step-*/state.safetensors")).write_bytes(b"")
    assert main(["ls", str(tmp_path), "--json"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"deep/stopped", "data", "broken"}
    assert rows["deep/stopped"] | {"state": "stopped", "step": 3, "max_steps": 12} == rows["deep/stopped"]
    assert rows["broken"]["state"] == "broken" and rows["data"]["images"]["ct"] == 13
    assert main(["ls", str(good.parent)]) == 0
    line = capsys.readouterr().out
    assert re.match(r"run +done +good +step 24 of 24, checkpoint 24, ", line)
    assert main(["ls", str(tmp_path / "nowhere")]) == 2


def test_ls_goes_on_after_a_folder_that_may_not_be_read(good, tmp_path, monkeypatch):
    real = run_list.kind_of

    def kind_of(folder: Path) -> str | None:
        if folder.name == "a-locked":
            raise PermissionError
        return real(folder)

    (tmp_path / "a-locked").mkdir()
    shutil.copytree(good, tmp_path / "b")
    monkeypatch.setattr(run_list, "kind_of", kind_of)
    assert list(run_list.find(tmp_path, 2)) == [(tmp_path / "b", "run")]


def test_no_path_is_on_the_page_neither_in_settings_nor_in_errors(trained, tmp_path):
    where = Path(shutil.copytree(trained, tmp_path / "run"))
    state = run_state.read(where)
    config = state.config
    dataset_path = config["data"]["dataset"]
    config["data"] |= {"node_cache": "/scratch/nodes", "catalogue_cache": "/scratch/rows"}
    error = UserError(
        f"{dataset_path}/shards/x.tar: holds other bytes, see {where}/run.json and /scratch/rows"
    )
    text = run_state.without_paths(error, where, config)
    assert (
        text
        == "the dataset/shards/x.tar: holds other bytes, see the run folder/run.json and the catalogue cache"
    )
    full_disk = OSError(errno.ENOSPC, "No space left on device", str(where))
    assert run_state.without_paths(full_disk, where, config) == "No space left on device"
    (where / "run.json").write_text(json.dumps(state.__dict__))
    for there in (None, str(tmp_path / "nowhere")):
        page = page_of(tmp_path, where, dataset=there)
        assert str(tmp_path) not in page and dataset_path not in page and "/scratch" not in page


def test_a_resumed_run_has_no_step_of_its_times_twice(tmp_path):
    where = run(tmp_path / "run", stop_after=9, max_steps=24)
    run(where, max_steps=24)
    steps = [row["step"] for row in journal.read(run_state.timing_path(where))]
    assert steps == sorted(set(steps)) and steps[-1] == 23
    assert run_state.read(where).state == "finished" and run_state.read(where).attempt == 2


def test_a_chart_of_values_that_are_all_alike_has_round_ticks():
    text = line_chart([Line("a", [1, 2], [0.0, 0.0], "m0")], "x", least=0.0)
    assert ">0.2<" in text and "e-" not in text
    assert "Not logged" in line_chart([Line("a", [1], [float("nan")], "m0")], "x")


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_browser_shows_the_page_without_a_complaint_and_without_moving_sideways(trained, tmp_path, window):
    page_of(tmp_path, trained)
    pictures = "[...document.images].filter(i => i.naturalWidth > 0).length"
    curves = (
        "[...document.querySelectorAll('path.line')].filter(p => p.getBoundingClientRect().width > 50).length"
    )
    outside = (
        "[...document.querySelectorAll('.plot span')]"
        ".map(s => s.getBoundingClientRect()).filter(r => r.right > innerWidth || r.left < 0).length"
    )
    seen = look(tmp_path / "page.html", window, (pictures, "document.images.length", curves, outside))
    assert seen.complaints == [] and seen.width <= window[0]
    shown, there, lines, cut = seen.values
    assert shown == there > 30 and lines > 20 and cut == 0
    assert len(seen.picture) > 20_000
