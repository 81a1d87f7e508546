"""A run never writes into or above its sources, nor among other files, and never reads a key."""

import io
import os

import pytest

from ingest.discover import inventory
from ingest.places import check_output
from orchestration.ingest_job import plan_job
from shards.errors import UserError
from tests.ingest.files import config, ingest, write


def test_a_folder_of_other_files_is_no_output(tmp_path):
    source = write(tmp_path / "s" / "f").parent
    (tmp_path / "mine").mkdir()
    check_output(config(source, tmp_path / "mine"))
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="choose an empty or new folder"):
        check_output(config(source, tmp_path / "mine"))
    ingest(source, tmp_path / "out")
    check_output(config(source, tmp_path / "out"))


@pytest.mark.parametrize("output", ["s", ".", "link"])
def test_a_source_and_what_holds_one_are_no_output(tmp_path, output):
    source = write(tmp_path / "s" / "f").parent
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="is a source or holds one"):
        check_output(config(source, tmp_path / output))


def test_the_key_is_no_input_wherever_it_lies(tmp_path):
    source = write(tmp_path / "s" / "f").parent
    (source / "out.key").write_text("22" * 32)
    (source / "my.key").write_text("22" * 32)
    settings = config(source, source / "out", key_file=str(source / "my.key"))
    assert [entry.relative for entry in inventory(settings)] == ["f"]


def test_a_plan_without_an_output_skips_nothing(tmp_path, monkeypatch):
    write(tmp_path / "dataset" / "f")
    monkeypatch.chdir(tmp_path)
    settings = config(tmp_path, tmp_path).model_copy(update={"output": ""})
    assert [entry.relative for entry in inventory(settings)] == ["dataset/f"]


@pytest.mark.parametrize("place", ["there", "new/below"])
def test_an_output_that_cannot_be_written_is_refused_before_the_sources_are_scanned(
    tmp_path, monkeypatch, place
):
    source = write(tmp_path / "s" / "f").parent
    (tmp_path / "there").mkdir()
    closed = tmp_path / ("there" if place == "there" else "")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(closed))  # root may write anywhere
    before = sorted(tmp_path.rglob("*"))
    said = io.StringIO()
    with pytest.raises(UserError, match="cannot be written: change the permissions of"):
        plan_job(config(source, tmp_path / place), said)
    assert sorted(tmp_path.rglob("*")) == before and said.getvalue() == ""
