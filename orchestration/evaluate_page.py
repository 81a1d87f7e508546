"""The page of `medswav evaluate`: one HTML file with tables, figures and their data inside. Pure but for the
files of the figures, which it reads.

Every text is escaped; nothing is fetched, no script runs.
"""

import base64
import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from orchestration.report_style import CSS

_OWN = """
.chart{margin:1.25rem 0 1.5rem}
.chart img{width:100%;max-width:44rem;background:#fff;border:1px solid var(--line);border-radius:4px}
td.n .sub{white-space:nowrap}
.data{max-height:22rem;overflow:auto}
nav{display:flex;flex-wrap:wrap;gap:.35rem 1.25rem;margin:1rem 0 0}nav a{color:var(--accent)}
"""
_CSV_ROWS = 60  # of a figure's data, that the page shows; the whole file is behind the link


@dataclass(frozen=True)
class Value:
    """A cell of a table: the number, what stands below it, and whether it is set off."""

    text: str
    below: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """rows: a name and its cells."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Value]]]
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure with its data: PNG and CSV."""

    title: str
    png: Path
    csv: Path


@dataclass(frozen=True)
class Section:
    title: str
    lead: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    anchor: str = ""


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    kicker: str
    sections: Sequence[Section]
    notes: Sequence[str] = field(default=())


def render(page: Page) -> str:
    """A complete HTML document."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in page.notes)
    links = "".join(f'<a href="#{_anchor(s, i)}">{escape(s.title)}</a>' for i, s in enumerate(page.sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(page.title)}</title>'
        f"<style>{CSS}{_OWN}</style></head>\n<body><main>"
        f'<p class="kicker">{escape(page.kicker)}</p><h1>{escape(page.title)}</h1>'
        f'<p class="lead">{escape(page.lead)}</p>'
        + (f'<div class="notice">{notes}</div>' if notes else "")
        + (f"<nav>{links}</nav>" if len(page.sections) > 1 else "")
        + "".join(_section(section, i) for i, section in enumerate(page.sections))
        + "<footer>This file is complete: it loads nothing and needs no network.</footer>"
        "</main></body></html>\n"
    )


def _anchor(section: Section, index: int) -> str:
    return escape(section.anchor or f"part-{index}")


def _section(section: Section, index: int) -> str:
    notes = "".join(f'<p class="notice">{escape(note)}</p>' for note in section.notes)
    return (
        f'\n<section id="{_anchor(section, index)}"><h2>{escape(section.title)}</h2>'
        f"<p>{escape(section.lead)}</p>{notes}"
        + "".join(map(_table, section.tables))
        + "".join(map(_chart, section.charts))
        + "</section>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th{_numeric(i > 0)}>{escape(h)}</th>" for i, h in enumerate(table.head))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(map(_cell, cells))}</tr>" for name, cells in table.rows
    )
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    kind = ' class="wide"' if len(table.head) > 3 else ""
    return (
        f'{title}<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{caption}"
    )


def _numeric(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _cell(value: Value) -> str:
    text = f'<span class="won">{escape(value.text)}</span>' if value.strong else escape(value.text)
    below = f'<span class="sub">{escape(value.below)}</span>' if value.below else ""
    return f'<td class="n">{text}{below}</td>'


def _chart(chart: Chart) -> str:
    picture = base64.b64encode(chart.png.read_bytes()).decode("ascii")
    data = chart.csv.read_bytes()
    rows = list(csv.reader(data.decode().splitlines()))
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    shown = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1 : _CSV_ROWS + 1]
    )
    more = f"; the first {_CSV_ROWS} of {len(rows) - 1} rows" if len(rows) - 1 > _CSV_ROWS else ""
    link = f"data:text/csv;base64,{base64.b64encode(data).decode('ascii')}"
    return (
        f'<figure class="chart"><img src="data:image/png;base64,{picture}" alt="{escape(chart.title)}">'
        f"<figcaption>{escape(chart.title)}</figcaption>"
        f"<details><summary>Data</summary><p class='caption'>"
        f'<a download="{escape(chart.csv.name)}" href="{link}">{escape(chart.csv.name)}</a>{more}</p>'
        f'<div class="scroll data"><table><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table></div>'
        "</details></figure>"
    )


def markdown(table: Table) -> str:
    """The same table as text."""
    lines = [f"| {' | '.join(table.head)} |", f"|{'---|' * len(table.head)}"]
    for name, cells in table.rows:
        texts = [f"{value.text} {value.below}".strip() for value in cells]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join([*([table.title, ""] if table.title else []), *lines, "", *_caption(table)])


def _caption(table: Table) -> list[str]:
    return [table.caption, ""] if table.caption else []
