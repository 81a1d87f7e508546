"""Every file once, under the path met first, whatever links and sources overlap, with the names on disk."""

import os
import random
from pathlib import Path

import pytest

from ingest.config import load_config
from ingest.walk import Files, settled_files


def simple(sources):
    """The rule in few words: real paths of all files seen, in memory; folders once a source."""
    seen, found = set(), []
    for source in sources:
        visited = {os.path.realpath(source)}
        folders = (
            os.walk(source, followlinks=True)
            if source.is_dir()
            else [(str(source.parent), [], [source.name])]
        )
        for folder, below, names in folders:
            new = []
            for name in sorted(below):
                real = os.path.realpath(str(Path(folder) / name))
                if real not in visited:
                    visited.add(real)
                    new.append(name)
            below[:] = new
            for name in sorted(names):
                path = str(Path(folder) / name)
                if os.path.realpath(path) not in seen:
                    seen.add(os.path.realpath(path))
                    relative = os.path.relpath(path, source) if source.is_dir() else name
                    found.append((path, relative, str(source)))
    return found


def tangle(root, seed):
    """Folders, files, and links to files, folders, themselves and nowhere, beside and far from it."""
    chance = random.Random(seed)
    folders = [root]
    root.mkdir()
    for number in range(8):
        folders.append(chance.choice(folders) / f"{chance.choice('bcxyz')}{number}")
        folders[-1].mkdir()
    files = []
    for number in range(14):
        files.append(chance.choice(folders) / f"{chance.choice('amq')}{number}")
        files[-1].write_bytes(b"x")
    for number in range(12):
        link = chance.choice(folders) / f"{chance.choice('bny')}link{number}"
        target = chance.choice(
            [*files, *files, *folders, root / "nowhere", link, chance.choice(folders) / "none"]
        )
        link.symlink_to(target)
        if target in files:
            files.append(link)
    return folders


@pytest.mark.parametrize("seed", range(60))
def test_every_file_comes_once_under_the_path_met_first(tmp_path, seed):
    folders = tangle(tmp_path / "s", seed)
    chance = random.Random(seed)
    one = next(p for p in sorted((tmp_path / "s").rglob("*")) if p.is_file() and not p.is_symlink())
    for sources in ([folders[0]], chance.sample(folders, 4), [one, folders[0]], [folders[0], one]):
        settings = load_config({"sources": [str(s) for s in sources], "output": str(tmp_path / "out")})
        expected = simple(sources)
        assert list(settled_files(settings)) == expected
        found = Files(settings, ("a1", "m2", "q3"))
        assert len(found) == len(expected) and list(found) == expected == list(found)
        assert found.named == [p for p, _, _ in expected if Path(p).name in ("a1", "m2", "q3")]
        relatives = [relative for _, relative, _ in expected]
        assert [found.several(r) for r in relatives] == [relatives.count(r) > 1 for r in relatives]
