"""Pictures and charts of the report as HTML fragments.

A chart is an SVG that stretches with the page, and its words are HTML placed in percent over it: they keep
their size on a phone, follow the page's colours in light and dark, and print as text.
"""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestration.report_data import ENCODER_NAMES, ENCODERS, Comparison, Curve, Views, modality_name

_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """One line of a chart; `style` is a CSS class."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str


def thumbnail(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Shrink uint8 [H, W] so that its longer side is at most `side` px; never enlarges."""
    scale = side / max(image.shape)
    if scale >= 1:
        return image
    height, width = (max(1, round(n * scale)) for n in image.shape)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def picture(image: NDArray[np.uint8], alt: str, style: str = "") -> str:
    """uint8 [H, W] as an <img> with its PNG inside."""
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f"a picture is uint8 [H, W], not {image.dtype} {image.shape}")
    data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    text = base64.b64encode(data).decode("ascii")
    height, width = image.shape
    kind = f' class="{style}"' if style else ""
    size = f'width="{width}" height="{height}"'
    return f'<img{kind} src="data:image/png;base64,{text}" alt="{escape(alt)}" {size}>'


def view_figure(view: Views) -> str:
    """One image and the crops of it."""
    name = modality_name(view.modality)
    biggest = max((g.shape[-1] for g in view.crops), default=0)
    groups = []
    for group in view.crops:
        style = "large" if group.shape[-1] == biggest else "small"
        crops = "".join(picture(crop, f"{name} crop", style) for crop in group)
        groups.append(f'<div class="crops">{crops}</div>')
    sizes = " and ".join(f"{g.shape[0]} × {g.shape[-1]} px" for g in view.crops)
    return (
        f'<div class="views"><figure>{picture(thumbnail(view.image, 352), name, "whole")}'
        f"<figcaption>{escape(name)}, the image</figcaption></figure>"
        f"<figure>{''.join(groups)}<figcaption>{sizes}, enlarged</figcaption></figure></div>"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values inside [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread_labels(positions: Sequence[float], gap: float) -> list[float]:
    """Move label positions (percent) apart to at least `gap`, keeping their order; near their own place."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(50):
        moved = False
        for i, (a, b) in enumerate(pairwise(placed)):
            if b - a < gap - 1e-6:
                shift = (gap - (b - a)) / 2
                placed[i], placed[i + 1], moved = a - shift, b + shift, True
        if not moved:
            break
    result = [0.0] * len(placed)
    for where, value in zip(order, placed, strict=True):
        result[where] = value
    return result


def loss_chart(curve: Curve) -> str:
    """Loss by step: the mean over modalities thick, each modality thin, ln K dashed."""
    lines = [
        Line(modality_name(m), curve.steps, values, f"m{i % 6}")
        for i, (m, values) in enumerate(curve.by_modality.items())
    ]
    if len(lines) != 1:
        lines.append(Line("Mean", curve.steps, curve.loss, "main"))
    return line_chart(lines, "Loss by step", Reference(curve.ln_k, "ln K"))


@dataclass(frozen=True)
class Reference:
    """A dashed horizontal line that says what a value means; `name` and the value are written on it."""

    value: float
    name: str


def line_chart(
    lines: Sequence[Line],
    label: str,
    reference: Reference | None = None,
    least: float | None = None,
    gap: float = 7.0,
) -> str:
    """Lines over steps; the last value of each is written at its end. least: the axis begins there, or below.
    label: what a screen reader says of it; gap: of the names at the ends, in percent of the height."""
    values = [v for line in lines for v in line.y if math.isfinite(v)]
    values += [reference.value] if reference else []
    if not values:
        return '<p class="missing">Not logged.</p>'
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 0.012 * abs(high)) or 0.5  # all are 0
    low, high = low - pad, high + pad
    if least is not None:
        low = min(least, low + pad)
    end = max((x for line in lines for x in line.x), default=1.0)
    return _drawn(lines, label, (0.0, float(max(end, 1))), (low, high), reference, gap)


def _drawn(
    lines: Sequence[Line],
    label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    reference: Reference | None,
    gap: float,
) -> str:
    def left(x: float) -> float:
        return 100 * (x - x_range[0]) / (x_range[1] - x_range[0])

    def top(y: float) -> float:
        return 100 * (y_range[1] - y) / (y_range[1] - y_range[0])

    grid = "".join(f'<path class="grid" d="M0 {top(t):.2f}H100"/>' for t in ticks(*y_range, 4))
    drawn = "".join(f'<path class="line {line.style}" d="{_path(line, left, top)}"/>' for line in lines)
    dashed = note = ""
    if reference:
        place = top(reference.value)
        dashed = f'<path class="line reference" d="M0 {place:.2f}H100"/>'
        text = f"{escape(reference.name)} = {number(reference.value)}"
        kind = "note under" if place > 50 else "note"
        note = f'<span class="{kind}" style="top:{place:.2f}%">{text}</span>'
    y_labels = "".join(
        f'<span class="y" style="top:{top(t):.2f}%">{_tick(t)}</span>' for t in ticks(*y_range, 4)
    )
    x_labels = "".join(
        f'<span class="x" style="left:{left(t):.2f}%">{t:,.0f}</span>' for t in ticks(*x_range, 4)
    )
    ends = [next((y for y in reversed(line.y) if math.isfinite(y)), y_range[0]) for line in lines]
    places = spread_labels([top(y) for y in ends], gap)
    names = "".join(
        f'<span class="end {line.style}" style="top:{place:.2f}%">{escape(line.name)} {number(end)}</span>'
        for line, place, end in zip(lines, places, ends, strict=True)
    )
    return (
        '<div class="plot lines"><div class="area">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{grid}{dashed}{drawn}</svg>{y_labels}{x_labels}{names}{note}</div></div>"
    )


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def number(value: float) -> str:
    """3.14, 27.1, 1,234 or 2.0e-05: three digits that count."""
    if value == 0 or 0.01 <= abs(value) < 10:
        return f"{value:.2f}"
    if abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _path(line: Line, left: _Scale, top: _Scale) -> str:
    points = [f"{left(x):.2f} {top(y):.2f}" for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    return "M" + "L".join(points) if points else ""


def use_chart(counts: Sequence[float], style: str) -> str:
    """Prototype use, most used first, as bars; the dashed line is equal use of all."""
    ordered = sorted(counts, reverse=True)
    if not ordered or not ordered[0]:
        return '<p class="missing">No image was assigned.</p>'
    width, peak = 100 / len(ordered), ordered[0]
    # One step outline instead of a rectangle each: 3000 prototypes stay a few kilobytes.
    outline = "M0 100" + "".join(
        f"V{100 - 96 * c / peak:.1f}H{(i + 1) * width:.2f}" for i, c in enumerate(ordered)
    )
    equal = 100 - 96 * (sum(ordered) / len(ordered)) / peak
    return (
        '<div class="plot bars"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Images by prototype, most used first"><path class="fill {style}" d="{outline}V100Z"/>'
        f'<path class="line reference" d="M0 {equal:.1f}H100"/></svg></div>'
    )


def auc_chart(rows: Sequence[Comparison]) -> str:
    """A line per modality on a common AUC axis: a dot per encoder at its mean, a bar from min to max."""
    values = [v for row in rows for s in row.spreads.values() for v in (s.low, s.high)]
    low = min(0.5, math.floor(min(values) * 20) / 20)
    span = 1.0 - low

    def left(auc: float) -> float:
        return 100 * (auc - low) / span

    marks = ticks(low, 1.0, 6)
    grid = "".join(f'<i class="tick" style="left:{left(t):.2f}%"></i>' for t in marks)
    body = []
    for row in rows:
        dots = []
        for encoder in reversed(ENCODERS):
            if spread := row.spreads.get(encoder):
                dots.append(
                    f'<i class="range {encoder}" style="left:{left(spread.low):.2f}%;'
                    f'width:{left(spread.high) - left(spread.low):.2f}%"></i>'
                    f'<i class="dot {encoder}" style="left:{left(spread.mean):.2f}%" '
                    f'title="{ENCODER_NAMES[encoder]} {spread.mean:.3f}"></i>'
                )
        body.append(
            f'<div class="row"><b>{escape(modality_name(row.modality))}</b>'
            f'<div class="track">{grid}{"".join(dots)}</div></div>'
        )
    axis = "".join(f'<span style="left:{left(t):.2f}%">{t:g}</span>' for t in marks)
    legend = "".join(
        f'<span><i class="dot {e}"></i>{ENCODER_NAMES[e]}</span>'
        for e in ENCODERS
        if any(e in row.spreads for row in rows)
    )
    return (
        f'<div class="legend">{legend}</div>'
        '<div class="auc" role="img" aria-label="AUC by modality and encoder">'
        f'{"".join(body)}<div class="row axis"><b>AUC</b><div class="track">{axis}</div></div></div>'
    )
