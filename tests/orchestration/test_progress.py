"""Progress without a terminal, and its arithmetic."""

import io

import pytest

from orchestration.progress import Progress, estimate_seconds, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3675, "1:01:15"), (float("inf"), "?"), (-1, "?")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_seconds(seconds) == text


def test_the_estimate_is_the_mean_rate_of_what_was_done():
    assert estimate_seconds(25, 100, 10) == 30
    assert estimate_seconds(0, 100, 10) == float("inf")


def test_without_a_terminal_there_are_plain_lines_with_an_eta():
    stream = io.StringIO()
    with Progress("ingest", 4, "units", stream=stream, interval=0) as progress:
        progress.update(2, "3 refused")
        progress.update(4)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("ingest: 2/4 units, ") and "ETA " in first and first.endswith("3 refused")
    assert last.startswith("ingest: 4/4 units")


def test_plain_lines_are_rare_but_the_last_one_always_comes():
    stream = io.StringIO()
    with Progress("ingest", 100, "units", stream=stream, interval=3600) as progress:
        for done in range(101):
            progress.update(done)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("ingest: 100/100")


def test_more_than_was_expected_does_not_print_a_line_each():
    stream = io.StringIO()
    with Progress("simulate", 5, "steps", stream=stream, interval=3600) as progress:
        for done in range(20):
            progress.update(done)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("simulate: 5/5")


def test_an_unknown_total_shows_counts_alone():
    stream = io.StringIO()
    with Progress("looking", 0, "files", stream=stream, interval=0) as progress:
        progress.update(7)
    assert stream.getvalue().startswith("looking: 7 files, ") and "ETA" not in stream.getvalue()
