"""The paper's figures as PNG, each with its data beside it as CSV of the same name.

One function a figure. They take plain data, draw nothing that the CSV does not hold, and return the two
paths. Colours are those of Okabe and Ito (2008), which people with colour-blindness tell apart; lines differ
in their marks too. The same data give the same bytes on the same matplotlib.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from trainer import files
from trainer.evaluate.convergence import SHARE, Curve, convergence_epoch
from trainer.evaluate.froc import RATES, Froc
from trainer.evaluate.robustness import WHISKER, box

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
INK, SOFT, GRID = "#222222", "#555555", "#E3E3E3"
SIZE, DPI = (6.4, 4.0), 160  # inches, dots per inch
MOST = len(COLOURS)

Paths = tuple[Path, Path]  # PNG, CSV


def curves_figure(
    out: Path,
    curves: Mapping[str, Sequence[Curve]],
    *,
    metric: str = "AUC",
    title: str = "",
    share: float | None = SHARE,
) -> Paths:
    """A metric per epoch (from 1 on), one curve a name: the mean over its seeds, shaded from the lowest to
    the highest seed; the mark is the epoch of the mean curve at `share` of its best (None: no mark).

    A seed that ended early is left out after its last epoch. CSV: name, epoch, mean, min, max, n, converged.
    """
    figure, axes = _axes(title, "Epoch", metric)
    rows: list[dict[str, Any]] = []
    for i, (name, seeds) in _numbered(curves):
        values = np.full((len(seeds), max(map(len, seeds))), np.nan)
        for row, seed in zip(values, seeds, strict=True):
            row[: len(seed)] = seed
        there = np.isfinite(values).any(0)
        epochs = np.flatnonzero(there) + 1
        mean, low, high = (f(values[:, there], axis=0) for f in (np.nanmean, np.nanmin, np.nanmax))
        axes.fill_between(epochs, low, high, color=COLOURS[i], alpha=0.18, linewidth=0)
        axes.plot(epochs, mean, color=COLOURS[i], linewidth=1.8, label=name)
        reached = None
        if share is not None and (mean > 0).any():  # a metric that stays at 0 has no share to reach
            reached = convergence_epoch(mean, share) - 1
        if reached is not None:
            axes.plot(epochs[reached], mean[reached], MARKS[i], color=COLOURS[i], **_MARK)
        counts = np.isfinite(values[:, there]).sum(0)
        columns = zip(epochs, mean, low, high, counts, strict=True)
        rows += [
            {"name": name, "epoch": e, "mean": m, "min": lo, "max": hi, "n": n, "converged": k == reached}
            for k, (e, m, lo, hi, n) in enumerate(columns)
        ]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    note = "" if share is None else f"; mark: first epoch at {100 * share:g} % of the best"
    _legend(figure, axes, f"line: mean, band: lowest to highest seed{note}")
    return _written(out, figure, rows)


def fractions_figure(
    out: Path,
    results: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    metric: str = "AUC",
    title: str = "",
) -> Paths:
    """A metric against the share of the labels, one line a name: name to {fraction: values of its seeds}; the
    mean, with bars from the lowest to the highest seed.

    Fractions are evenly spaced, the largest at the right. CSV: name, fraction, mean, min, max, n.
    """
    figure, axes = _axes(title, "Patients with labels", metric)
    places = {f: k for k, f in enumerate(sorted({f for of in results.values() for f in of}))}
    rows: list[dict[str, Any]] = []
    for i, (name, of) in _numbered(results):
        shift = 0.09 * (i - (len(results) - 1) / 2)  # bars side by side, not on each other
        fractions = sorted(of)
        x = [places[f] + shift for f in fractions]
        mean = np.array([np.mean(of[f]) for f in fractions])
        low, high = (np.array([pick(of[f]) for f in fractions]) for pick in (np.min, np.max))
        axes.errorbar(x, mean, (mean - low, high - mean), fmt=f"{MARKS[i]}-", label=name, **_bars(COLOURS[i]))
        rows += [
            {"name": name, "fraction": f, "mean": m, "min": lo, "max": hi, "n": len(of[f])}
            for f, m, lo, hi in zip(fractions, mean, low, high, strict=True)
        ]
    axes.set_xticks(list(places.values()), [f"{100 * f:g} %" for f in places])
    axes.set_xlim(-0.4, len(places) - 0.6)
    _legend(figure, axes, "mark: mean, bar: lowest to highest seed")
    return _written(out, figure, rows)


def robustness_figure(
    out: Path,
    deviations: Mapping[str, Mapping[str, NDArray[np.float64]]],
    *,
    title: str = "",
) -> Paths:
    """Box plots of the relative deviation of the case probability: kind of transform to {model: f64 [images,
    transforms]}, the models side by side within a kind.

    Values beyond the whiskers are not drawn; their share is written above. CSV: transform, model, and the
    fields of robustness.Box.
    """
    figure, axes = _axes(title, "", "Relative deviation of the case probability")
    models = list(dict.fromkeys(m for of in deviations.values() for m in of))
    width = 0.8 / len(models)
    rows: list[dict[str, Any]] = []
    for i, (name, _) in _numbered(dict.fromkeys(models)):
        statistics, places = [], []
        for k, (kind, of) in enumerate(deviations.items()):
            if name not in of:
                continue
            one = box(of[name])
            rows.append({"transform": kind, "model": name, **vars(one)})
            whiskers = {"whislo": one.low, "whishi": one.high}
            statistics.append({"med": one.median, "q1": one.q1, "q3": one.q3, **whiskers})
            places.append(k + width * (i - (len(models) - 1) / 2))
            beyond = f"{100 * one.outliers / one.n:.0f} %"
            place: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
            axes.annotate(beyond, (places[-1], one.high), fontsize=7.5, color=SOFT, **place)
        axes.bxp(statistics, places, widths=0.8 * width, **_box(COLOURS[i]))
        axes.plot([], [], color=COLOURS[i], linewidth=7, alpha=0.45, label=name)
    axes.set_xticks(range(len(deviations)), list(deviations))
    axes.set_xlim(-0.6, len(deviations) - 0.4)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(False, axis="x")
    reach = f"whiskers: within {WHISKER:g} quartile distances; percentages: values beyond them, not drawn"
    _legend(figure, axes, reach)
    return _written(out, figure, rows)


def froc_figure(
    out: Path,
    curves: Mapping[str, Froc],
    *,
    rates: Sequence[float] = RATES,
    title: str = "",
) -> Paths:
    """Sensitivity against false positives per image (logarithmic), one curve a name, with marks at the rates
    whose mean is in the legend. What lies left of the lowest rate is drawn at it, right of the highest it
    ends.

    CSV: name, kind (`curve`: a threshold; `rate`: a mark), threshold, false_positives, sensitivity.
    """
    figure, axes = _axes(title, "False positives per image", "Sensitivity")
    rows: list[dict[str, Any]] = []
    first, last = min(rates), max(rates)
    for i, (name, curve) in _numbered(curves):
        inside = (curve.false_positives >= first) & (curve.false_positives <= last)
        ends = curve.at([first, last])
        x = np.concatenate([[first], curve.false_positives[inside], [last]])
        y = np.concatenate([ends[:1], curve.sensitivity[inside], ends[1:]])
        axes.step(x, y, where="post", color=COLOURS[i], linewidth=1.5)
        axes.plot(rates, curve.at(rates), MARKS[i], color=COLOURS[i], **_MARK)
        label = f"{name} (mean {curve.mean(rates):.3f})"
        axes.plot([], [], f"{MARKS[i]}-", color=COLOURS[i], label=label)
        points = zip(curve.thresholds, curve.false_positives, curve.sensitivity, strict=True)
        marks = zip([None] * len(rates), rates, curve.at(rates), strict=True)
        for kind, many in (("curve", points), ("rate", marks)):
            keys = ("threshold", "false_positives", "sensitivity")
            rows += [{"name": name, "kind": kind, **dict(zip(keys, one, strict=True))} for one in many]
    axes.set_xscale("log")
    axes.set_xlim(first / 1.15, last * 1.15)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(rates))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    _legend(figure, axes, "marks: the rates whose mean sensitivity is given")
    return _written(out, figure, rows)


_MARK: dict[str, Any] = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 3}


def _bars(colour: str) -> dict[str, Any]:
    return {"color": colour, "linewidth": 1.5, "elinewidth": 1.2, "capsize": 3, "markersize": 5.5}


def _box(colour: str) -> dict[str, Any]:
    line = {"color": colour, "linewidth": 1.2}
    faces = {"boxprops": {"facecolor": colour + "55", "edgecolor": colour, "linewidth": 1.2}}
    lines = {"medianprops": {**line, "linewidth": 2}, "whiskerprops": line, "capprops": line}
    return {"patch_artist": True, "showfliers": False, "manage_ticks": False, **faces, **lines}


def _numbered(named: Mapping[str, Any]) -> Iterator[tuple[int, tuple[str, Any]]]:
    if not named:
        raise ValueError("nothing to draw")
    if len(named) > MOST:
        raise ValueError(f"{len(named)} names in one figure, {MOST} can be told apart: draw several figures")
    return enumerate(named.items())


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A Figure of its own (no pyplot: that would be global state, and a window where there is a display)."""
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    return figure, axes


def _legend(figure: Figure, axes: Axes, note: str) -> None:
    """Below the axes, so that it covers no data, with a line on what lines, bars and marks are."""
    columns = min(len(axes.get_legend_handles_labels()[1]), 4)
    legend = figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=9, title=note, title_fontsize=7.5
    )
    legend.get_title().set_color(SOFT)


def _written(out: Path, figure: Figure, rows: Sequence[Mapping[str, Any]]) -> Paths:
    """`out` is the PNG, whatever its suffix says; the CSV lies beside it. Both appear complete."""
    png, table = out.with_suffix(".png"), out.with_suffix(".csv")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    with files.disk_full_is_clear(f"writing {png.name}"):
        png.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(png, picture.getvalue())
        files.replace_file(table, text.getvalue().encode())
    return png, table


def _cell(value: Any) -> str:
    """Numbers with six digits; nothing for what is not known."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
