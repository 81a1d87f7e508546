"""The generated heads: bleedings where they belong, and truth that is true."""

import csv

import numpy as np
import pydicom
import pytest

from ingest.synthetic import head_bleeds
from ingest.synthetic.head_anatomy import anatomy, draw_grid, draw_head
from ingest.synthetic.heads import COLUMNS, FILES, SLICES, TYPES, VOLUMES, HeadSize, build_heads, plan
from shards.errors import UserError

SMALL = HeadSize(slices=(10, 12), side=(48, 56))


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(4)
    grid = draw_grid(rng, (20, 20), (72, 72))
    return draw_head(rng, grid)


def drawn(head, kind, seed):
    return head_bleeds.bleeding(np.random.default_rng(seed), head, kind)[0] > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_type_lies_where_it_belongs(head, seed):
    for kind in TYPES:
        blood = drawn(head, kind, seed)
        assert blood.any() and head.depth[blood].min() > -1.5, kind  # never in the bone
    subdural, epidural = drawn(head, "subdural", seed), drawn(head, "epidural", seed)
    assert head.outside[subdural].max() < 15 and head.outside[epidural].max() < 20
    assert len(np.unique(np.sign(head.x[subdural]))) == 1  # it does not cross the midline
    assert np.ptp(head.y[subdural]) > np.ptp(head.y[epidural])  # a crescent is wider than a lens
    assert head.ventricles[drawn(head, "intraventricular", seed)].min() > 0.5
    assert head.fluid[drawn(head, "subarachnoid", seed)].min() > 0.2
    assert head.depth[drawn(head, "intraparenchymal", seed)].min() > 3


def test_blood_is_brighter_than_brain_and_far_darker_than_bone(head):
    hu = anatomy(np.random.default_rng(1), head)
    brain = (head.depth > 20) & (head.ventricles < 0.1) & (head.fluid < 0.1)
    assert 24 < np.median(hu[brain]) < 40
    assert np.median(hu[head.ventricles > 0.9]) < 20 and np.median(hu[np.abs(head.outside + 4) < 1]) > 400
    rng = np.random.default_rng(2)
    blood, oedema = head_bleeds.bleeding(rng, head, "intraparenchymal")
    after = head_bleeds.put(rng, head, hu, blood, oedema)
    assert 40 < np.median(after[blood > 0.9]) < 85
    assert (after[oedema > 0.9] < hu[oedema > 0.9]).all()


def test_half_of_the_patients_bleed_and_no_type_is_rare(tmp_path):
    tasks = plan(tmp_path, 400, 0, SMALL)
    counts = {kind: sum(kind in task.kinds for task in tasks) for kind in TYPES}
    assert sum(bool(task.kinds) for task in tasks) == 200
    assert min(counts.values()) >= 50 and max(counts.values()) <= 100
    assert {len(task.kinds) for task in tasks} == {0, 1, 2, 3}


def test_tables_and_files_agree_and_equal_arguments_give_equal_bytes(tmp_path):
    written = build_heads(tmp_path / "a", 4, seed=1, size=SMALL, workers=1)
    again = build_heads(tmp_path / "b", 4, seed=1, size=SMALL, workers=1)
    assert again == written
    files = sorted((tmp_path / "a" / FILES).rglob("IM*"))
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    of_series: dict[str, list] = {}
    for path in files:
        data = pydicom.dcmread(path)
        of_series.setdefault(data.SeriesInstanceUID, []).append(data)
    with open(tmp_path / "a" / VOLUMES, newline="") as file:
        volumes = {row["SeriesInstanceUID"]: row for row in csv.DictReader(file)}
    with open(tmp_path / "a" / SLICES, newline="") as file:
        slices = {row["SOPInstanceUID"]: row for row in csv.DictReader(file)}
    assert volumes.keys() == of_series.keys() and len(slices) == len(files)
    assert sum(row["haemorrhage"] == "1" for row in volumes.values()) == 2
    for series, data in of_series.items():
        data.sort(key=lambda d: d.ImagePositionPatient[2])
        assert [slices[d.SOPInstanceUID]["slice"] for d in data] == [str(i) for i in range(len(data))]
        for column in COLUMNS:  # a volume has what any of its slices has, and nothing else
            shown = any(slices[d.SOPInstanceUID][column] == "1" for d in data)
            assert shown == (volumes[series][column] == "1")


def test_folders_and_numbers_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        build_heads(tmp_path, 4)
    with pytest.raises(UserError, match="ask for 2 or more"):
        build_heads(tmp_path / "new", 1)
