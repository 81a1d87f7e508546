"""`ingest quarantine` explains every refusal, and names a path only from the private map."""

import json
from collections import Counter

import pytest

from ingest.config import load_config
from ingest.discover import inventory
from orchestration import path_map
from orchestration.cli import ingest_main
from orchestration.ingest_report import status_report
from orchestration.quarantine_report import listing, show
from shards.errors import UserError
from tests.ingest.files import grey, ingest, write


@pytest.fixture
def dataset(tmp_path):
    source = tmp_path / "Secretfolder"
    write(source / "good", grey(seed=1))
    write(source / "copy", grey(seed=1))
    for name in ("a", "b"):
        (source / name).write_bytes(b"not an image " + name.encode())
    ingest(source, tmp_path / "out")
    return tmp_path / "out"


def refused(dataset, reason=None, limit=0, paths=None):
    return json.loads(listing(dataset, reason, limit, paths, as_json=True))


def test_the_list_holds_every_refusal_that_status_counts(dataset):
    found = refused(dataset)
    status = json.loads(status_report(dataset, as_json=True))["quarantined"]
    assert Counter(row["reason"] for row in found["refused"]) == Counter(status)
    assert found["rows"] == sum(status.values()) == 3
    few = refused(dataset, "not_an_image", 1)
    assert few["rows"] == 2 and len(few["refused"]) == 1
    text = listing(dataset, "not_an_image", 1, None, as_json=False)
    assert "1 more: --limit 0" in text and "Secretfolder" not in text
    assert listing(dataset, "crashed", 0, None, as_json=False) == "nothing was refused as crashed"


def test_one_source_is_found_by_the_beginning_of_its_pseudonym(dataset):
    row = refused(dataset, "duplicate")["refused"][0]
    text = show(dataset, row["source"][:12], None, as_json=False)
    assert row["source"] in text and "the same pixels are kept once" in text and row["unit"] in text
    assert json.loads(show(dataset, row["source"], None, as_json=True))["refused"] == [row]
    with pytest.raises(UserError, match="3 refused sources"):
        show(dataset, "", None, as_json=False)
    with pytest.raises(UserError, match="no refused source"):
        show(dataset, "zz", None, as_json=False)


def test_paths_come_from_the_private_map_alone(dataset, tmp_path):
    from tests.ingest.files import NAMES

    config = load_config({"sources": [str(tmp_path / "Secretfolder")], "output": str(tmp_path / "out")})
    path_map.write(tmp_path / "map", inventory(config), NAMES)
    found = refused(dataset, "not_an_image", paths=tmp_path / "map")["refused"]
    assert {path for row in found for path in row["paths"]} == {
        str(tmp_path / "Secretfolder" / name) for name in ("a", "b")
    }
    assert str(tmp_path / "Secretfolder" / "a") in listing(dataset, None, 0, tmp_path / "map", as_json=False)
    assert "paths" not in refused(dataset, "not_an_image")["refused"][0]


def test_mistakes_are_one_line_and_code_2(dataset, tmp_path, capsys):
    for arguments in (
        ["ls", str(dataset), "--reason", "bad"],
        ["ls", str(tmp_path / "none")],
        ["show", str(dataset), "zz"],
        ["ls", str(dataset), "--path-map", str(tmp_path / "none")],
    ):
        assert ingest_main(["quarantine", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert ingest_main(["quarantine", "ls", str(dataset)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
