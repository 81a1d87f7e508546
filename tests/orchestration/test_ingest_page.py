"""The page of a dataset says what `ingest status` says, loads nothing and names nobody."""

import json
import re

import pytest

from orchestration.ingest_page import report
from orchestration.ingest_report import status_report
from orchestration.page import WARNING
from shards import exclusions
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.store import Store
from tests.browser import BROWSER, DESKTOP, PHONE, look
from tests.ingest.files import grey, ingest, write
from tests.ingest.test_volumes import series
from tests.shards import make


@pytest.fixture
def dataset(tmp_path):
    source = tmp_path / "Secretfolder"
    for number in range(14):
        write(
            source / f"f{number}",
            grey(seed=number, size=(200, 150)),
            number=number,
            patient=f"Doeringer{number}",
        )
    (source / "bad").write_bytes(b"<script>nothing")
    ingest(source, tmp_path / "out")
    return tmp_path / "out"


def test_the_page_has_the_counts_of_status_and_no_identity(dataset, tmp_path):
    page = tmp_path / "page.html"
    found = json.loads(report(dataset, page, as_json=True))
    status = json.loads(status_report(dataset, as_json=True))
    assert {m: v["splits"] for m, v in found["modalities"].items()} == status["samples"]
    assert found["quarantined"] == status["quarantined"] != {} and found["inputs"] == status["inputs"] == 15
    text = page.read_text()
    for modality, splits in status["samples"].items():
        row = re.search(f'<tr id="count-{modality}">.*?</tr>', text)
        numbers = re.findall(r'class="n">(\d+)<', row[0])
        assert list(map(int, numbers)) == [*splits.values(), sum(splits.values())]
    assert text.count("data:image/png") == 12 and WARNING in text
    assert not [
        w for w in ("Secretfolder", "Doeringer", "1.2.3.", str(tmp_path), "<script", "http") if w in text
    ]
    sizes = [int(n) for n in re.findall(r'width="(\d+)" height', text)]
    assert max(sizes) <= 128 and page.stat().st_mode & 0o077 == 0
    again = tmp_path / "again.html"
    report(dataset, again, as_json=False)
    assert again.read_text() == text


def test_the_page_shows_volumes_and_how_regular_they_are(tmp_path):
    series(tmp_path / "s", [0.0, 2.0, 4.0])
    ingest(tmp_path / "s", tmp_path / "out", outputs=("slices", "volumes"))
    page = tmp_path / "page.html"
    found = json.loads(report(tmp_path / "out", page, as_json=True))["volumes"]["ct_volumes"]
    assert sum(found["splits"].values()) == found["regular"] == 1
    assert "1 volumes, 1 regularly spaced" in page.read_text()
    assert "Distance of slices, mm" in page.read_text()


def test_the_page_says_how_many_images_are_left_out_as_equal_to_others(tmp_path):
    for unit in ("one", "two"):
        series(tmp_path / unit / f"in-{unit}", [0.0, 2.0, 4.0])
        ingest(tmp_path / unit, tmp_path / "out")
    (tmp_path / "scratch").mkdir()
    exclusions.update(Store(tmp_path / "out"), tmp_path / "scratch")
    page = tmp_path / "page.html"
    found = json.loads(report(tmp_path / "out", page, as_json=True))
    assert found["left_out"] == {"duplicate": 3} and sum(found["modalities"]["ct"]["splits"].values()) == 3
    assert "Equal to another, left out" in page.read_text()


def test_an_empty_dataset_has_a_page(tmp_path):
    open_or_create(Store(tmp_path / "d"), make.info())
    report(tmp_path / "d", tmp_path / "p.html", as_json=False)
    assert "The dataset holds no image." in (tmp_path / "p.html").read_text()


def test_no_page_inside_the_dataset_nor_without_a_place(dataset, tmp_path):
    before = make.tree(dataset)
    for out in (dataset / "p.html", dataset / "x" / ".." / "p.html"):
        with pytest.raises(UserError, match="inside the dataset"):
            report(dataset, out, as_json=False)
    with pytest.raises(UserError, match="--out"):
        report(dataset, None, as_json=False)
    with pytest.raises(UserError, match="cannot write"):
        report(dataset, tmp_path / "none" / "p.html", as_json=False)
    assert make.tree(dataset) == before


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_browser_shows_the_page_without_a_complaint_and_without_moving_sideways(dataset, tmp_path, window):
    report(dataset, tmp_path / "p.html", as_json=False)
    shown = "[...document.images].filter(i => i.naturalWidth > 0).length"
    seen = look(tmp_path / "p.html", window, (shown, "document.querySelectorAll('.plot path').length"))
    assert seen.complaints == [] and seen.width <= window[0]
    assert seen.values[0] == 12 and seen.values[1] >= 2 and len(seen.picture) > 1000
