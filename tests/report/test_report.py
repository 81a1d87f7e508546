"""The report: complete without a network, honest about what is missing, and safe for any text."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from orchestration.report import duration, render
from orchestration.report_data import REASON_TEXT, PrototypeUse, ReportData, Score, compare, headline
from orchestration.report_figures import picture, spread_labels, thumbnail, ticks
from shards.schema import Reason
from tests.report.fake import MODALITIES, report_data

SECTIONS = ("result", "ingested", "seen", "learned", "prototypes", "times", "reproduce")
VOID = {"meta", "img", "br", "link", "hr", "input", "path"}


class Outline(HTMLParser):
    """Section ids, urls and the balance of tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.urls: list[str] = []
        self.images = 0
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.ids.append(values.get("id") or "")
        self.urls += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        self.images += tag == "img"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"unbalanced </{tag}>"


@pytest.fixture(scope="module")
def page() -> str:
    return render(report_data())


def test_a_full_report_has_every_section_and_every_picture(page: str) -> None:
    outline = Outline(page)
    assert tuple(outline.ids) == SECTIONS
    assert outline.open == []
    assert outline.images == len(MODALITIES) * (12 + 1 + 2 + 6)


def test_the_report_loads_nothing_and_is_below_3_mb(page: str) -> None:
    outline = Outline(page)
    assert all(url.startswith("data:image/png;base64,") for url in outline.urls)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)
    assert len(page.encode()) < 3_000_000


def test_rendering_is_a_pure_function(page: str) -> None:
    assert render(report_data()) == page


def test_text_from_data_is_escaped() -> None:
    evil = '<img src=x onerror="alert(1)">&'
    data = replace(
        report_data(),
        notes=(evil,),
        commands=(evil,),
        config=evil,
        versions={evil: evil},
        label_note=evil,
        date=evil,
        probe_skipped=evil,
    )
    page = render(data)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;") >= 6


def test_alarms_of_the_training_are_told_and_so_is_that_there_were_none(page: str) -> None:
    assert "No alarm: the diagnostics" in page
    text = "alarm, ct since step 0: codes are uniform: lower swav.epsilon <a>"
    told = render(replace(report_data(), alarms=(text,)))
    assert "<p>Alarm, ct since step 0: codes are uniform: lower swav.epsilon &lt;a&gt;.</p>" in told
    assert "No alarm" not in told


def test_missing_parts_are_named_not_left_out() -> None:
    reason = "No labels were given, so the probe was skipped."
    page = render(ReportData(generated=False, date="2026-11-23", probe_skipped=reason))
    for text in (
        reason,
        "The dataset holds no image.",
        "No view was drawn.",
        "No training step was logged.",
        "Prototype use was not counted.",
    ):
        assert text in page
    assert "beats" not in page


def test_pictures_of_patients_come_with_a_warning_about_burned_in_text() -> None:
    page = render(replace(report_data(), generated=False))
    assert "pixels of patients" in page and "can still be visible" in page


def test_every_reason_has_an_explanation_in_plain_words() -> None:
    assert set(REASON_TEXT) == {str(r) for r in Reason}


def _scores(pretrained: list[float], random: list[float], modality: str = "ct") -> list[Score]:
    both = {"pretrained": pretrained, "random": random}
    return [Score(modality, e, "linear", i, v, 10, 5) for e, vs in both.items() for i, v in enumerate(vs)]


def test_a_margin_inside_the_spread_of_the_seeds_is_no_win() -> None:
    inside = compare(_scores([0.80, 0.90, 0.91], [0.70, 0.75, 0.81]))[0]
    outside = compare(_scores([0.82, 0.90, 0.91], [0.70, 0.75, 0.81]))[0]
    assert not inside.beats() and outside.beats()
    assert outside.margin() == pytest.approx(0.8766667 - 0.7533333, abs=1e-6)


def test_a_lead_on_every_split_is_told_from_one_on_some() -> None:
    every = compare(_scores([0.80, 0.90, 0.70], [0.79, 0.85, 0.60]))[0]
    some = compare(_scores([0.80, 0.90, 0.59], [0.79, 0.85, 0.60]))[0]
    assert every.every_seed and not some.every_seed and not every.beats()


def test_the_headline_counts_wins_and_admits_none() -> None:
    win, loss = _scores([0.9], [0.8], "ct"), _scores([0.7], [0.8], "mr")
    base = ReportData(generated=True, date="")
    assert "1 of 2" in headline(replace(base, scores=tuple(win + loss)))[0]
    assert "has not beaten" in headline(replace(base, scores=tuple(loss)))[0]


def test_prototype_use_of_an_even_spread_is_all_of_them() -> None:
    assert PrototypeUse.of("ct", [5] * 8).effective == pytest.approx(8.0)
    one = PrototypeUse.of("ct", [40, 0, 0, 0])
    assert (one.effective, one.dead) == (pytest.approx(1.0), 3)
    assert PrototypeUse.of("ct", [0, 0]).effective == 0.0


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.5, 1.0, 5) == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert ticks(0, 1000, 4) == [0, 250, 500, 750, 1000]
    assert ticks(3.0, 3.0) == [3.0]


def test_labels_are_moved_apart_in_order() -> None:
    placed = spread_labels([50.0, 51.0, 10.0], 7.0)
    assert placed[2] == 10.0 and placed[1] - placed[0] == pytest.approx(7.0)


def test_a_picture_is_uint8_and_grey() -> None:
    with pytest.raises(ValueError, match="uint8"):
        picture(np.zeros((4, 4), np.float32), "x")
    assert thumbnail(np.zeros((400, 100), np.uint8), 100).shape == (100, 25)
    assert thumbnail(np.zeros((40, 10), np.uint8), 100).shape == (40, 10)


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (12.34, 245, 7800)] == ["12.3 s", "4 min 05 s", "2 h 10 min"]
