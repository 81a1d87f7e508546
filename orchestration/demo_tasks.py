"""`medswav demo --task NAME`: a clinical task from generated files to its table, in one command.

    FOLDER/source > FOLDER/dataset > FOLDER/run (pretraining) > FOLDER/NAME (fine-tuning) > FOLDER/NAME.md

A task is a module with demo(options) -> exit code, made of the steps below. A step is done when what it makes
says so, and can be killed anywhere: the same command goes on from there.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from orchestration.demo_steps import StepLog
from orchestration.progress import Progress
from shards.errors import UserError
from shards.ids import Pseudonymizer, load_key
from shards.store import clear_errors
from trainer import files
from trainer.config import TrainConfig

TASKS = {  # name: module
    "findings": "orchestration.demo_findings",
    "haemorrhage": "orchestration.demo_haemorrhage",
    "metastases": "orchestration.demo_metastases",
}
STEPS = ("Generate patients", "Ingest", "Join labels", "Pretrain", "Fine-tune", "Table")

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskOptions:
    """What the user asked for. None: what the task takes by default. seeds: of the fine-tuning; overrides:
    `a.b=value`, of the pretraining; ranks: of the pretraining, and trainings at a time."""

    task: str
    folder: Path
    patients: int | None = None
    seeds: int | None = None
    overrides: tuple[str, ...] = ()
    ranks: int = 2
    feeders: int = 1
    address: str | None = None
    seed: int = 0
    stream: TextIO | None = None

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def encoder(self) -> Path:
        return self.run / "encoder.safetensors"

    @property
    def tuned(self) -> Path:
        return self.folder / self.task

    def say(self, text: str) -> None:
        print(text, file=self.stream or sys.stderr, flush=True)


def demo(options: TaskOptions) -> int:
    """Run the demo of a task; the exit code. Raises UserError."""
    if options.task not in TASKS:
        raise UserError(f"there is no demo of the task {options.task!r}: choose from {', '.join(TASKS)}")
    module = importlib.import_module(TASKS[options.task])
    code: int = module.demo(options)
    return code


def begin(options: TaskOptions, wanted: Mapping[str, Any]) -> StepLog:
    """Make the folder, or refuse one of another demo, naming what differs. Raises UserError."""
    wanted = {"task": options.task, "seed": options.seed, **wanted}
    path = options.folder / "demo.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged: give a new folder") from None
        differs = [name for name in wanted if found.get(name) != wanted[name]]
        if differs:
            raise UserError(
                f"{options.folder} holds a demo with another {' and '.join(differs)}: give a new folder, or "
                "the settings of before"
            )
    else:
        with clear_errors(options.folder):
            options.folder.mkdir(parents=True, exist_ok=True)
            if any(options.folder.iterdir()):
                raise UserError(f"{options.folder} is not empty and holds no demo: give a new folder")
            files.replace_file(path, (json.dumps(wanted, indent=1) + "\n").encode())
    return StepLog(options.folder, options.say, STEPS)


def generate(options: TaskOptions, log: StepLog, build: Callable[[Path, Told], object], total: int) -> None:
    """build(folder, progress) into a temporary name, then renamed: the folder is there complete, or not."""
    if options.source.is_dir():
        log.already("Generate patients", _files(options.source))
        return
    with log.step("Generate patients") as detail:
        partial = options.folder / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with Progress("generate", total, "patients", stream=options.stream) as progress:
            build(partial, lambda done, _: progress.update(done))
        partial.rename(options.source)
        detail.text = _files(options.source)


def ingest(options: TaskOptions, log: StepLog, source: Path, settings: Mapping[str, Any]) -> bool:
    """Ingest a folder; False when it was stopped. The key follows from the seed: generated patients have
    nothing to hide, and the same demo deals the same patients to the same splits. Raises UserError."""
    from ingest.config import load_config
    from orchestration.ingest_job import run_ingest

    key = options.folder / "key"
    if not key.exists():
        partial = key.with_name("key.partial")
        with clear_errors(options.folder):
            partial.write_text(sha256(f"demo {options.seed}".encode()).hexdigest() + "\n")
            partial.chmod(0o600)
            partial.rename(key)
    config = load_config(
        {"sources": [str(source)], "output": str(options.dataset), "key_file": str(key), **settings}
    )
    with log.step("Ingest") as detail:
        summary = run_ingest(config, address=options.address, stream=options.stream)
        detail.stopped = summary.interrupted
        detail.already = summary.units > 0 and summary.already == summary.units
        detail.text = f"{summary.total:,} images of {summary.inputs:,} files"
    return not summary.interrupted


def join(options: TaskOptions, log: StepLog, tables: Sequence[Mapping[str, Any]]) -> None:
    """Join label tables (arguments of ingest.labels.join_labels but dataset and key). Raises UserError."""
    from ingest.labels import join_labels

    names = Pseudonymizer(load_key(str(options.folder / "key")))
    with log.step("Join labels") as detail:
        counts = [join_labels(options.dataset, names=names, **table).num_rows for table in tables]
        said = [f"{n:,} {t.get('of', 'images')}" for n, t in zip(counts, tables, strict=True)]
        detail.text = f"{' and '.join(said)} have labels"


def pretrain(options: TaskOptions, log: StepLog, config: TrainConfig) -> bool:
    """Pretrain options.run; False when it was stopped. Raises UserError, also for a run of other settings."""
    from orchestration.demo import finished
    from orchestration.pretrain_job import pretrain as run

    if finished(options.run, config):
        log.already("Pretrain", f"{config.max_steps:,} steps")
        return True
    with log.step("Pretrain") as detail:
        detail.text = f"{config.max_steps:,} steps on {options.ranks} ranks"
        result = run(
            config,
            options.run,
            options.ranks,
            options.feeders,
            address=options.address,
            stream=options.stream,
        )
        detail.stopped = not result.finished
    return result.finished


def _files(folder: Path) -> str:
    return f"{sum(1 for path in folder.rglob('*') if path.is_file()):,} files"
