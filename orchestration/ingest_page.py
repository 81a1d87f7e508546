"""`ingest report`: one HTML page of a dataset with all it needs inside: no request, no script."""

import dataclasses
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from orchestration.ingest_page_data import Histogram, ModalityPage, PageData, VolumesPage, gather
from orchestration.page import WARNING, document, facts, write_private
from orchestration.report_data import REASON_TEXT, modality_name
from orchestration.report_figures import picture
from shards.errors import UserError
from shards.objects import is_url


def report(dataset: Path, out: Path | None, as_json: bool) -> str:
    """Write the page to `out`, mode 0600; returns what to print. Raises UserError."""
    if out is None and not as_json:
        raise UserError("say where the page goes: --out PAGE.html, or --json for its figures")
    if out is not None and not is_url(dataset) and out.resolve().is_relative_to(dataset.resolve()):
        raise UserError(f"{out} lies inside the dataset: give a path outside of it")
    if out is not None and is_url(out):
        raise UserError("the page is a private file of this machine: give a local path")
    data = gather(dataset, pictures=out is not None)
    if out is not None:
        write_private(out, render(data))
    return to_json(data) if as_json else f"wrote {out}; {WARNING}"


def to_json(data: PageData) -> str:
    """The figures of the page, without its pictures."""
    modalities = {
        m.modality: {
            "splits": m.splits,
            "vendors": m.vendors,
            "histograms": [dataclasses.asdict(h) for h in m.histograms],
        }
        for m in data.modalities
    }
    about = {"codec": data.codec, "key_id": data.key_id, "inputs": data.inputs}
    volumes = {v.partition: dataclasses.asdict(v) for v in data.volumes}
    found = {
        "modalities": modalities,
        "volumes": volumes,
        "quarantined": data.refusals,
        "left_out": data.left_out,
    }
    return json.dumps(about | found, indent=1)


def render(data: PageData) -> str:
    """A complete HTML document."""
    images = sum(sum(m.splits.values()) for m in data.modalities)
    boxes = {"Files": data.inputs, "Images": images, "Refused": sum(data.refusals.values())}
    if data.left_out:
        boxes["Equal to another, left out"] = sum(data.left_out.values())
    if data.volumes:
        boxes["Volumes"] = sum(sum(v.splits.values()) for v in data.volumes)
    return document(
        "Ingested dataset",
        f'<h1>Ingested dataset</h1><p class="notice">{escape(WARNING)}</p>'
        f"{facts({name: f'{value:,}' for name, value in boxes.items()})}"
        f'<p class="caption">Codec {escape(data.codec)}, key id {escape(data.key_id)}</p>'
        f"{_images(data)}{_refusals(data)}{''.join(_modality(m, i) for i, m in enumerate(data.modalities))}"
        f"{''.join(map(_volumes, data.volumes))}",
    )


def _images(data: PageData) -> str:
    if not data.modalities:
        return '<section><h2>Images</h2><p class="missing">The dataset holds no image.</p></section>'
    rows = "".join(
        f'<tr id="count-{escape(m.modality)}"><th>{escape(modality_name(m.modality))}</th>'
        + "".join(f'<td class="n">{n}</td>' for n in (*m.splits.values(), sum(m.splits.values())))
        + "</tr>"
        for m in data.modalities
    )
    head = "".join(f'<th class="n">{escape(s)}</th>' for s in (*data.modalities[0].splits, "all"))
    return f"<section><h2>Images by split</h2><table><tr><th></th>{head}</tr>{rows}</table></section>"


def _volumes(page: VolumesPage) -> str:
    name = modality_name(page.partition.removesuffix("_volumes"))
    charts = "".join(_chart(h, "m0") for h in page.histograms)
    count = sum(page.splits.values())
    return (
        f"<section><h2>Volumes: {escape(name)}</h2><p>{count} volumes, {page.regular} regularly spaced "
        f'(right angles, equal steps).</p><div class="uses">{charts}</div></section>'
    )


def _refusals(data: PageData) -> str:
    if not data.refusals:
        return '<section><h2>Refused</h2><p class="missing">Nothing was refused.</p></section>'
    rows = "".join(
        f"<tr><td>{escape(REASON_TEXT.get(reason, 'For another reason.'))}"
        f'<span class="sub"><code>{escape(reason)}</code></span></td><td class="n">{count}</td></tr>'
        for reason, count in data.refusals.items()
    )
    return f"<section><h2>Refused, and why</h2><table>{rows}</table></section>"


def _modality(page: ModalityPage, index: int) -> str:
    name = modality_name(page.modality)
    cells = "".join(f"<span>{picture(image, f'{name} sample')}</span>" for image in page.pictures)
    charts = "".join(_chart(h, f"m{index % 6}") for h in page.histograms)
    return (
        f"<section><h2>{escape(name)}</h2><h3>Vendors</h3>{_vendors(page.vendors)}"
        f'<h3>Sizes and spacing</h3><div class="uses">{charts}</div>'
        f'<h3>Samples</h3><p class="notice">{escape(WARNING)}</p><div class="sheet">{cells}</div></section>'
    )


def _vendors(vendors: Mapping[str, int]) -> str:
    rows = "".join(f'<tr><td>{escape(v)}</td><td class="n">{n}</td></tr>' for v, n in vendors.items())
    return f"<table>{rows}</table>"


def _chart(found: Histogram, style: str) -> str:
    title = f"<div><h4>{escape(found.name)}</h4>"
    if not found.counts:
        return f'{title}<p class="missing">Not recorded.</p></div>'
    peak, width = max(found.counts), 100 / len(found.counts)
    bars = "".join(f"V{100 - 96 * n / peak:.1f}H{(i + 1) * width:.2f}" for i, n in enumerate(found.counts))
    unknown = f"; {found.unknown} unknown" if found.unknown else ""
    return (
        f'{title}<div class="plot bars"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(found.name)}"><path class="fill {style}" d="M0 100{bars}V100Z"/></svg></div>'
        f'<p class="caption">{found.edges[0]:g} to {found.edges[-1]:g}, at most {peak} a bar{unknown}</p>'
        "</div>"
    )
