"""`medswav demo`: from files to a pretrained, evaluated encoder and a report, on two cores.

FOLDER/source (generated) > FOLDER/dataset > FOLDER/run > FOLDER/results.json > FOLDER/report.html. A step is
done when what it makes says so, and can be killed anywhere: the same command goes on from there.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestration import demo_evaluate
from orchestration.bench import machine
from orchestration.demo_config import RANKS, Fitted, fit
from orchestration.demo_steps import StepLog
from orchestration.progress import Progress
from orchestration.report import render
from orchestration.report_data import ENCODER_NAMES, ENCODERS, PROBE_NAMES, compare, modality_name
from shards.errors import UserError
from shards.ids import Pseudonymizer, create_key, digest, load_key
from shards.store import clear_errors
from trainer import files
from trainer.config import TrainConfig, load_config

if TYPE_CHECKING:
    from orchestration.ingest_summary import IngestSummary

NO_LABELS = (
    "The probe was skipped because no labels were given: run again with --labels CSV "
    "(columns file and label) to have the encoder judged."
)
GENERATED_LABEL = "The label is the generated finding: present in half of the patients of each modality."
OWN_LABEL = "The labels are those of the CSV that was given."


@dataclass(frozen=True)
class Options:
    """What the user asked for. No sources: generated patients. overrides: `a.b=value` over the preset."""

    folder: Path
    sources: tuple[Path, ...]
    labels: Path | None
    overrides: tuple[str, ...]
    patients: int
    seed: int
    repeats: int
    ranks: int
    feeders: int
    address: str | None
    stream: TextIO | None

    @property
    def generated(self) -> bool:
        return not self.sources

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def runs(self) -> tuple[Path, ...]:
        """A run folder for each pretraining seed; the report shows the first, the scores are of all."""
        return tuple(self.folder / (f"run-{i}" if i else "run") for i in range(self.repeats))

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def inputs(self) -> tuple[Path, ...]:
        return self.sources or (self.folder / "source",)

    @property
    def labels_csv(self) -> Path | None:
        from ingest.synthetic import LABELS

        return self.inputs[0] / LABELS if self.generated else self.labels


def demo(
    output: str | Path,
    sources: Sequence[str | Path] = (),
    labels: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    ranks: int = RANKS,
    feeders: int = 1,
    address: str | None = None,
    patients: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    stream: TextIO | None = None,
) -> int:
    """Run what is not yet done of the six steps; progress to `stream` (stderr), the result to stdout.

    patients: of each modality, generated. repeats: pretrainings with different seeds, so that the scores have
    a spread of those too. Returns the exit code: 0, or 130 when it was stopped. Raises UserError.
    """
    from ingest.synthetic import PATIENTS

    options = Options(
        folder=Path(output).absolute(),
        sources=tuple(Path(source).absolute() for source in sources),
        labels=None if labels is None else Path(labels).absolute(),
        overrides=tuple(overrides),
        patients=PATIENTS if patients is None else patients,
        seed=seed,
        repeats=repeats,
        ranks=ranks,
        feeders=feeders,
        address=address,
        stream=stream,
    )
    _check(options)

    def say(text: str) -> None:
        print(text, file=stream or sys.stderr, flush=True)

    log = StepLog(options.folder, say)
    _generate(options, log)
    summary = _ingest(options, log)
    if summary.interrupted:
        return 130
    joined = _join(options, log)
    fitted = fit(str(options.dataset), summary.samples, overrides, seed, ranks)
    for note in fitted.notes:
        say(f"      {note}")
    if not _pretrain(options, fitted, log):
        return 130
    results = _probe(options, log)
    _report(options, [*_trouble(summary), *fitted.notes], joined, results, log)
    print(_table(results))
    print(f"Report: {options.report}")
    return 0


def _check(options: Options) -> None:
    """Refuse what cannot work before anything is written, and a folder that holds another demo."""
    if options.generated and options.labels is not None:
        raise UserError("--labels goes with --source: the generated patients have labels of their own")
    if not all(source.is_dir() for source in options.sources):
        raise UserError("a folder given with --source does not exist: check the path")
    if options.labels is not None and not options.labels.is_file():
        raise UserError("the file given with --labels does not exist: check the path")
    load_config("demo", options.overrides)  # a wrong setting is told now, not after the ingest
    wanted = {
        "source": digest("source", *map(str, options.sources)) if options.sources else "generated",
        "patients": options.patients if options.generated else None,
        "seed": options.seed,
    }
    path = options.folder / "demo.json"
    if not path.is_file():
        with clear_errors(options.folder):
            options.folder.mkdir(parents=True, exist_ok=True)
            if any(options.folder.iterdir()):
                raise UserError(f"{options.folder} is not empty and holds no demo: give a new folder")
            files.replace_file(path, (json.dumps(wanted, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: give a new folder") from None
    words = {"source": "source", "patients": "number of patients", "seed": "seed"}
    differs = [words[name] for name in wanted if found.get(name) != wanted[name]]
    if differs:
        raise UserError(
            f"{options.folder} holds a demo with another {' and '.join(differs)}: give a new folder, or the "
            "settings of before"
        )


def _generate(options: Options, log: StepLog) -> None:
    """Build into a temporary name and rename: the folder is there complete, or not at all."""
    from ingest.synthetic import build

    if not options.generated:
        log.skipped("Generate patients", "your own files are used")
        return
    folder = options.inputs[0]
    if folder.is_dir():
        log.already("Generate patients", _files(folder))
        return
    with log.step("Generate patients") as detail:
        partial = options.folder / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with Progress("generate", 4 * options.patients, "patients", stream=options.stream) as progress:
            build(
                partial,
                options.patients,
                options.seed,
                workers=2,
                progress=lambda done, total: progress.update(done),
            )
        partial.rename(folder)
        detail.text = _files(folder)


def _files(folder: Path) -> str:
    return f"{sum(1 for path in folder.rglob('*') if path.is_file()):,} files"


def _ingest(options: Options, log: StepLog) -> "IngestSummary":
    from ingest.config import load_config as load_ingest_config
    from orchestration.ingest_job import run_ingest

    key = options.folder / "key"
    if not key.exists():
        _create_key(key, options)
    sources = [str(path) for path in options.inputs]
    config = load_ingest_config({"sources": sources, "output": str(options.dataset), "key_file": str(key)})
    with log.step("Ingest") as detail:
        summary = run_ingest(config, address=options.address, stream=options.stream)
        refused = sum(summary.quarantined.values())
        detail.stopped = summary.interrupted
        detail.already = summary.units > 0 and summary.already == summary.units
        detail.text = f"{summary.total:,} images of {summary.inputs:,} files, {refused:,} refused"
    return summary


def _create_key(path: Path, options: Options) -> None:
    """A secret key for the user's files. Generated patients have nothing to hide: theirs comes from the seed,
    so that the same demo deals the same patients to the same splits and prints the same figures."""
    if not options.generated:
        create_key(path)
        return
    text = sha256(f"demo {options.seed}".encode()).hexdigest()
    partial = path.with_name("key.partial")
    with clear_errors(options.folder):
        partial.write_text(f"{text}\n")
        partial.chmod(0o600)
        partial.rename(path)


def _join(options: Options, log: StepLog) -> str:
    """Join the labels; what they were joined to, in words. Cheap, so it is done every time."""
    from ingest.labels import join_labels

    csv = options.labels_csv
    if csv is None:
        log.skipped("Join labels", "no labels were given")
        return ""
    with log.step("Join labels") as detail:
        names = Pseudonymizer(load_key(str(options.folder / "key")))
        table = join_labels(options.dataset, csv, names, demo_evaluate.LABELS, sources=options.inputs)
        unmatched = int((table.schema.metadata or {}).get(b"unmatched", b"0"))
        detail.text = f"{table.num_rows:,} images have a label; table rows without an image: {unmatched:,}"
    return f"{detail.text[0].upper()}{detail.text[1:]}."


def _pretrain(options: Options, fitted: Fitted, log: StepLog) -> bool:
    """True when every run is finished."""
    from orchestration.pretrain_job import pretrain

    config = fitted.config
    seeds = {run: config.model_copy(update={"seed": config.seed + i}) for i, run in enumerate(options.runs)}
    times = f", {len(seeds)} times with different seeds" if len(seeds) > 1 else ""
    to_do = {run: own for run, own in seeds.items() if not finished(run, own)}
    if not to_do:
        log.already("Pretrain", f"{config.max_steps:,} steps{times}")
        return True
    with log.step("Pretrain") as detail:
        detail.text = f"{config.max_steps:,} steps on {options.ranks} ranks{times}"
        for run, own in to_do.items():
            if len(seeds) > 1:
                log.say(f"      seed {own.seed}")
            result = pretrain(
                own,
                run,
                options.ranks,
                options.feeders,
                address=options.address,
                stream=options.stream,
            )
            detail.stopped = not result.finished
            if detail.stopped:
                break
    return not detail.stopped


def finished(run: Path, config: TrainConfig) -> bool:
    """Raises UserError where the folder holds a run with other settings."""
    from trainer import checkpoint
    from trainer.prepare import dataset_fingerprint

    found = checkpoint.newest(run)
    if found is None:
        return False
    checkpoint.check_same_run(found.state, config, dataset_fingerprint(config.data.dataset))
    return found.step >= config.max_steps and (run / "encoder.safetensors").is_file()


def _probe(options: Options, log: StepLog) -> dict[str, Any]:
    found = demo_evaluate.read(options.folder, demo_evaluate.fingerprint(options.dataset, options.runs))
    if found is not None:
        log.already("Probe", _probed(found))
        return found
    with log.step("Probe") as detail, Progress("probe", 0, "modalities", stream=options.stream) as progress:

        def update(done: int, total: int, modality: str) -> None:
            progress.total = total
            progress.update(done, modality)

        backbone = load_config("demo", options.overrides).model.backbone
        results = demo_evaluate.evaluate(options.dataset, options.runs, NO_LABELS, update, backbone)
        demo_evaluate.write(options.folder, results)
        detail.text = _probed(results)
    return results


def _probed(results: Mapping[str, Any]) -> str:
    if results["probe_skipped"]:
        return "no scores, the report says why"
    return f"{len(results['scores']):,} scores"


def _trouble(summary: "IngestSummary") -> list[str]:
    """What of the ingest a reader has to know first."""
    notes = []
    if summary.failed:
        notes.append(
            f"{sum(summary.failed.values())} units of the ingest failed and are not in this report: run the "
            "same command again."
        )
    if summary.over_budget:
        notes.append("Many files crashed the decoder or did not decode: see the reasons of the refusals.")
    return notes


def _report(
    options: Options, notes: Sequence[str], joined: str, results: Mapping[str, Any], log: StepLog
) -> None:
    """Always written anew: it is cheap, and a pure function of the files."""
    from orchestration.report_gather import gather

    facts = {name: str(value) for name, value in machine().items()}
    hardware = {"cpus": "Processors", "processor": "Processor", "memory_gib": "Memory, GiB"}
    label_note = GENERATED_LABEL if options.generated else OWN_LABEL if options.labels else ""
    with log.step("Report") as detail:
        about = {
            "generated": options.generated,
            "date": date.today().isoformat(),
            "notes": notes,
            "steps": [row for row in log.rows() if row["name"] != "Report"],
            "commands": commands(options),
            "label_note": " ".join(text for text in (label_note, joined) if text),
            "machine": {title: facts.pop(name) for name, title in hardware.items()},
            "versions": facts,
        }
        page = render(gather(options.dataset, options.runs[0], results, about))
        files.replace_file(options.report, page.encode())
        detail.text = f"{len(page) / 1e6:.1f} MB"


def commands(options: Options) -> tuple[str, ...]:
    """The whole thing as one command, and step by step; the user's own paths are left out."""
    source = "FOLDER/source" if options.generated else "SOURCE"
    whole = "medswav demo --output FOLDER" + ("" if options.generated else " --source SOURCE")
    whole += " --labels LABELS.csv" if options.labels else ""
    labels = "FOLDER/source/labels.csv" if options.generated else "LABELS.csv"
    return (
        whole + "".join(f" --set {item}" for item in options.overrides),
        "",
        "# the same, step by step (settings: below)",
        f"ingest run {source} FOLDER/dataset --key FOLDER/key",
        *([f"ingest label FOLDER/dataset {labels} --key FOLDER/key"] if options.labels_csv else []),
        "medswav pretrain --preset demo --dataset FOLDER/dataset --run-dir FOLDER/run",
        *(
            ["medswav probe --dataset FOLDER/dataset --encoder FOLDER/run/encoder.safetensors"]
            if options.labels_csv
            else []
        ),
    )


def _table(results: Mapping[str, Any]) -> str:
    """The scores for a terminal."""
    from orchestration.report_gather import scores

    rows = compare(scores(results))
    if not rows:
        return str(results.get("probe_skipped") or "no scores")
    lines = [
        f"{'AUC, mean (min to max)':24}" + "".join(f"{ENCODER_NAMES[e]:>26}" for e in ENCODERS) + "    margin"
    ]
    for row in rows:
        name = f"{modality_name(row.modality)}, {PROBE_NAMES.get(row.probe, row.probe)}"
        cells = "".join(f"{_cell(row.spreads.get(e)):>26}" for e in ENCODERS)
        margin = row.margin()
        lines.append(f"{name:24}{cells}" + ("" if margin is None else f"{margin:+10.3f}"))
    return "\n".join(lines)


def _cell(spread: Any) -> str:
    return "-" if spread is None else f"{spread.mean:.3f} ({spread.low:.3f} to {spread.high:.3f})"
