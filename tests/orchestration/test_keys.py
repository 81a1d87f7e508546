"""A dataset's key is found or made in the open, never lost and never silent."""

import stat

import pytest

from orchestration import keys
from shards.errors import UserError


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("MEDSWAV_KEY", raising=False)


def test_a_first_run_without_a_key_makes_one_beside_the_dataset_and_says_so(tmp_path):
    dataset = tmp_path / "dataset"
    assert keys.must_be_made(None, dataset)
    said = keys.make(dataset)
    path = tmp_path / "dataset.key"
    assert str(path) in said and not dataset.exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not keys.must_be_made(None, dataset)
    assert keys.read(None, dataset) == bytes.fromhex(path.read_text())


def test_a_dataset_without_its_key_never_gets_another_one(tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    assert not keys.must_be_made(None, tmp_path)
    with pytest.raises(UserError, match="first `ingest run`"):
        keys.read(None, tmp_path)


def test_a_given_key_wins_over_the_environment_and_the_file_beside(tmp_path, monkeypatch):
    dataset = tmp_path / "dataset"
    keys.make(dataset)
    monkeypatch.setenv("MEDSWAV_KEY", "11" * 32)
    assert keys.read(None, dataset) == b"\x11" * 32
    given = tmp_path / "given"
    given.write_text("22" * 32)
    given.chmod(0o600)
    assert keys.read(given, dataset) == b"\x22" * 32
    with pytest.raises(UserError, match="ingest key"):
        keys.read(tmp_path / "missing", dataset)
