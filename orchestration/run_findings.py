"""What is wrong with a run, and what to do about it, in words: alarms of the training, and what its speed,
its disk and its end say. A pure function of RunData; docs/diagnostics.md leads on from each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.report_data import modality_name
from orchestration.run_data import RunData
from trainer.alarms import TITLES

STARVED = 0.1  # share of the time that the ranks wait for data, over the newest logged rows
ENOUGH_ROWS = 3
_OPERATIONS, _DIAGNOSTICS = "docs/operations.md", "docs/diagnostics.md"

# What makes a batch slow, by the stage that takes most of its time.
_BY_STAGE = {
    "read": (
        "reading is the slow part: put the dataset (or `data.node_cache`) on a faster disk, or raise "
        "`data.read_threads`"
    ),
    "decode": "decoding is the slow part: give more `--feeders` (`--workers` of python -m trainer), or CPUs",
    "augment": (
        "making the views is the slow part: give more `--feeders` (`--workers` of python -m trainer), or CPUs"
    ),
}


@dataclass(frozen=True)
class Finding:
    """`kind`: a sign of trainer.alarms, or failed, killed, disk_full, disk_low, starved, no_checkpoint.
    where: the page of the docs."""

    kind: str
    title: str
    advice: str
    where: str


def findings(data: RunData) -> list[Finding]:
    """Gravest first: what ended the run, what is about to, what keeps it from learning, what slows it."""
    end = _end(data)
    disk = [one for one in _disk(data) if one.kind not in {other.kind for other in end}]
    return [*end, *disk, *_alarms(data), *_speed(data)]


def _end(data: RunData) -> list[Finding]:
    if data.standing.state == "broken":
        if "disk full" in data.standing.why:
            return [Finding("disk_full", "The disk is full", _sentence(data.standing.why), _OPERATIONS)]
        return [Finding("failed", "The run has failed", _sentence(data.standing.why), _OPERATIONS)]
    if data.standing.state == "stopped" and data.state is not None and data.state.state == "running":
        advice = f"{_sentence(data.standing.why)} Was it killed, or out of memory?"
        return [Finding("killed", "The run ended without a word", advice, _OPERATIONS)]
    return []


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _disk(data: RunData) -> list[Finding]:
    failures = int(data.recent[-1].get("checkpoint_failures") or 0) if data.recent else 0
    size = max((c.bytes or 0 for c in data.checkpoints), default=0)
    free = f"{data.free_bytes / 1e6:,.0f} MB are free, a checkpoint takes {size / 1e6:,.0f} MB"
    if failures and data.standing.state != "done":
        limit = data.config.checkpoint.full_disk_saves
        text = f"{failures} in a row; the run ends after {limit}. {free}: free some space."
        return [Finding("disk_full", "Checkpoints are not saved, the disk is full", text, _OPERATIONS)]
    if size and data.free_bytes < 1.5 * size and data.standing.state != "done":
        text = f"{free}: free some space, or lower checkpoint.keep."
        return [Finding("disk_low", "The next checkpoint will hardly fit on the disk", text, _OPERATIONS)]
    every = data.config.checkpoint.every_steps
    newest = max((c.step for c in data.checkpoints if c.trouble is None), default=0)
    if data.standing.state == "running" and data.step - newest > 2 * every:
        text = f"The newest good one is of step {newest:,}, one is due every {every:,}: look at the log."
        return [Finding("no_checkpoint", "No checkpoint for long", text, _OPERATIONS)]
    return []


def _alarms(data: RunData) -> list[Finding]:
    """One finding for each sign, whatever number of modalities has it."""
    found = []
    for sign, title in TITLES.items():
        own = [alarm for alarm in data.alarms if alarm.sign == sign]
        if own:
            where = ", ".join(f"{modality_name(a.modality)} since step {a.since:,}" for a in own)
            text = f"{where}. {own[0].advice[0].upper()}{own[0].advice[1:]}."
            found.append(Finding(sign, f"{title[0].upper()}{title[1:]}", text, _DIAGNOSTICS))
    return found


def wait_ratio(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of the time of these rows of timing.jsonl that was waited for data; nan where there is none."""
    seconds = sum(float(row["step_seconds"]) for row in rows)
    return sum(float(row["wait_seconds"]) for row in rows) / seconds if seconds > 0 else math.nan


def stages(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{read, decode, augment: mean seconds of a batch of a rank}, of those that are there."""
    found = {}
    for stage in _BY_STAGE:
        values = [float(row[f"{stage}_seconds"]) for row in rows if row.get(f"{stage}_seconds") is not None]
        if values:
            found[stage] = sum(values) / len(values)
    return found


def _speed(data: RunData) -> list[Finding]:
    rows = data.recent[-ENOUGH_ROWS:]
    ratio = wait_ratio(rows)
    if len(rows) < ENOUGH_ROWS or not ratio > STARVED:
        return []
    found = stages(rows)
    advice = "give more `--feeders` (`--workers` of python -m trainer), or CPUs"
    of_batch = ""
    if sum(found.values()) > 0:
        slowest = max(found, key=lambda stage: found[stage])
        advice = _BY_STAGE[slowest]
        parts = ", ".join(f"{stage} {1000 * seconds:,.0f} ms" for stage, seconds in found.items())
        of_batch = f"A batch takes its maker {parts}: "
    text = f"{of_batch}{advice}." if of_batch else f"{advice[0].upper()}{advice[1:]}."
    return [Finding("starved", f"{ratio:.0%} of the time is waited for data (starved)", text, _OPERATIONS)]
