"""The contact sheet of `medswav assign`: the nearest images of each prototype on one HTML page, no script."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from orchestration.ingest_page import WARNING, write_private
from orchestration.report_data import modality_name
from orchestration.report_figures import picture
from orchestration.report_style import CSS
from trainer.assign import Assigned, pictures
from trainer.embed import Part
from trainer.export import EncoderInfo

SIDE = 112  # px of a picture
_STYLE = """
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.4rem,1fr));gap:3px;margin:.3rem 0 1.5rem}
.strip figure{margin:0;background:#000;border-radius:3px;overflow:hidden}
.strip img{width:100%;aspect-ratio:1;object-fit:contain}
.strip figcaption{margin:0;padding:.1rem .35rem;background:var(--wash);font-variant-numeric:tabular-nums}
"""


def write_page(
    out: Path,
    root: str,
    info: EncoderInfo,
    parts: Sequence[Part],
    found: Sequence[Assigned],
    limit: int,
) -> None:
    """Write the page, mode 0600. limit: prototypes of a modality, those with the most images. Raises
    UserError."""
    sections = [_modality(root, part, assigned, limit) for part, assigned in zip(parts, found, strict=True)]
    facts = {
        "Network": info.backbone,
        "Steps": f"{info.step:,}",
        "Images": f"{sum(len(p.rows) for p in parts):,}",
    }
    boxes = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    write_private(
        out,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Prototypes</title><style>{CSS}{_STYLE}</style></head>\n<body><main>"
        f'<h1>Prototypes and their nearest images</h1><p class="notice">{escape(WARNING)}</p>'
        f'<p class="lead">Each image belongs to the prototype of its modality with the largest cosine to its '
        "features. The number below an image is its distance, 1 - cosine; 0 is the prototype itself.</p>"
        f'<dl class="facts">{boxes}</dl>{"".join(sections)}'
        "<footer>This file is complete: it loads nothing.</footer></main></body></html>\n",
    )


def _modality(root: str, part: Part, assigned: Assigned, limit: int) -> str:
    counts = assigned.counts
    order = np.argsort(-counts, kind="stable")
    shown = [int(k) for k in order[:limit] if counts[k]]
    used = int((counts > 0).sum())
    more = f"; the {len(shown)} with the most images are shown" if len(shown) < used else ""
    strips = "".join(_prototype(root, part, assigned, k) for k in shown)
    name = modality_name(part.modality)
    return (
        f"<section><h2>{escape(name)}</h2><p>{len(part.rows):,} images; {used:,} of {len(counts):,} "
        f"prototypes have some{more}.</p>{strips}</section>"
    )


def _prototype(root: str, part: Part, assigned: Assigned, number: int) -> str:
    distances, rows = assigned.nearest[number]
    alt = f"{modality_name(part.modality)} near prototype {number}"
    cells = "".join(
        f"<figure>{picture(image, alt)}<figcaption>{distance:.3f}</figcaption></figure>"
        for image, distance in zip(pictures(root, part, rows, SIDE), distances, strict=True)
    )
    count = int(assigned.counts[number])
    return (
        f"<h3>Prototype {number} <small>{count:,} image{'' if count == 1 else 's'}</small></h3>"
        f'<div class="strip">{cells}</div>'
    )
