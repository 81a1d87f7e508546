"""`medswav finetune TASK`: what it does and prints.

    RUN/run.json                          what the numbers depend on; another one is refused
    RUN/source.json                       where the dataset, the labels and the encoder lay
    RUN/encoder-DIGEST.safetensors        only with --encoder torchvision:WEIGHTS: these weights
    RUN/fraction-F/seed-S/                a training each (trainer.downstream.finetune)
    RUN/fraction-F/seed-S/test.json       its test metrics on every draw of the patients
    RUN/result.json, RUN/result.md        all trainings of the folder, and their table

A task is a module of trainer.downstream with `Config` (its field `finetune`: FinetuneConfig), PRESETS (at
least small and full), and `prepare(config, dataset, labels, encoder) -> Task`; a line in TASKS adds it. It
may have `example(config, encoder) -> Task`, for --explain without a dataset; `digests(config) -> {name:
digest}` of files that the settings name; `case_probability(predictions)
-> f64 [n]` and `is_case(target)`, for `medswav evaluate robustness`.
"""

import importlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from pydantic import ValidationError

from orchestration.finetune_table import markdown, summarise
from orchestration.progress import Progress
from shards.errors import UserError
from shards.settings import apply_override

if TYPE_CHECKING:
    from trainer.downstream.finetune import FinetuneConfig
    from trainer.downstream.task import Task

TASKS = {  # name on the command line: module
    "classify": "trainer.downstream.classify",
    "findings": "trainer.downstream.findings",
    "haemorrhage": "trainer.downstream.haemorrhage",
    "metastases-mask": "trainer.downstream.metastases_mask",
    "metastases": "trainer.downstream.metastases",
}
FORMAT_VERSION = 1
DRAWS = 1000  # of the patients, for intervals
_DIGITS = 5


class TaskModule(Protocol):
    """What a module of TASKS has."""

    Config: Any
    PRESETS: Mapping[str, Any]

    def prepare(self, config: Any, dataset: str, labels: Sequence[str], encoder: Path | None) -> "Task": ...


@dataclass(frozen=True)
class Request:
    """One command. encoder: a file, a run folder, none, random, or torchvision:WEIGHTS."""

    task: str
    dataset: str
    labels: tuple[str, ...]
    encoder: str
    output: Path
    preset: str = "small"
    overrides: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"


def finetune(request: Request, stream: TextIO | None = None) -> dict[str, Any]:
    """Train what is missing; the tree of RUN/result.json. Raises UserError."""
    from shards.ids import digest
    from shards.store import file_sha256
    from trainer import files
    from trainer.batches import dataset_fingerprint
    from trainer.downstream.tables import table_digest
    from trainer.downstream.task import check_task

    module, config = configured(request.task, request.preset, request.overrides)
    _check_sweep(request)
    encoder = encoder_file(request.encoder, request.output)
    about = {
        "format": FORMAT_VERSION,
        "task": request.task,
        "encoder": "none" if encoder is None else digest(file_sha256(encoder)),
        "dataset": dataset_fingerprint(request.dataset),
        "labels": [table_digest(request.dataset, labels) for labels in request.labels],
        "settings": _settings(config),
        "inputs": module.digests(config) if hasattr(module, "digests") else {},
    }
    _check_folder(request.output, about)
    cells = [(seed, fraction) for seed in request.seeds for fraction in request.fractions]
    todo = [cell for cell in cells if not _done(_place(request.output, *cell))]
    epochs = config.finetune.epochs
    with Progress(f"finetune {request.task}", epochs * len(todo), "epochs", stream=stream) as progress:
        counted = _Counted(progress, epochs)
        for seed in dict.fromkeys(seed for seed, _ in todo):
            one = _with(config, seed=seed)
            task = module.prepare(one, request.dataset, request.labels, encoder)
            check_task(task)
            request.output.mkdir(parents=True, exist_ok=True)
            files.replace_file(request.output / "run.json", json.dumps(about, indent=1).encode())
            files.replace_file(request.output / "source.json", json.dumps(_source(request, encoder)).encode())
            for fraction in (f for s, f in todo if s == seed):
                counted.begin(seed, fraction)
                _train(task, _with(one, fraction=fraction).finetune, request, counted)
                counted.end()
    return write_result(request.output)


def _train(task: "Task", config: "FinetuneConfig", request: Request, counted: "_Counted") -> None:
    """One training, and its metrics on draws of the test patients."""
    from shards.ids import digest
    from trainer import files
    from trainer.downstream import finetune as loop
    from trainer.evaluate.bootstrap import patient_draws

    place = _place(request.output, config.seed, config.fraction)
    device = chosen_device(request.device)
    loop.finetune(task, config, place, device=device, progress=counted.epoch)
    network = task.network().to(device)
    loop.load_best(network, place)
    predictions, targets = loop.predict(task, network, task.test, config.batch_size, device)
    draws: dict[str, list[float | None]] = {}
    for drawn in patient_draws(task.test.patients, draws=DRAWS):
        found = task.metrics([predictions[i] for i in drawn], [targets[i] for i in drawn])
        for name, value in found.items():
            draws.setdefault(name, []).append(round(value, _DIGITS) if math.isfinite(value) else None)
    patients = sorted(set(task.test.patients.tolist()))
    tree = {"selection": task.selection, "patients": len(patients), "draws": draws}
    tree["test"] = digest(*task.test.patients.tolist())  # equal: draws can be paired
    files.replace_file(place / "test.json", json.dumps(tree).encode())


def write_result(output: Path) -> dict[str, Any]:
    """RUN/result.json and result.md of all trainings in the folder that are done."""
    from trainer import files

    about = json.loads((output / "run.json").read_text())
    rows, draws = [], []
    for place in sorted(output.glob("fraction-*/seed-*")):
        if not _done(place):
            continue
        said = json.loads((place / "result.json").read_text())
        test = json.loads((place / "test.json").read_text())
        cell = {"fraction": said["config"]["fraction"], "seed": said["config"]["seed"]}
        rows.append({**cell, **said["result"], "test_patients": test["patients"]})
        draws.append(test["draws"])
        about["selection"] = test["selection"]
        about["test"] = test.get("test")
    order = sorted(range(len(rows)), key=lambda i: (-rows[i]["fraction"], rows[i]["seed"]))
    rows, draws = [rows[i] for i in order], [draws[i] for i in order]
    tree = {**about, "rows": rows, "summary": summarise(rows, draws)}
    files.replace_file(output / "result.json", (json.dumps(tree, indent=1) + "\n").encode())
    files.replace_file(output / "result.md", (markdown(tree) + "\n").encode())
    return tree


def explain(request: Request) -> dict[str, Any]:
    """What the network and a step of the settings take; a step is taken. Raises UserError."""
    from trainer.downstream.explain import step_cost

    module, config = configured(request.task, request.preset, request.overrides)
    with tempfile.TemporaryDirectory() as folder:
        encoder = encoder_file(request.encoder, Path(folder))
        if request.dataset:
            task = module.prepare(config, request.dataset, request.labels, encoder)
        elif hasattr(module, "example"):
            task = module.example(config, encoder)
        else:
            raise UserError(f"{request.task} is explained on samples of a dataset: give --data and --labels")
        cost = step_cost(task, config.finetune.batch_size, chosen_device(request.device))
    return {"task": request.task, "preset": request.preset, **asdict(cost)}


def explained(found: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, found["input_shape"]))
    return "\n".join(
        [
            f"{found['task']}, preset {found['preset']}: batches of {found['batch_size']} samples of {shape}",
            f"parameters        {found['parameters']:,} ({found['trained']:,} trained)",
            f"FLOPs of a step   {found['flops'] / 1e9:,.1f} G (forward and backward; multiply, add apart)",
            f"activations       {found['activation_bytes'] / 2**30:.2f} GiB",
            f"memory at least   {found['memory_bytes'] / 2**30:.2f} GiB (with weights, gradients, AdamW)",
            f"one step of 2 samples was taken: loss {found['loss']:.4f}",
        ]
    )


def configured(task: str, preset: str, overrides: Sequence[str]) -> tuple[TaskModule, Any]:
    """The module of a task and its config. Raises UserError."""
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
    module = cast(TaskModule, importlib.import_module(TASKS[task]))
    if preset not in module.PRESETS:
        raise UserError(f"{task} has no preset {preset!r}: choose from {', '.join(module.PRESETS)}")
    tree = module.PRESETS[preset].model_dump(mode="json")
    for item in overrides:
        apply_override(tree, item)
    try:
        return module, module.Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise UserError(f"setting {where}: {text}" if where else text) from None


def encoder_file(encoder: str, output: Path) -> Path | None:
    """The encoder file of a request; None for random weights. Raises UserError."""
    if encoder in ("none", "random"):
        return None
    if encoder.startswith("torchvision:"):
        from shards.ids import digest
        from trainer.downstream.library import save_library_encoder

        path = output / f"encoder-{digest(encoder.encode())[:12]}.safetensors"  # a file for each name
        if not path.is_file():
            output.mkdir(parents=True, exist_ok=True)
            save_library_encoder(encoder, path)
        return path
    path = Path(encoder)
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"there is no encoder {encoder}: give the encoder.safetensors of a finished run, none (random "
            "weights), or torchvision:WEIGHTS"
        )
    return path


def chosen_device(name: str) -> str:
    """cpu or cuda. Raises UserError."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name} is none of auto, cpu, cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("no GPU can be used here: leave --device away, or use --device cpu")
    return "cuda" if name != "cpu" and there else "cpu"


class _Counted:
    """Progress over trainings that may end early: such a one is counted whole."""

    def __init__(self, progress: Progress, epochs: int) -> None:
        self._progress, self._epochs, self._done, self._name = progress, epochs, 0, ""

    def begin(self, seed: int, fraction: float) -> None:
        self._name = f"{100 * fraction:g} % of the patients, seed {seed}"

    def epoch(self, line: Mapping[str, Any]) -> None:
        self._progress.update(self._done + line["epoch"], self._name)

    def end(self) -> None:
        self._done += self._epochs
        self._progress.update(self._done, self._name)


def _check_sweep(request: Request) -> None:
    wrong = [f for f in request.fractions if not 0 < f <= 1]
    if wrong:
        raise UserError(f"--fraction {wrong[0]:g} must be above 0, up to 1")
    swept = {"finetune.seed": "--seeds", "finetune.fraction": "--fraction"}
    for item in request.overrides:
        name = item.partition("=")[0].strip()
        if name in swept:
            raise UserError(f"--set {name} is an option of its own: use {swept[name]}")


def _source(request: Request, encoder: Path | None) -> dict[str, Any]:
    from trainer.downstream.tables import is_file

    labels = [str(Path(name).absolute()) if is_file(name) else name for name in request.labels]
    return {
        "dataset": request.dataset,
        "labels": labels,
        "encoder": None if encoder is None else str(encoder.absolute()),
    }


def _settings(config: Any) -> dict[str, Any]:
    """All that stays the same over the trainings of a folder."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    for name in ("seed", "fraction"):
        tree["finetune"].pop(name)
    return tree


def _with(config: Any, **changes: Any) -> Any:
    return config.model_copy(update={"finetune": config.finetune.model_copy(update=changes)})


def _check_folder(output: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder of other trainings, naming what differs. Raises UserError."""
    if not (output / "run.json").is_file():
        return
    was = dict(_flat(json.loads((output / "run.json").read_text())))
    now = dict(_flat(json.loads(json.dumps(about))))
    differ = next((name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)), None)
    if differ is None:
        return
    name = differ.removeprefix("settings.")
    hint = f"{name}={was.get(differ)}, not {now.get(differ)}" if name != differ else f"another {name}"
    raise UserError(f"{output.name} holds trainings with {hint}: give another --output, or remove it")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _place(output: Path, seed: int, fraction: float) -> Path:
    return output / f"fraction-{fraction:g}" / f"seed-{seed}"


def _done(place: Path) -> bool:
    return (place / "result.json").is_file() and (place / "test.json").is_file()
