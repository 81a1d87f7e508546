"""The path map names every source, is private, survives a kill, and never lies in a dataset or a source."""

import json
import stat

import pytest

from ingest.deidentify import source_id
from ingest.discover import inventory
from orchestration import path_map
from shards.errors import UserError
from tests.ingest.files import NAMES, config, write


@pytest.fixture
def entries(tmp_path):
    for number in range(3):
        write(tmp_path / "s" / f"{number}", number=number)
    return inventory(config(tmp_path / "s", tmp_path / "out"))


def test_the_map_names_every_source_and_is_private(entries, tmp_path):
    file = tmp_path / "map"
    assert path_map.write(file, entries, NAMES) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert path_map.read(file) == {source_id(e.source, NAMES): [e.path] for e in entries}


def test_a_second_run_appends_only_what_is_new_and_mends_a_torn_line(entries, tmp_path):
    file = tmp_path / "map"
    path_map.write(file, entries[:2], NAMES)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert path_map.write(file, entries, NAMES) == 2
    assert len(path_map.read(file)) == 3
    assert path_map.write(file, entries, NAMES) == 0
    assert json.loads(whole.splitlines()[0])["path"] == entries[0].path


def test_a_map_inside_the_dataset_or_a_source_or_open_to_others_is_refused(entries, tmp_path):
    source, out = tmp_path / "s", tmp_path / "out"
    (tmp_path / "link").symlink_to(source)
    for place in (source / "map", out / "deep" / "map", tmp_path / "link" / "map"):
        with pytest.raises(UserError, match="inside"):
            path_map.check(place, out, [source])
    file = tmp_path / "map"
    file.touch(0o644)
    file.chmod(0o644)
    for refused in (
        lambda: path_map.check(file, out, [source]),
        lambda: path_map.write(file, entries, NAMES),
    ):
        with pytest.raises(UserError, match="chmod 600"):
            refused()
    (tmp_path / "alias").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot open"):
        path_map.write(tmp_path / "alias", entries, NAMES)
