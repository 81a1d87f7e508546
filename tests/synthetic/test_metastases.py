"""The generated brains: truth that fits the pixels, equal bytes for equal arguments, no easy prey."""

import numpy as np
import pydicom
import pytest

from ingest import run_lengths
from ingest.synthetic import metastases
from ingest.synthetic.brain_mr import LEAST_PIXELS, brain
from shards.errors import UserError


def small(folder, **changes):
    return metastases.build(
        folder, **{"patients": 3, "workers": 1, "slices": (6, 7), "side": (84, 88), **changes}
    )


def test_equal_arguments_give_equal_files_and_tables(tmp_path):
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        small(tmp_path / name, seed=seed)
    trees = [
        {
            p.relative_to(tmp_path / n).as_posix(): p.read_bytes()
            for p in (tmp_path / n).rglob("*")
            if p.is_file()
        }
        for n in "abc"
    ]
    assert trees[0] == trees[1] != trees[2]
    assert len(trees[0]) == 3 * 6 + 3
    with pytest.raises(UserError, match="not empty"):
        small(tmp_path / "a")
    with pytest.raises(UserError, match="3 or more"):
        small(tmp_path / "d", patients=2)


def test_labels_masks_and_files_tell_of_the_same_slices(tmp_path):
    found = small(tmp_path, seed=4)
    files = {}
    for path in tmp_path.rglob("*.dcm"):
        data = pydicom.dcmread(path)
        files[str(data.SOPInstanceUID)] = data
    lines = (tmp_path / metastases.SLICES_CSV).read_text().splitlines()[1:]
    labels = {name: int(label) for name, label in (line.split(",") for line in lines)}
    assert labels.keys() == files.keys() == {s.instance for s in found}
    for one in found:
        mask = run_lengths.decode(one.mask)
        assert mask.shape == (files[one.instance].Rows, files[one.instance].Columns)
        assert mask.any() == bool(labels[one.instance]) == bool(one.lesions)
        assert mask.sum() == sum(pixels for _, pixels in one.lesions)
        assert all(pixels >= LEAST_PIXELS for _, pixels in one.lesions)
    assert 0 < sum(labels.values()) < len(labels)


def test_lesions_are_bright_and_so_is_much_else():
    """As bright as vessels: brighter than the tissue around, and not the brightest of the brain."""
    inside, brighter = [], []
    for seed in range(4):
        series = brain(np.random.default_rng(seed), 4, 12, 72)
        signal = series.signal / np.median(series.signal[series.signal > series.signal.mean()])
        for z in np.flatnonzero((series.lesions > 0).any((1, 2))):
            mask = series.lesions[z] > 0
            inside.append(signal[z][mask].mean())
            middle = signal[z, 20:-20, 20:-20]
            brighter.append((middle > inside[-1]).sum())
    assert np.mean(inside) > 1.15
    assert np.median(brighter) > 3
