"""Broken files of a dataset are made again byte for byte, or left as they are."""

import json

import pytest

from ingest.discover import inventory
from ingest.inventory import Inventory
from ingest.repair import remake, units_of
from ingest.sandbox import InlineReader
from orchestration.cli import ingest_main
from shards.repair import find_broken
from shards.store import Store
from shards.verify import verify
from tests.crash.killer import killed
from tests.ingest.files import NAMES, config, grey, ingest, tree, write
from tests.ingest.test_retry import first_run, retry


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for number, name in enumerate(("a", "b", "c", "d")):
        modality = "MR" if number % 2 else "CT"
        write(folder / name, grey(seed=number), modality, number=number, RescaleIntercept=0, RescaleSlope=1)
    (folder / "text").write_bytes(b"no image")
    return folder


def repair(source, out) -> tuple[int, dict[str, int]]:
    """Number of files put; inputs that lack, by unit."""
    settings, store = config(source, out), Store(out)
    stored = Inventory(out.parent / "inventory", NAMES)
    stored.append(inventory(settings))
    stored.close()
    found, damaged = find_broken(store)
    assert not damaged
    units, lacking = units_of(store, stored, [broken.commit for broken in found])
    by_unit = {broken.commit.unit: broken for broken in found}
    reader = InlineReader(settings.rules())
    scratch = out.parent / "repair"
    done = [remake(u, by_unit[u.unit], settings, NAMES, store, scratch, reader) for u in units]
    return sum(map(len, done)), lacking


def files(out, folder):
    return sorted(p for p in (out / folder).rglob("*") if p.is_file())


def harm(out) -> None:
    """A shard flipped in the middle, a catalogue cut, a quarantine file gone."""
    shard, catalog = files(out, "shards")[0], files(out, "catalog")[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    catalog.write_bytes(catalog.read_bytes()[:-9])
    files(out, "quarantine")[0].unlink()


def test_flipped_cut_and_missing_files_come_back_byte_for_byte(source, tmp_path):
    out = tmp_path / "out"
    ingest(source, out)
    before = tree(out)
    assert find_broken(Store(out)) == ([], []) and repair(source, out) == (0, {})
    harm(out)
    assert not verify(out, deep=True).clean
    assert repair(source, out) == (3, {})
    assert tree(out) == before and verify(out, deep=True).clean


def test_a_retry_is_repaired_with_what_its_unit_had_kept_before(source, tmp_path):
    write(source / "copy-of-b", grey(seed=1), "MR", number=1, PatientComments="another file, the same image")
    out = tmp_path / "out"
    ingest(source, out)
    assert retry(source, out, reasons=["not_an_image"]) == 1
    before = tree(out)
    broken = files(out, "shards") + files(out, "quarantine") + files(out, "catalog")
    for path in broken:
        path.unlink()
    assert repair(source, out) == (len(broken), {})
    assert tree(out) == before


def test_a_unit_that_refused_what_decodes_now_stays_broken_and_says_so(source, tmp_path):
    out = tmp_path / "out"
    first_run(source, out, "/b")
    assert retry(source, out) == 1
    catalogs = files(out, "catalog")
    for path in catalogs:
        path.unlink()
    left = tree(out)
    assert repair(source, out)[0] < len(catalogs)
    assert left.items() <= tree(out).items() and not verify(out).clean


def test_a_source_that_changed_or_went_repairs_nothing_and_harms_nothing(source, tmp_path):
    out = tmp_path / "out"
    ingest(source, out)
    harm(out)
    left = tree(out)
    for name in ("a", "b", "c", "d"):
        write(source / name, grey(seed=9), "MR", number=9)
    (source / "text").unlink()
    done, lacking = repair(source, out)
    assert done == 0 and sum(lacking.values()) == 5
    assert tree(out) == left


def test_bytes_that_differ_from_the_commit_are_not_put(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ingest(source, out)
    harm(out)
    left = tree(out)
    monkeypatch.setattr("ingest.convert.pixel_statistics", lambda pixels: dict.fromkeys(STATISTICS, 0.0))
    assert repair(source, out)[0] <= 2, "the quarantine and what has no statistics"
    shard = files(out, "shards")[0]
    assert shard.read_bytes() == left[shard.relative_to(out).as_posix()]


STATISTICS = ("p005", "p995", "mean", "std", "minimum", "maximum")


def test_killed_anywhere_and_run_again_it_is_whole(source, tmp_path):
    ingest(source, tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    number = 0
    while True:
        root = tmp_path / f"killed-{number}"
        for name, data in expected.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        harm(root)
        if not killed(lambda root=root: repair(source, root), number, torn=number % 2 == 0):
            break
        repair(source, root)
        assert {n: d for n, d in tree(root).items() if "/.tmp-" not in n} == expected
        number += 7
    assert number > 20 and tree(root) == expected


def test_the_command_says_what_is_broken_then_mends_it(source, tmp_path, capsys):
    out, key = tmp_path / "out", tmp_path / "key"
    assert ingest_main(["key", str(key)]) == 0
    assert ingest_main(["run", str(source), str(out), "--key", str(key), "--workers", "1"]) == 0
    before = tree(out)
    assert ingest_main(["repair", str(out)]) == 0
    harm(out)
    capsys.readouterr()
    assert ingest_main(["repair", str(out)]) == 1
    assert capsys.readouterr().out.count("broken    ") == 3
    given = ["repair", str(out), str(source), "--key", str(key)]
    assert ingest_main([*given, "--set", "codec=png16"]) == 2
    assert "codec was" in capsys.readouterr().err
    assert ingest_main([*given, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["repaired"]) == 3
    assert tree(out) == before
    record = files(out, "commits")[0]
    record.write_bytes(b"{")
    assert ingest_main(given) == 1
    assert "delete it and run ingest run" in capsys.readouterr().out
    record.unlink()
    assert ingest_main(["run", str(source), str(out), "--key", str(key), "--workers", "1"]) == 0
    assert tree(out) == before
