"""What `medswav report` does and prints."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestration.page import WARNING, write_private
from orchestration.run_data import RunData, gather
from orchestration.run_findings import findings, stages, wait_ratio
from orchestration.run_page import PageData, Pictures, render
from shards.errors import UserError
from shards.objects import is_url

MOST_RUNS = 6  # as many lines can be told apart


def report(
    runs: Sequence[Path],
    output: Path | None,
    *,
    dataset: str | None,
    pictures: bool,
    sheet_images: int,
    as_json: bool,
) -> str:
    """Write the page, mode 0600; returns what to print. Raises UserError."""
    if output is None and not as_json:
        raise UserError("say where the page goes: --output FILE.html, or --json for its figures")
    if output is not None and (is_url(output) or output.suffix != ".html"):
        raise UserError(f"--output {output}: the page is a file of this machine, call it NAME.html")
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs: {MOST_RUNS} fit beside each other, name fewer")
    names = _names(runs)
    found = tuple(gather(run, name) for run, name in zip(runs, names, strict=True))
    shown = Pictures()
    if output is not None and pictures and len(runs) == 1:
        from orchestration.run_pictures import make

        shown = make(runs[0], found[0], dataset, sheet_images)
    if output is not None:
        date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        write_private(output, render(PageData(found, date, shown)))
    if as_json:
        return json.dumps([summary(run) for run in found], indent=1)
    lines = [f"{run.name}: {one.title}. {one.advice}" for run in found for one in findings(run)]
    lines += [f"{run.name}: nothing found" for run in found if not findings(run)]
    return "\n".join([*lines, f"wrote {output}{f'; {WARNING}' if shown.any else ', without pictures'}"])


def summary(run: RunData) -> dict[str, Any]:
    """The figures of the page; null where one is not known."""
    return {
        "run": run.name,
        "state": run.standing.state,
        "why": run.standing.why,
        "step": run.step,
        "max_steps": run.config.max_steps,
        "began": run.state.began if run.state is not None else None,
        "seconds": _known(run.seconds),
        "metrics": {name: _known(run.metrics.last(name)) for name in run.metrics.columns},
        "step_seconds": _known(run.timing.last("step_seconds")),
        "wait_ratio": _known(wait_ratio(run.recent)),
        "stage_seconds": stages(run.recent),
        "findings": [asdict(one) for one in findings(run)],
        "events": list(run.events),
        "checkpoints": [asdict(one) for one in run.checkpoints],
        "free_bytes": run.free_bytes,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _names(runs: Sequence[Path]) -> list[str]:
    """The names of the folders, with as much of what is above as tells them apart."""
    whole = [run.resolve() for run in runs]
    if len(set(whole)) < len(whole):
        raise UserError("a run is named twice: name each once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in whole]
