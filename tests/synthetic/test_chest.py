"""What generated chest radiographs promise: boxes around what is there, two ground truths, DICOM files."""

import csv
import hashlib

import cv2
import numpy as np
import pydicom
import pytest

from ingest.labels import join_labels
from ingest.synthetic import chest
from ingest.synthetic.chest_findings import LABELS, NODULE, exposures
from ingest.synthetic.chest_readers import read
from shards import catalog
from shards.errors import UserError
from tests.ingest.files import NAMES, ingest


@pytest.fixture(autouse=True)
def one_thread():
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_equal_seeds_give_equal_bytes_and_every_image_is_in_every_table(tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        assert chest.build(tmp_path / name, 5, seed=2, workers=workers) == 10
    digests = [
        {
            p.relative_to(tmp_path / n): hashlib.sha256(p.read_bytes()).digest()
            for p in (tmp_path / n).rglob("*.*")
        }
        for n in "ab"
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 13
    for name in chest.TABLES:
        table = rows(tmp_path / "a" / f"{name}.csv")
        assert {row["file"] for row in table} == {
            p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.dcm")
        }
        for row in table:
            data = pydicom.dcmread(tmp_path / "a" / row["file"])
            assert data.SOPInstanceUID == row["SOPInstanceUID"]
            box = [row[c] for c in ("x0", "y0", "x1", "y1")]
            assert (row["label"] in LABELS) == all(box) == any(box)
            if row["label"]:
                x0, y0, x1, y1 = map(float, box)
                assert 0 <= x0 < x1 <= data.Columns and 0 <= y0 < y1 <= data.Rows
    with pytest.raises(UserError, match="not empty"):
        chest.build(tmp_path / "a", 5)


def test_nodules_are_brighter_than_their_surroundings_but_not_than_the_rest_of_the_image():
    inside, ring, brightest = [], [], []
    for i in range(40):
        for one in exposures(np.random.default_rng([1, i]), 1):
            for finding in one.findings:
                if finding.label != NODULE:
                    continue
                x0, y0, x1, y1 = (int(n) for n in finding.box)
                margin = (x1 - x0) // 2
                around = one.image[max(y0 - margin, 0) : y1 + margin, max(x0 - margin, 0) : x1 + margin]
                inside.append(one.image[y0:y1, x0:x1].mean())
                ring.append(
                    (around.sum() - one.image[y0:y1, x0:x1].sum()) / (around.size - (y1 - y0) * (x1 - x0))
                )
                brightest.append((one.image > inside[-1]).mean())
    contrast = np.array(inside) - ring
    assert len(contrast) > 12 and np.median(contrast) > 0.015 and (contrast > 0).mean() > 0.8
    assert np.median(brightest) > 0.3  # a threshold of grey does not find them


def test_half_of_the_images_have_no_finding_and_the_strict_truth_has_fewer_boxes_than_that_of_any_reader():
    counts = dict.fromkeys(("truth", "strict", "any_reader"), 0)
    without = 0
    for i in range(60):
        random = np.random.default_rng([5, i])
        one = exposures(random, 1)[0]
        marks = read(random, one)
        without += not one.findings
        counts["truth"] += len(one.findings)
        for name, boxes in marks.items():
            counts[name] += len(boxes)
    assert 14 <= without <= 36
    assert counts["strict"] < counts["truth"] < counts["any_reader"] < 1.5 * counts["truth"]


def test_boxes_join_the_images_and_shrink_with_them(tmp_path):
    chest.build(tmp_path / "source", 3, seed=1, workers=1)
    ingest(tmp_path / "source", tmp_path / "out", xr_max_side=100)
    table = join_labels(tmp_path / "out", tmp_path / "source" / "truth.csv", NAMES, "truth", kind="boxes")
    assert table.num_rows == 6 and table.schema.metadata[b"unmatched"] == b"0"
    images = {row["key"]: row for row in catalog.load(tmp_path / "out", "xr").to_pylist()}
    given: dict[str, list[float]] = {}
    for row in rows(tmp_path / "source" / "truth.csv"):
        given.setdefault(NAMES.id("instance", row["SOPInstanceUID"]), []).append(float(row["x1"] or 0))
    compared = 0
    for row in table.to_pylist():
        image = images[row["key"]]
        assert max(image["rows"], image["columns"]) == 100 < image["original_columns"]
        scale = image["columns"] / image["original_columns"]
        expected = [x1 * scale for x1 in given[image["instance"]] if x1]
        assert [box["x1"] for box in row["boxes"]] == pytest.approx(expected)
        compared += len(expected)
    assert compared
