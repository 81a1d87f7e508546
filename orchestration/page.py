"""What all HTML pages share: the frame, sections, tables, boxes of facts, and how a page gets to the disk.

Every text that comes from data is escaped; nothing is fetched, no script runs.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from orchestration.report_style import CSS
from shards.errors import UserError

WARNING = (
    "This page is as sensitive as the dataset. It shows pixels of patients: names or dates that a device "
    "wrote into a picture can still be visible. Look at every picture before you pass this file on."
)
COMPLETE = "This file is complete: it loads nothing and needs no network."


def document(title: str, body: str, style: str = "") -> str:
    """A whole HTML document. body: markup; style: CSS beside that of all pages."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{CSS}{style}</style></head>\n<body><main>{body}"
        f"<footer>{COMPLETE}</footer></main></body></html>\n"
    )


def section(anchor: str, title: str, lead: str, body: str) -> str:
    text = f"<p>{escape(lead)}</p>" if lead else ""
    return f'\n<section id="{anchor}"><h2>{escape(title)}</h2>{text}{body}</section>'


def facts(values: Mapping[str, str]) -> str:
    boxes = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="facts">{boxes}</dl>'


def notice(texts: Sequence[str]) -> str:
    return '<div class="notice">' + "".join(f"<p>{escape(text)}</p>" for text in texts) + "</div>"


def missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def table(
    head: Sequence[str], rows: Sequence[str], numeric: frozenset[int], wide: bool, foot: str = ""
) -> str:
    """rows: markup of whole rows; numeric: columns of numbers; wide: may scroll on a phone."""
    cells = "".join(f"<th{_n(i in numeric)}>{escape(h)}</th>" for i, h in enumerate(head))
    kind = ' class="wide"' if wide else ""
    tail = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{tail}</table></div>"
    )


def plain_row(cells: Sequence[str], numeric: frozenset[int] = frozenset()) -> str:
    """A row of plain texts whose first cell names it."""
    first, *rest = cells
    others = "".join(f"<td{_n(i in numeric)}>{escape(cell)}</td>" for i, cell in enumerate(rest, 1))
    return f"<tr><th>{escape(first)}</th>{others}</tr>"


def _n(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s or 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def signed(value: float, digits: int = 2) -> str:
    """+0.12 or −0.12, with a real minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def write_private(out: Path, text: str) -> None:
    """A page with pixels in it: for its owner only (mode 0600), whole or not at all. Raises UserError."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(out)
        except BaseException:
            Path(name).unlink()
            raise
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
