"""Figures: what the CSV beside each picture holds, and that the picture is drawn from it."""

import csv
import struct

import numpy as np
import pytest

from trainer.evaluate import figures
from trainer.evaluate.froc import Matched, froc


def rows_of(paths):
    png, table = paths
    assert png.suffix == ".png" and table == png.with_suffix(".csv")
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:24]) == (1024, 640)
    assert sorted(p.name for p in png.parent.iterdir()) == sorted([png.name, table.name])
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_curves_hold_mean_spread_and_the_epoch_of_convergence(tmp_path):
    curves = {"ours": [[0.5, 0.9, 0.91], [0.7, 0.9, 0.89]], "none": [[0.5, np.nan, 0.8], [0.5, np.nan, 0.6]]}
    rows = rows_of(figures.curves_figure(tmp_path / "new" / "curves", curves, title="t"))
    assert rows[0] == {
        "name": "ours",
        "epoch": "1",
        "mean": "0.6",
        "min": "0.5",
        "max": "0.7",
        "n": "2",
        "converged": "False",
    }
    assert [r["epoch"] for r in rows if r["converged"] == "True"] == ["2", "3"]
    assert [r["epoch"] for r in rows if r["name"] == "none"] == ["1", "3"]  # 2 was not evaluated


def test_a_seed_that_stopped_early_counts_while_it_ran(tmp_path):
    rows = rows_of(figures.curves_figure(tmp_path / "x.png", {"a": [[0.5, 0.6], [0.4]]}, share=None))
    assert [(r["mean"], r["n"], r["converged"]) for r in rows] == [
        ("0.45", "2", "False"),
        ("0.6", "1", "False"),
    ]


def test_fractions_hold_the_spread_of_the_seeds(tmp_path):
    rows = rows_of(
        figures.fractions_figure(
            tmp_path / "f.png", {"ours": {1.0: [0.9, 0.8], 0.1: [0.7]}, "none": {1.0: [0.5]}}
        )
    )
    assert [(r["name"], r["fraction"], r["mean"], r["min"], r["max"], r["n"]) for r in rows] == [
        ("ours", "0.1", "0.7", "0.7", "0.7", "1"),
        ("ours", "1", "0.85", "0.8", "0.9", "2"),
        ("none", "1", "0.5", "0.5", "0.5", "1"),
    ]


def test_boxes_hold_what_is_drawn_also_where_a_model_lacks_a_kind(tmp_path):
    values = np.array([[0.01, 0.02, 0.03, 0.04, 9.0]])
    rows = rows_of(
        figures.robustness_figure(
            tmp_path / "r.png", {"gamma": {"ours": values, "none": 2 * values}, "both": {"none": values}}
        )
    )
    assert [(r["transform"], r["model"]) for r in rows] == [
        ("gamma", "ours"),
        ("gamma", "none"),
        ("both", "none"),
    ]
    first = rows[0]
    assert (first["median"], first["low"], first["high"], first["outliers"]) == ("0.03", "0.01", "0.04", "1")


def test_froc_holds_the_whole_curve_and_the_rates(tmp_path):
    curve = froc([Matched(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 4)])
    rows = rows_of(figures.froc_figure(tmp_path / "froc.png", {"ours": curve}, rates=(0.5, 1)))
    assert [(r["kind"], r["threshold"], r["false_positives"], r["sensitivity"]) for r in rows] == [
        ("curve", "0.9", "0", "0.25"),
        ("curve", "0.8", "1", "0.25"),
        ("curve", "0.7", "1", "0.5"),
        ("rate", "", "0.5", "0.25"),
        ("rate", "", "1", "0.5"),
    ]


def test_the_same_data_give_the_same_bytes_and_too_much_or_nothing_is_refused(tmp_path):
    first, again = (
        figures.fractions_figure(tmp_path / name, {"a": {0.5: [0.6, 0.7], 1: [0.8]}}) for name in ("x", "y")
    )
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.curves_figure(tmp_path / "z", {})
    with pytest.raises(ValueError, match="8 names in one figure"):
        figures.fractions_figure(tmp_path / "z", {str(i): {1.0: [0.5]} for i in range(8)})
    assert not (tmp_path / "z.png").exists()
