"""The contact sheet of `medswav assign`: the nearest images of each prototype on one HTML page, no script."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from orchestration.page import WARNING, document, facts, section, write_private
from orchestration.report_data import modality_name
from orchestration.report_figures import picture
from orchestration.report_style import STRIPS
from trainer.assign import Assigned, pictures
from trainer.embed import Part
from trainer.export import EncoderInfo

SIDE = 112  # px of a picture
WHAT_IT_SHOWS = (
    "Each image belongs to the prototype of its modality with the largest cosine to its features. The number "
    "below an image is its distance, 1 - cosine; 0 is the prototype itself."
)


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
    about = {
        "Network": info.backbone,
        "Steps": f"{info.step:,}",
        "Images": f"{sum(len(p.rows) for p in parts):,}",
    }
    body = (
        f'<h1>Prototypes and their nearest images</h1><p class="notice">{escape(WARNING)}</p>'
        f'<p class="lead">{escape(WHAT_IT_SHOWS)}</p>{facts(about)}'
    )
    body += "".join(
        sheet(root, part, assigned, limit, f"sheet-{part.modality}")
        for part, assigned in zip(parts, found, strict=True)
    )
    write_private(out, document("Prototypes", body, STRIPS))


def sheet(root: str, part: Part, assigned: Assigned, limit: int, anchor: str, title: str = "") -> str:
    """The section of one modality: the nearest images of the `limit` prototypes with the most images.
    title: what stands before its name."""
    counts = assigned.counts
    order = np.argsort(-counts, kind="stable")
    shown = [int(k) for k in order[:limit] if counts[k]]
    used = int((counts > 0).sum())
    more = f"; the {len(shown)} with the most images are shown" if len(shown) < used else ""
    strips = "".join(_prototype(root, part, assigned, k) for k in shown)
    name = modality_name(part.modality)
    lead = f"{len(part.rows):,} images; {used:,} of {len(counts):,} prototypes have some{more}."
    return section(anchor, f"{title}{name}", lead, strips)


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
