"""The page of `medswav evaluate experiment`: fractions, convergence and robustness of every task."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestration import evaluate_job, evaluate_robust
from orchestration.evaluate_job import Finding
from orchestration.evaluate_page import Page, Section, markdown, render
from orchestration.evaluate_runs import Arm, read_arms
from trainer import files

_IMAGES = "mode"  # the setting that says whether a network was trained on images


def write_page(runs: Mapping[str, Sequence[str]], facts: Mapping[str, Any], out: Path) -> str:
    """runs: by task, as `medswav evaluate` takes them. OUT/page.html, results.json, results.md; the text of
    the latter."""
    sections, tree, lines = [], dict(facts), []
    tree["tasks"] = {}
    for task, given in runs.items():
        findings = findings_of(task, read_arms(given), out / task)
        tree["tasks"][task] = {found.name: found.tree for found in findings}
        parts = [found.section for found in findings]
        tables = [table for part in parts for table in part.tables]
        leads = " ".join(part.lead for part in parts[:1])
        charts = [chart for part in parts for chart in part.charts]
        sections.append(Section(task, leads, tables, charts, anchor=task))
        lines += [f"## {task}", "", *map(markdown, tables)]
    notes = [f"{name} was left out: {why}" for name, why in facts["left_out"].items()]
    lead = (
        f"Fine-tuned on shares of the training patients, {_seeds(facts)} seeds. Networks of the same kind "
        f"from random weights and from pretraining without labels ({facts['pretraining']}), and a linear "
        "head on bare pixels."
    )
    page = Page("Few labels: pretrained or not", lead, f"medswav evaluate, {facts['date']}", sections, notes)
    text = "\n".join([*notes, *([""] if notes else []), *lines])
    with files.disk_full_is_clear("writing the page"):
        files.replace_file(out / "page.html", render(page).encode())
        files.replace_file(out / "results.json", (json.dumps(tree, indent=1) + "\n").encode())
        files.replace_file(out / "results.md", text.encode())
    return f"{text}\nwrote {out / 'page.html'}"


def findings_of(task: str, arms: Sequence[Arm], out: Path) -> list[Finding]:
    """Each with its figures in `out`."""
    found = [evaluate_job.fractions(arms, out, title=task), evaluate_job.convergence(arms, out, title=task)]
    on_images = [arm for arm in arms if _settings(arm)[_IMAGES] == "full"]
    if on_images:
        found.append(evaluate_robust.robustness(on_images, out, title=task))
    return found


def _settings(arm: Arm) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((arm.cells[0].run / "run.json").read_text())["settings"]
    return found


def _seeds(facts: Mapping[str, Any]) -> int:
    return len(facts["plan"]["seeds"])
