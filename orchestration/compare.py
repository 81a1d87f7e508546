"""`medswav compare`: arms x seeds on one dataset, judged by frozen features, as one table.

OUT/dataset, OUT/runs/<job>, OUT/scores/<job>.json, OUT/results.json, OUT/results.md. While settings are
chosen (`tune`) there is a dataset, with runs and scores, for each third of the patients of train that takes
the place of test: OUT/tune/third-<n>; seed s is judged on third s modulo 3. Every job is processes of one
thread each, `jobs` of them at a time; what is finished is kept, and a killed one goes on from its checkpoint:
the same command again.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TextIO

import yaml

from orchestration import compare_data
from orchestration.bench import machine
from orchestration.cluster import StopFlag
from orchestration.compare_plan import Arm, Plan
from orchestration.processes import run_jobs
from shards.errors import UserError
from shards.ids import digest
from shards.store import file_sha256
from trainer import files, journal
from trainer.config import TrainConfig
from trainer.downstream.compare import less, markdown, summarise

SCORES_VERSION = "2"
THIRDS = 3
RANDOM = "random"  # the arm that the others are compared with, where a plan has it


@dataclass(frozen=True)
class Job:
    """One encoder to train (or not) and to judge. draws: the (seed, fraction) that it is judged with."""

    name: str
    arm: Arm
    config: TrainConfig
    draws: tuple[tuple[int, float], ...]
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def config_file(self) -> Path:
        return self.folder / "runs" / f"{self.name}.yaml"

    @property
    def scores(self) -> Path:
        return self.folder / "scores" / f"{self.name}.json"

    @property
    def steps(self) -> int:
        """To train."""
        return self.config.max_steps if self.arm.trains else 0

    def trained(self) -> int:
        """Steps done so far."""
        if not self.arm.trains:
            return 0
        if (self.run_dir / "encoder.safetensors").is_file():
            return self.steps
        return (
            int(next((row["step"] for row in reversed(journal.read(self.run_dir / "metrics.jsonl"))), -1)) + 1
        )

    def inputs(self) -> str:
        """Names what the scores depend on."""
        encoder = self.run_dir / "encoder.safetensors"
        tables = [file_sha256(p) for p in sorted((self.folder / "tables").glob("*.csv"))]
        weights = file_sha256(encoder) if self.arm.trains and encoder.is_file() else ""
        return digest(SCORES_VERSION, self.config.model_dump_json(), weights, str(self.draws), *tables)

    def judged(self) -> list[dict[str, Any]] | None:
        """The rows, or None where there are none of these inputs yet."""
        try:
            found = json.loads(self.scores.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found["rows"] if found["inputs"] == self.inputs() else None

    @property
    def log(self) -> Path:
        return self.config_file.with_suffix(".log")

    def commands(self) -> Iterator[list[str]]:
        """What is left to do, one process after the other."""
        python, spec = [sys.executable, "-m"], self.config_file.with_suffix(".json")
        tree = self.config.model_dump(mode="json", exclude_unset=True)
        files.replace_file(self.config_file, yaml.safe_dump(tree).encode())
        if self.arm.trains:  # the run itself says whether it is complete, and refuses one of other settings
            own = ["--preset", str(self.config_file), "--run-dir", str(self.run_dir), "--workers", "0"]
            yield [*python, "trainer", *own]
        files.replace_file(spec, json.dumps(_spec(self)).encode())
        yield [*python, "orchestration.compare_probe", str(spec)]


def compare(
    plan: Plan,
    data: Path,
    out: Path,
    *,
    tune: bool = False,
    jobs: int = 2,
    stream: TextIO | None = None,
) -> int:
    """Make or continue the comparison in `out` (in `out`/tune without the real test images); prints the
    tables; the exit code. Raises UserError."""
    if not data.is_dir():
        raise UserError(f"the folder of the data {data} does not exist: check --data")
    out = out / "tune" if tune else out
    for arm in plan.arms:  # a wrong setting is told now, not after the ingest
        plan.config(arm, plan.seeds[0], str(out / "dataset"))
    out.mkdir(parents=True, exist_ok=True)
    for folder, third in folders_of(plan, out, tune=tune).values():
        folder.mkdir(exist_ok=True)
        if not compare_data.build_dataset(plan, data, folder, stream, third=third):
            return 130
    listed = jobs_of(plan, out, tune=tune)
    with StopFlag() as stop:
        failed = run_jobs([job for job in listed if job.judged() is None], jobs, stop, stream)
        stopped = bool(stop)
    rows = [row for job in listed for row in job.judged() or []]
    print(write_results(plan, listed, rows, out, tune=tune))
    for name in failed:
        print(f"failed: {name}; its last lines are in {out / 'runs' / name}.log", file=stream or sys.stderr)
    if stopped:
        print("stopped: the same command goes on; the tables are of what is done", file=stream or sys.stderr)
        return 130
    return 1 if failed else 0


def folders_of(plan: Plan, out: Path, *, tune: bool) -> dict[int, tuple[Path, int | None]]:
    """By seed: where its dataset lies, and which third of train is held out in it."""
    if not tune:
        return dict.fromkeys(plan.seeds, (out, None))
    return {seed: (out / f"third-{seed % THIRDS}", seed % THIRDS) for seed in plan.seeds}


def jobs_of(plan: Plan, out: Path, *, tune: bool = False) -> list[Job]:
    """In an order that finishes seeds one after the other: the first rows of a table come early."""
    listed = []
    for seed, (folder, _) in folders_of(plan, out, tune=tune).items():
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "scores").mkdir(exist_ok=True)
        for arm in plan.arms:
            whole = tuple((seed, f) for f in plan.fractions)
            parts = [(d,) for d in whole] if arm.kind == "hybrid" else [whole]
            for draws in parts:
                own = f"-{draws[0][1]:g}" if arm.kind == "hybrid" else ""
                dataset = str((folder / "dataset").absolute())
                labels: Sequence[str] = ()
                if arm.kind == "hybrid":
                    labels = compare_data.labels_for_training(plan, folder, draws[0][1], seed)
                config = plan.config(arm, seed, dataset, labels)
                listed.append(Job(f"{arm.name}-{seed}{own}", arm, config, draws, folder.absolute()))
    return listed


def _spec(job: Job) -> dict[str, Any]:
    labels = (path.stem for path in (job.folder / "tables").glob("*.csv") if path.stem != "images")
    return {
        "folder": str(job.folder),
        "arm": job.arm.name,
        "kind": job.arm.kind,
        "config": str(job.config_file),
        "encoder": str(job.run_dir / "encoder.safetensors"),
        "tasks": sorted(labels),
        "draws": job.draws,
        "inputs": job.inputs(),
        "scores": str(job.scores),
    }


def write_results(
    plan: Plan, listed: Sequence[Job], rows: Sequence[Mapping[str, Any]], out: Path, *, tune: bool = False
) -> str:
    """OUT/results.json and .md; the text of the latter."""
    summary = summarise(rows)
    arms = [arm.name for arm in plan.arms if any(row["arm"] == arm.name for row in rows)]
    trained = {job.arm.name: budget(job.config) for job in listed if job.arm.trains}
    tree = {
        "judged_on": "held out of train" if tune else "test",
        "date": date.today().isoformat(),
        "machine": machine(),
        "plan": plan.model_dump(mode="json"),
        "budgets": trained,
        "data": {
            folder.name: compare_data.facts(folder) for folder in sorted({job.folder for job in listed})
        },
        "rows": list(rows),
        "summary": summary,
    }
    files.replace_file(out / "results.json", (json.dumps(tree, indent=1) + "\n").encode())
    lines = []
    for fraction in plan.fractions:
        on = "a third of the patients of train, another each seed" if tune else "test"
        lines += [f"AUC on {on}, {fraction:.0%} of the labels; mean (range) of {len(plan.seeds)} seeds", ""]
        lines += [markdown(summary, arms, fraction, len(plan.seeds)), ""]
        if len(arms) > 1 and RANDOM in arms:
            others, gains = [arm for arm in arms if arm != RANDOM], summarise(less(rows, RANDOM))
            lines += ["Less the network as initialised, on the same images of each seed:", ""]
            lines += [markdown(gains, others, fraction, len(plan.seeds), sign="+"), ""]
    lines += [f"{name}: {text}" for name, text in trained.items()]
    text = "\n".join(lines)
    files.replace_file(out / "results.md", (text + "\n").encode())
    return text


def budget(config: TrainConfig) -> str:
    """What a pretraining may use, in words: the pixels of its crops stand for its time."""
    images = config.max_steps * config.data.batch_size
    crops = " + ".join(f"{c.count}x{c.size_text}" for c in config.views.crops)
    pixels = images * config.views.crop_values
    return (
        f"{config.model.backbone}, {config.max_steps:,} steps of {config.data.batch_size} images, "
        f"crops {crops} px, {pixels / 1e9:.2f} billion pixels of crops"
    )
