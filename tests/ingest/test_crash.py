"""Killed at any disk operation and run again, ingest gives the same dataset, byte for byte."""

from pathlib import Path

import pytest

from ingest.convert import run_unit
from shards import catalog
from shards.commit import orphans, sweep
from shards.store import Store
from shards.verify import verify
from tests.crash.killer import killed
from tests.ingest.files import NAMES, config, grey, tree, units, write


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write(folder / "a", grey(seed=1), number=1)
    write(folder / "b", grey(seed=2), number=2)
    write(folder / "bad", number=3, Rows=4000)
    return folder


def test_killed_at_every_operation_and_run_again_the_dataset_is_the_same(source, tmp_path):
    def job(root: Path) -> None:
        settings = config(source, root)
        for unit in units(settings):
            run_unit(unit, settings, NAMES, root, tmp_path / "scratch")

    job(tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    assert catalog.load(tmp_path / "whole").num_rows == 2
    number = 0
    while True:
        root = tmp_path / f"killed-{number}"
        if not killed(lambda root=root: job(root), number, torn=number % 2 == 1):
            break
        job(root)
        sweep(Store(root))  # temporary files of the killed writer
        assert tree(root) == expected, f"killed ahead of operation {number}"
        number += 1
    assert number > 25, "the job has fewer disk operations than a commit needs"
    assert not verify(root, deep=True).problems and not orphans(Store(root))
