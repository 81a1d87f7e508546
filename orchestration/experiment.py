"""`medswav evaluate experiment`: tasks x arms x label fractions x seeds, fine-tuned and shown on one page.

OUT/dataset (unless one is given), OUT/pretraining/seed-<n> (unless encoders are given),
OUT/runs/<task>/<arm>[-<encoder>] (a run of `medswav finetune` each), OUT/<task> (figures and data),
OUT/page.html, results.json and results.md. Every job is a process of one thread, `jobs` of them at a time;
what is finished is kept, and the same command goes on.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, TextIO

import yaml

from orchestration import compare_data
from orchestration.bench import machine
from orchestration.cluster import StopFlag
from orchestration.compare import budget
from orchestration.experiment_plan import Arm, Experiment
from orchestration.finetune_job import Request, configured, encoder_file
from orchestration.processes import run_jobs
from shards import catalog
from shards.errors import UserError
from trainer import files, journal
from trainer.config import TrainConfig


@dataclass(frozen=True)
class Pretraining:
    """One encoder to make."""

    config: TrainConfig
    run_dir: Path

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def log(self) -> Path:
        return self.run_dir.with_suffix(".log")

    @property
    def steps(self) -> int:
        return self.config.max_steps

    @property
    def encoder(self) -> Path:
        return self.run_dir / "encoder.safetensors"

    def trained(self) -> int:
        if self.encoder.is_file():
            return self.steps
        rows = journal.read(self.run_dir / "metrics.jsonl")
        return int(next((row["step"] for row in reversed(rows)), -1)) + 1

    def commands(self) -> Iterator[list[str]]:
        settings = self.run_dir.with_suffix(".yaml")
        tree = self.config.model_dump(mode="json", exclude_unset=True)
        files.replace_file(settings, yaml.safe_dump(tree).encode())
        own = ["--preset", str(settings), "--run-dir", str(self.run_dir), "--workers", "0"]
        yield [sys.executable, "-m", "trainer", *own]


@dataclass(frozen=True)
class Tuning:
    """One run of finetune: a task, an arm, and the seeds that share an encoder."""

    task: str
    arm: str
    request: Request
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.request.output.name}"

    @property
    def log(self) -> Path:
        return self.request.output.with_suffix(".log")

    @property
    def steps(self) -> int:
        return self.epochs * len(self._folders())

    def _folders(self) -> list[Path]:
        return [
            self.request.output / f"fraction-{f:g}" / f"seed-{s}"
            for f in self.request.fractions
            for s in self.request.seeds
        ]

    def trained(self) -> int:
        """Epochs, of a training that ended early all."""
        return sum(
            self.epochs if (folder / "test.json").is_file() else _lines(folder / "metrics.jsonl")
            for folder in self._folders()
        )

    def done(self) -> bool:
        """Raises UserError for a run of other settings."""
        if self._spec_file.is_file() and json.loads(self._spec_file.read_text()) != self._spec():
            raise UserError(
                f"{self.request.output} was made by other settings: give another --output, or remove it"
            )
        return (self.request.output / "result.json").is_file() and self.trained() == self.steps

    @property
    def _spec_file(self) -> Path:
        return self.request.output.with_suffix(".spec.json")

    def _spec(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            json.dumps({**asdict(self.request), "output": str(self.request.output)})
        )
        return found

    def commands(self) -> Iterator[list[str]]:
        files.replace_file(self._spec_file, json.dumps(self._spec(), indent=1).encode())
        yield [sys.executable, "-m", "orchestration.experiment_cell", str(self._spec_file)]


def experiment(
    plan: Experiment,
    out: Path,
    *,
    data: Path | None = None,
    dataset: str | None = None,
    encoders: Sequence[Path] = (),
    jobs: int = 2,
    stream: TextIO | None = None,
) -> int:
    """Make or continue the experiment; prints the tables; the exit code. Raises UserError."""
    if (data is None) == (dataset is None):
        raise UserError("give the images with --data, or a dataset that has the label tables with --dataset")
    for arm in plan.arms:  # a wrong setting is told now, not after the ingest
        plan.settings(arm, plan.pretraining(0, ""))
    given = _checked(encoders)
    out.mkdir(parents=True, exist_ok=True)
    out = out.absolute()
    if data is not None:
        if not data.is_dir():
            raise UserError(f"the folder of the data {data} does not exist: check --data")
        if not compare_data.build_dataset(plan, data, out, stream):
            return 130
        dataset = str(out / "dataset")
    assert dataset is not None
    _check_labels(dataset, plan)
    with StopFlag() as stop:
        failed: list[str] = []
        if not given and any(arm.kind == "pretrained" for arm in plan.arms):
            made = pretrainings(plan, dataset, out)
            left = [one for one in made if not one.encoder.is_file()]
            failed = run_jobs(left, jobs, stop, stream, what="pretrain", ended="done")
            given = [one.encoder for one in made]
        refused: dict[str, str] = {}
        listed: list[Tuning] = []
        if not failed and not stop:
            listed, refused = tunings(plan, dataset, given, out)
            left_over = [one for one in listed if not one.done()]
            failed = run_jobs(
                left_over, jobs, stop, stream, what="finetune", unit="epochs", ended="runs done"
            )
        stopped = bool(stop)
    ready = [one for one in listed if (one.request.output / "result.json").is_file()]
    if ready and not stopped:
        print(report(plan, ready, refused, dataset, given, out))
    shown = stream or sys.stderr
    for name in failed:
        print(f"failed: {name}; its last lines are in its .log under {out}", file=shown)
    if stopped:
        print("stopped: the same command goes on", file=shown)
        return 130
    return 1 if failed else 0


def pretrainings(plan: Experiment, dataset: str, out: Path) -> list[Pretraining]:
    (out / "pretraining").mkdir(exist_ok=True)
    return [
        Pretraining(plan.pretraining(seed, dataset), out / "pretraining" / f"seed-{seed}")
        for seed in plan.pretraining_seeds
    ]


def tunings(
    plan: Experiment, dataset: str, encoders: Sequence[Path], out: Path
) -> tuple[list[Tuning], dict[str, str]]:
    """The runs, task by task, and the arms that are left out with the reason. Raises UserError."""
    found: list[Tuning] = []
    refused: dict[str, str] = {}
    network = plan.pretraining(0, dataset)
    for task in plan.tasks:
        (out / "runs" / task.name).mkdir(parents=True, exist_ok=True)
        for arm in plan.arms:
            settings = plan.settings(arm, network)
            try:
                parts = _parts(plan, arm, encoders, out)
            except UserError as error:
                if arm.kind != "library":
                    raise
                refused[arm.name] = str(error).replace(str(Path.home()), "~")  # it goes into a page
                continue
            for suffix, encoder, seeds in parts:
                request = Request(
                    task="classify",
                    dataset=dataset,
                    labels=(task.name,),
                    encoder=encoder,
                    output=out / "runs" / task.name / f"{arm.name}{suffix}",
                    overrides=settings,
                    fractions=plan.fractions,
                    seeds=seeds,
                    device="cpu",
                )
                epochs = configured("classify", "small", settings)[1].finetune.epochs
                found.append(Tuning(task.name, arm.name, request, epochs))
    return found, refused


def _parts(
    plan: Experiment, arm: Arm, encoders: Sequence[Path], out: Path
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Of an arm: the end of the run's name, the encoder, and the seeds that take it."""
    if arm.kind == "library":
        return [("", str(encoder_file(arm.weights, out / "library" / arm.name)), plan.seeds)]
    if arm.kind != "pretrained":
        return [("", "none", plan.seeds)]
    shares = {k: tuple(s for s in plan.seeds if s % len(encoders) == k) for k in range(len(encoders))}
    return [(f"-{k}", str(encoders[k].absolute()), seeds) for k, seeds in shares.items() if seeds]


def report(
    plan: Experiment,
    listed: Sequence[Tuning],
    refused: Mapping[str, str],
    dataset: str,
    encoders: Sequence[Path],
    out: Path,
) -> str:
    """The page, OUT/results.json and results.md; the text of the latter."""
    from orchestration.experiment_page import write_page

    facts = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "pretraining": _pretrained(plan, dataset, encoders, out),
        "encoders": [f"{path.parent.name}/{path.name}" for path in encoders],
        "finetune": list(plan.finetune),
        "left_out": dict(refused),
        "plan": plan.model_dump(mode="json"),
    }
    runs: dict[str, list[str]] = {}
    for one in listed:
        runs.setdefault(one.task, []).append(f"{one.arm}={one.request.output}")
    return write_page(runs, facts, out)


def _pretrained(plan: Experiment, dataset: str, encoders: Sequence[Path], out: Path) -> str:
    """What the encoders had, in words: of given ones it is not the plan that tells."""
    from trainer.export import read_encoder

    if all(path.absolute().is_relative_to(out / "pretraining") for path in encoders):
        return budget(plan.pretraining(0, dataset))
    steps = sorted({read_encoder(path)[1].step for path in encoders})
    return f"given encoders, {', '.join(f'{n:,}' for n in steps)} steps"


def _checked(encoders: Sequence[Path]) -> list[Path]:
    """Files of encoders that have not seen val and test. Raises UserError."""
    from trainer.export import read_encoder

    found = []
    for given in encoders:
        path = encoder_file(str(given), given)
        if path is None or str(given).startswith("torchvision:"):
            raise UserError(
                f"--encoder {given}: give files; random weights and libraries are arms of the plan"
            )
        _, info = read_encoder(path)
        if info.split != "train":
            raise UserError(
                f"{given} was trained on split {info.split}: test images would not be new to it; give an "
                "encoder of data.split=train"
            )
        found.append(path)
    return found


def _check_labels(dataset: str, plan: Experiment) -> None:
    there = catalog.label_names(dataset)
    missing = next((task.name for task in plan.tasks if task.name not in there), None)
    if missing is not None:
        raise UserError(
            f"the dataset has no labels {missing!r} (there are: {', '.join(there) or 'none'}): join them "
            "with medswav ingest label, or give the images with --data"
        )


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
