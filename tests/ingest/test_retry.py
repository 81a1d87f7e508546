"""Refused inputs tried again: each image once, each refusal counted once, whatever is killed or run twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from ingest.convert import run_unit
from ingest.discover import inventory
from ingest.frames import Frame, Refusal
from ingest.inventory import Inventory
from ingest.retry import chosen_reasons, retry_units
from ingest.sandbox import InlineReader
from orchestration.cli import ingest_main
from orchestration.ingest_report import status_report
from shards import catalog
from shards.commit import list_commits, sweep
from shards.errors import UserError
from shards.ids import create_key
from shards.retries import input_count
from shards.schema import Reason
from shards.store import Store
from shards.verify import verify
from tests.crash.killer import killed
from tests.ingest.files import NAMES, config, grey, ingest, tree, units, write


class Without:
    """The reader of a machine on which the decoder of some files crashes."""

    def __init__(self, settings, *names: str) -> None:
        self._reader = InlineReader(settings.rules())
        self._names = names

    def read(self, path, kind, modality, *where, **copies):
        if path.endswith(self._names):
            yield Refusal(Reason.CRASHED)
        else:
            yield from self._reader.read(path, kind, modality, *where, **copies)

    def close(self) -> None:
        self._reader.close()


class Torn:
    """The reader of a disk on which some frames (file, number) cannot be decoded."""

    def __init__(self, settings, broken) -> None:
        self._reader = InlineReader(settings.rules())
        self._broken = broken

    def read(self, path, kind, modality, *where, **copies):
        for item in self._reader.read(path, kind, modality, *where, **copies):
            index = item.index if isinstance(item, Frame) else item.frame
            torn = (Path(path).name, index) in self._broken
            yield Refusal(Reason.DECODE_FAILED, index, item.modality) if torn else item

    def close(self) -> None:
        self._reader.close()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for number, name in enumerate(("a", "b", "c", "d")):
        write(folder / name, grey(seed=number), number=number)
    write(folder / "e-copy-of-a", grey(seed=0), number=0, PatientComments="another file, the same image")
    (folder / "text").write_bytes(b"no image")
    return folder


def first_run(source, out, *crash) -> None:
    settings = config(source, out)
    for unit in units(settings):
        run_unit(unit, settings, NAMES, out, out.parent / "scratch", Without(settings, *crash))


def planned(source, out, reasons=None):
    settings = config(source, out)
    stored = Inventory(out.parent / "inventory", NAMES)
    stored.append(inventory(settings))
    stored.close()
    return retry_units(Store(out), stored, chosen_reasons(reasons))


def retry(source, out, *crash, reasons=None) -> int:
    settings = config(source, out)
    again, absent = planned(source, out, reasons)
    assert not absent
    for unit in again:
        run_unit(unit, settings, NAMES, out, out.parent / "scratch", Without(settings, *crash))
    return len(again)


def reasons_of(out) -> list[str]:
    return sorted(catalog.quarantine(out)["reason"].to_pylist())


def images(root) -> list[tuple]:
    return sorted(
        (row["key"], row["pixel_digest"])
        for row in catalog.load(root, columns=["key", "pixel_digest"]).to_pylist()
    )


def test_what_decodes_the_second_time_is_a_sample_and_no_longer_counted_as_refused(source, tmp_path):
    out = tmp_path / "out"
    first_run(source, out, "b", "c")
    before = tree(out)
    assert reasons_of(out) == ["crashed", "crashed", "duplicate", "not_an_image"]
    retry(source, out, "c")
    assert reasons_of(out) == ["crashed", "duplicate", "not_an_image"]
    retry(source, out)
    assert reasons_of(out) == ["duplicate", "not_an_image"]
    ingest(source, tmp_path / "sound")
    assert images(out) == images(tmp_path / "sound")
    assert before.items() <= tree(out).items(), "a file was rewritten"
    report = verify(out, deep=True)
    assert report.clean and (report.samples, report.quarantined, report.inputs) == (4, 2, 6)
    status = json.loads(status_report(out, as_json=True))
    assert status["inputs"] == 6 and status["quarantined"] == {"duplicate": 1, "not_an_image": 1}
    assert retry(source, out) == 0 and not units(config(source, out)), "it is done, for every command"


def test_a_copy_that_was_kept_meanwhile_is_a_duplicate_of_the_one_that_decodes_now(source, tmp_path):
    out = tmp_path / "out"
    first_run(source, out, "/a")
    assert catalog.load(out).num_rows == 4, "the copy was kept"
    retry(source, out)
    assert catalog.load(out).num_rows == 4
    assert reasons_of(out) == ["duplicate", "not_an_image"]


def test_refused_again_it_counts_once_and_other_reasons_are_left_alone(source, tmp_path):
    out = tmp_path / "out"
    first_run(source, out, "b", "c")
    for _ in range(3):
        assert retry(source, out, "b", "c") == 1
    assert reasons_of(out) == ["crashed", "crashed", "duplicate", "not_an_image"]
    assert input_count(list_commits(Store(out))) == 6 == verify(out).inputs
    assert retry(source, out, reasons=["decode_failed"]) == 0
    assert retry(source, out, reasons=["not_an_image"]) == 1
    assert reasons_of(out) == ["crashed", "crashed", "duplicate", "not_an_image"]
    for bad in ("duplicate", "nonsense"):
        with pytest.raises(UserError):
            chosen_reasons([bad])


def test_a_refused_file_that_went_or_changed_waits(source, tmp_path):
    out = tmp_path / "out"
    first_run(source, out, "b", "c")
    (source / "b").unlink()
    again, absent = planned(source, out)
    assert absent == 1 and [len(unit.entries) for unit in again] == [1]


def test_two_at_once_with_different_choices_commit_one_attempt(source, tmp_path):
    out = tmp_path / "out"
    first_run(source, out, "b", "c")
    settings = config(source, out)
    mine, _ = planned(source, out)
    (source / "c").rename(tmp_path / "c")
    theirs, _ = planned(source, out)
    (tmp_path / "c").rename(source / "c")
    assert [unit.unit for unit in mine] == [unit.unit for unit in theirs]
    for unit in theirs + mine:
        run_unit(unit, settings, NAMES, out, tmp_path / "scratch", InlineReader(settings.rules()))
    assert reasons_of(out) == ["crashed", "duplicate", "not_an_image"], "of theirs only"
    retry(source, out)
    assert catalog.load(out).num_rows == 4 and verify(out, deep=True).clean


def torn(source, out, broken) -> None:
    """A first run, or what a retry does, on a disk with some broken frames."""
    settings = config(source, out)
    again = planned(source, out)[0] if out.exists() else units(settings)
    for unit in again:
        run_unit(unit, settings, NAMES, out, out.parent / "scratch", Torn(settings, broken))


def test_frames_that_decode_the_second_time_join_those_of_their_file(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write(source / "cine", np.stack([grey(seed=n) for n in range(3)]), number=0, frames=True)
    flat = [grey(seed=3), np.zeros_like(grey()), grey(seed=4)]
    write(source / "flat", np.stack(flat), number=1, frames=True)
    ingest(source, tmp_path / "sound")

    torn(source, out, {("cine", 0), ("cine", 2), ("flat", 2)})
    assert reasons_of(out) == ["constant", "decode_failed", "decode_failed", "decode_failed"]
    torn(source, out, {("cine", 2)})
    assert reasons_of(out) == ["constant", "decode_failed"]
    torn(source, out, set())
    assert reasons_of(out) == ["constant"] == reasons_of(tmp_path / "sound")
    assert images(out) == images(tmp_path / "sound")
    assert verify(out, deep=True).clean and not planned(source, out)[0]


def test_killed_at_every_operation_and_run_again_the_dataset_is_the_same(source, tmp_path):
    first_run(source, tmp_path / "whole", "b", "c")
    start = tree(tmp_path / "whole")
    retry(source, tmp_path / "whole", "c")
    killed_anywhere(tmp_path, start, lambda root: retry(source, root, "c"))


def test_killed_while_frames_join_their_file_and_run_again_each_frame_is_there_once(tmp_path):
    source = tmp_path / "source"
    write(source / "cine", np.stack([grey(seed=n) for n in range(3)]), number=0, frames=True)
    torn(source, tmp_path / "whole", {("cine", 0), ("cine", 2)})
    start = tree(tmp_path / "whole")
    torn(source, tmp_path / "whole", {("cine", 2)})
    assert catalog.load(tmp_path / "whole").num_rows == 2
    killed_anywhere(tmp_path, start, lambda root: torn(source, root, {("cine", 2)}))


def killed_anywhere(tmp_path, start, again) -> None:
    """`again` on copies of the dataset `start`, killed ahead of every operation: it comes out as `whole`."""
    expected = tree(tmp_path / "whole")
    number = 0
    while True:
        root = tmp_path / f"killed-{number}"
        for name, data in start.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        if not killed(lambda root=root: again(root), number, torn=number % 2 == 1):
            break
        if tree(root).keys() != expected.keys():
            sweep(Store(root))
            if len(list_commits(Store(root))) < sum(name.startswith("commits/") for name in expected):
                again(root)
        assert tree(root) == expected, f"killed ahead of operation {number}"
        number += 1
    assert number > 10


def test_the_command_tries_again_and_refuses_other_settings_with_one_line(source, tmp_path, capsys):
    out, key = tmp_path / "out", tmp_path / "key"
    create_key(key)
    given = [str(out), str(source), "--key", str(key)]
    assert ingest_main(["quarantine", "retry", *given]) == 2
    assert "is no dataset" in capsys.readouterr().err
    assert ingest_main(["run", str(source), str(out), "--key", str(key), "--workers", "1"]) == 0
    capsys.readouterr()
    assert ingest_main(["quarantine", "retry", *given, "--set", "allow_burned_in=true"]) == 2
    error = capsys.readouterr().err.strip()
    assert "allow_burned_in was false, now true" in error and len(error.splitlines()) == 1
    assert ingest_main(["quarantine", "retry", *given, "--reason", "duplicate"]) == 2
    assert ingest_main(["quarantine", "retry", *given]) == 0
    assert "nothing to try again" in capsys.readouterr().err
