"""The report of a demo or a run: one HTML file with everything inside it, a pure function of ReportData.

Every text that comes from data is escaped; nothing is fetched, no script runs.
"""

from collections import Counter
from collections.abc import Sequence
from html import escape

from orchestration.page import document, duration, facts, missing, notice, plain_row, section, signed, table
from orchestration.report_data import (
    ENCODER_NAMES,
    ENCODERS,
    PROBE_NAMES,
    REASON_TEXT,
    Comparison,
    PrototypeUse,
    ReportData,
    Spread,
    compare,
    final_loss,
    headline,
    modality_name,
)
from orchestration.report_figures import auc_chart, loss_chart, picture, thumbnail, use_chart, view_figure

BURNED_IN = (
    "These are pixels of patients. Headers were left behind, but names or dates that a device wrote into the "
    "picture can still be visible: look at every picture before you pass this file on."
)
GENERATED = (
    "All pictures in this report are generated; none shows a patient. With your own files this place shows "
    "patients, and text that a device wrote into the pixels can be visible."
)

ON_EVERY_SPLIT = (
    "On every split: with each split of the patients the pretrained encoder is above all random-initialised "
    "ones, though the ranges over the splits overlap."
)


def render(data: ReportData) -> str:
    """ReportData to a complete HTML document (below 3 MB for the samples and views of a demo)."""
    title, lead = headline(data)
    body = "".join(
        part(data)
        for part in (_facts, _notes, _result, _ingested, _seen, _learned, _prototypes, _times, _reproduce)
    )
    return document(
        title,
        f'<p class="kicker">medswav pretraining report, {escape(data.date)}</p>'
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}',
    )


def _facts(data: ReportData) -> str:
    found = {
        "Images ingested": f"{sum(c.total for c in data.counts):,}",
        "Refused, with a reason": f"{sum(r.count for r in data.refusals):,}",
    }
    if data.curve and data.curve.loss:
        found["Loss minus ln K at the end"] = signed(final_loss(data.curve))
    if data.steps:
        found["Time in all"] = duration(sum(s.seconds for s in data.steps))
    return facts(found)


def _notes(data: ReportData) -> str:
    return notice(data.notes) if data.notes else ""


def _result(data: ReportData) -> str:
    title = "Is the encoder any good?"
    rows = compare(data.scores)
    if not rows:
        return section("result", title, "", missing(data.probe_skipped or "No probe was run."))
    linear = [r for r in rows if r.probe == "linear"] or rows
    lead = (
        "The encoder is frozen and a simple classifier is trained on its features. A network of the same "
        "shape with random weights, and a classifier on the plain pixels, show how much of the score is owed "
        "to pretraining."
    )
    body = f"<h3>{PROBE_NAMES.get(linear[0].probe, linear[0].probe)}: mean and range over seeds</h3>"
    body += auc_chart(linear) + _score_table(rows)
    only_paired = any(r.every_seed and not r.beats() for r in rows)
    notes = (data.label_note, data.seed_note, ON_EVERY_SPLIT if only_paired else "", data.probe_skipped or "")
    foot = " ".join(note for note in notes if note)
    return section("result", title, lead, body + (f'<p class="caption">{escape(foot)}</p>' if foot else ""))


def _score_table(rows: Sequence[Comparison]) -> str:
    body = []
    span = Counter(row.modality for row in rows)
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].modality != row.modality
        name = f'<th rowspan="{span[row.modality]}">{escape(modality_name(row.modality))}</th>'
        margin = row.margin()
        won = row.beats()
        text = "-" if margin is None else signed(margin, 3)
        verdict = "outside the spread" if won else "on every split" if row.every_seed else "inside the spread"
        body.append(
            f"<tr>{name if first else ''}<td>{escape(PROBE_NAMES.get(row.probe, row.probe))}"
            f'<span class="sub">{row.n_train:,} train, {row.n_test:,} test</span></td>'
            + "".join(f'<td class="n">{_spread(row.spreads.get(e))}</td>' for e in ENCODERS)
            + f'<td class="n"><span class="{"won" if won else ""}">{text}</span>'
            f'<span class="sub">{verdict if margin is not None else ""}</span></td></tr>'
        )
    head = ("Modality", "Probe", *(ENCODER_NAMES[e] for e in ENCODERS), "Margin over random")
    return table(head, body, frozenset({2, 3, 4, 5}), wide=True)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f'{spread.mean:.3f}<span class="sub">{spread.low:.3f} to {spread.high:.3f}</span>'


def _ingested(data: ReportData) -> str:
    if not data.counts:
        return section("ingested", "What was ingested", "", missing("The dataset holds no image."))
    rows = [
        f"<tr><th>{escape(modality_name(c.modality))}</th>"
        + "".join(f'<td class="n">{v:,}</td>' for v in (c.train, c.val, c.test, c.total, c.patients))
        + "</tr>"
        for c in data.counts
    ]
    sums = [sum(getattr(c, k) for c in data.counts) for k in ("train", "val", "test", "total")]
    foot = "<tr><th>All</th>" + "".join(f'<td class="n">{v:,}</td>' for v in sums) + "<td></td></tr>"
    head = ("Images", "Train", "Validation", "Test", "Total", "Patients")
    counted = table(head, rows, frozenset(range(1, 6)), wide=False, foot=foot if len(rows) > 1 else "")
    files = f"{data.inputs:,} files were read. " if data.inputs else ""
    lead = files + "Patients, not images, are dealt to the three splits, so no patient is in two of them."
    return section("ingested", "What was ingested", lead, counted + _refusals(data) + _sheets(data))


def _refusals(data: ReportData) -> str:
    if not data.refusals:
        return "<h3>Refused</h3><p>Nothing was refused.</p>"
    rows = [
        f"<tr><td>{escape(REASON_TEXT.get(r.reason, 'For another reason.'))}"
        f'<span class="sub"><code>{escape(r.reason)}</code></span></td><td class="n">{r.count:,}</td></tr>'
        for r in sorted(data.refusals, key=lambda r: (-r.count, r.reason))
    ]
    return "<h3>Refused, and why</h3>" + table(("Reason", "Count"), rows, frozenset({1}), wide=False)


def _sheets(data: ReportData) -> str:
    if not data.samples:
        return ""
    parts = [f'<p class="notice">{GENERATED if data.generated else BURNED_IN}</p>']
    for sheet in data.samples:
        name = modality_name(sheet.modality)
        cells = "".join(
            f"<span>{picture(thumbnail(image, 144), f'{name} sample')}</span>" for image in sheet.images
        )
        parts.append(f'<div><h3>{escape(name)}</h3><div class="sheet">{cells}</div></div>')
    return parts[0] + '<div class="sheets">' + "".join(parts[1:]) + "</div>"


def _seen(data: ReportData) -> str:
    title = "What the network saw"
    if not data.views:
        return section("seen", title, "", missing("No view was drawn."))
    lead = (
        "One image of each modality and all views the network got of it in one step: cropped, rescaled, with "
        "the energy of its frequency bands, its gamma and its brightness changed. It learns to give all of "
        "them the same prototypes."
    )
    return section("seen", title, lead, "".join(map(view_figure, data.views)))


def _learned(data: ReportData) -> str:
    title = "How it learned"
    curve = data.curve
    if not curve or not curve.steps:
        return section("learned", title, "", missing("No training step was logged."))
    lead = (
        f"Loss over {curve.steps[-1]:,} steps. A network that tells nothing apart stays at ln K, the dashed "
        "line; every modality has prototypes of its own and so a curve of its own."
    )
    return section("learned", title, lead, loss_chart(curve) + _alarms(data))


def _alarms(data: ReportData) -> str:
    if not data.alarms:
        return '<p class="caption">No alarm: the diagnostics of the training show no sign of a collapse.</p>'
    return notice([f"{text[0].upper()}{text[1:]}." for text in data.alarms])


def _prototypes(data: ReportData) -> str:
    title = "How the prototypes are used"
    if not data.prototypes:
        return section("prototypes", title, "", missing("Prototype use was not counted."))
    lead = (
        "Training images by their nearest prototype, most used first; the dashed line is equal use. "
        "Effective is the number of equally used prototypes with the same entropy; dead ones are nearest to "
        "no image."
    )
    parts = "".join(_use(use, i) for i, use in enumerate(data.prototypes))
    return section("prototypes", title, lead, f'<div class="uses">{parts}</div>')


def _use(use: PrototypeUse, index: int) -> str:
    return (
        f"<div><h4>{escape(modality_name(use.modality))}</h4>{use_chart(use.counts, f'm{index % 6}')}"
        f'<p class="caption">{use.effective:.1f} effective of {len(use.counts)}, {use.dead} dead</p></div>'
    )


def _times(data: ReportData) -> str:
    if not data.steps:
        return ""
    rows = [
        f"<tr><th>{escape(s.name)}</th><td>{escape(s.detail)}</td>"
        f'<td class="n">{duration(s.seconds)}</td></tr>'
        for s in data.steps
    ]
    return section(
        "times", "How long it took", "", table(("Step", "", "Time"), rows, frozenset({2}), wide=False)
    )


def _reproduce(data: ReportData) -> str:
    parts = []
    if data.commands:
        parts.append("<h3>Commands</h3><pre>" + escape("\n".join(data.commands)) + "</pre>")
    about = {**data.dataset, **data.machine, **data.versions}
    if about:
        rows = [plain_row((k, v)) for k, v in about.items()]
        parts.append("<h3>Dataset, machine, versions</h3>" + table(("", ""), rows, frozenset(), wide=False))
    if data.config:
        parts.append(
            f"<details><summary>Training configuration</summary><pre>{escape(data.config)}</pre></details>"
        )
    return section("reproduce", "To do it again", "", "".join(parts)) if parts else ""
