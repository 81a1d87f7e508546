"""The loop of every downstream task: train, evaluate on val after each epoch, keep the best, stop early.

    FOLDER/metrics.jsonl      a line an epoch: epoch (from 1), loss, learning_rate, val; test where asked for
    FOLDER/best.safetensors   the parameters of the best epoch on val, and all buffers
    FOLDER/state.safetensors  what a killed training goes on from, at its last whole epoch; gone at the end
    FOLDER/result.json        val and test at the best epoch; its presence says that the training is done

Everything is a function of the task, the settings and the seed, and a training that was killed gives the
numbers (==, on CPU) of one that was not. Parameters without a gradient, a frozen encoder's say, are in no
file. Numbers are float32.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from shards.errors import UserError
from trainer import files
from trainer.config_data import Strict
from trainer.downstream.task import Dataset, Task, check_task
from trainer.evaluate.fractions import nested_subsets
from trainer.export import load_strictly
from trainer.optim import set_learning_rate

METRICS, BEST, STATE, RESULT = "metrics.jsonl", "best.safetensors", "state.safetensors", "result.json"
_ABOUT = "finetune"  # the name of what a state says of itself, in its header

Progress = Callable[[Mapping[str, Any]], None]  # a line of metrics.jsonl
Indices = NDArray[np.int64]
Tensors = dict[str, Tensor]
Metrics = dict[str, float | None]  # None: not defined on these samples (JSON has no nan)


class FinetuneConfig(Strict):
    """AdamW. patience: epochs without a better value on val after which it ends; 0: never. fraction: of the
    training patients, drawn with the seed; val and test stay whole. evaluate_test: after each epoch too, for
    curves; nothing is chosen by it."""

    seed: int = Field(default=0, ge=0)
    fraction: float = Field(default=1.0, gt=0, le=1)
    epochs: int = Field(default=50, gt=0)
    patience: int = Field(default=10, ge=0)
    batch_size: int = Field(default=32, gt=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"  # to 0 at the end of `epochs`
    weight_decay: float = Field(default=1e-2, ge=0)
    evaluate_test: bool = False


@dataclass(frozen=True)
class Result:
    """best_epoch: from 1 on; epochs: trained; val, test: metrics at the best epoch."""

    best_epoch: int
    epochs: int
    n_train: int
    n_patients: int
    val: Metrics
    test: Metrics


@dataclass
class _Run:
    """What changes from epoch to epoch."""

    network: nn.Module
    optimizer: Optimizer
    lines: list[dict[str, Any]]
    best_epoch: int = 0
    best: float = -math.inf


def finetune(
    task: Task,
    config: FinetuneConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Train, or go on, or give the result that is there. The best network is in FOLDER/best.safetensors: see
    load_best. Raises UserError for a task that cannot be trained on and for a folder of another training."""
    check_task(task)
    chosen = _subset(task, config)
    about = {"task": task.name, "identity": task.identity, "config": config.model_dump(), "n": len(chosen)}
    folder.mkdir(parents=True, exist_ok=True)
    if (found := _finished(folder, about)) is not None:
        return found
    with _seeded(config.seed, 0):
        network = task.network().to(device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    run = _Run(network, optimizer, [])
    _resume(run, folder, about)
    while len(run.lines) < config.epochs and not _stale(run, config):
        line = _epoch(run, task, config, chosen, device)
        run.lines.append(line)
        value = line["val"][task.selection]
        if value > run.best:
            run.best, run.best_epoch = value, line["epoch"]
            _write(folder / BEST, _trained_state(network), about)
        _write_lines(folder / METRICS, run.lines)
        _write(folder / STATE, _state(run), about | _progress(run))
        if progress is not None:
            progress(line)
    load_best(network, folder)
    result = Result(
        best_epoch=run.best_epoch,
        epochs=len(run.lines),
        n_train=len(chosen),
        n_patients=len(np.unique(task.train.patients[chosen])),
        val=run.lines[run.best_epoch - 1]["val"],
        test=evaluate(task, network, task.test, config.batch_size, device),
    )
    files.replace_file(folder / RESULT, json.dumps(about | {"result": asdict(result)}, indent=1).encode())
    (folder / STATE).unlink()
    return result


def sweep(
    task: Callable[[int], Task],
    config: FinetuneConfig,
    folder: Path,
    *,
    fractions: Sequence[float],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> dict[float, list[Result]]:
    """Label fractions times seeds, each in a folder of its own: fraction to the results of the seeds in
    their order. task(seed): the task of a seed. Killed, it goes on where it was."""
    found: dict[float, list[Result]] = {fraction: [] for fraction in fractions}
    for seed in seeds:
        of_seed = task(seed)
        for fraction in fractions:
            one = config.model_copy(update={"seed": seed, "fraction": fraction})
            place = folder / f"fraction-{fraction:g}" / f"seed-{seed}"
            found[fraction].append(finetune(of_seed, one, place, device=device))
    return found


def evaluate(
    task: Task, network: nn.Module, data: Dataset, batch_size: int, device: torch.device | str = "cpu"
) -> Metrics:
    """The task's metrics of a whole split; the network is in evaluation mode afterwards."""
    found = task.metrics(*predict(task, network, data, batch_size, device))
    return {name: float(value) if math.isfinite(value) else None for name, value in found.items()}


def predict(
    task: Task, network: nn.Module, data: Dataset, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[list[Any], list[Any]]:
    """Predictions and targets of a whole split, in its order."""
    predictions: list[Any] = []
    targets: list[Any] = []
    network.eval()
    with torch.inference_mode():
        for first in range(0, len(data), batch_size):
            batch = [data.sample(i, None) for i in range(first, min(first + batch_size, len(data)))]
            inputs = torch.from_numpy(np.stack([sample.input for sample in batch])).to(device)
            predictions += task.predict(network, inputs)
            targets += [sample.target for sample in batch]
    return predictions, targets


def load_best(network: nn.Module, folder: Path) -> None:
    """Load the best epoch into a network of the task, in place. Raises UserError where it does not fit."""
    tensors, _ = _read(folder / BEST)
    _load(network, tensors, folder)


def metric_curve(folder: Path, metric: str, split: str = "val") -> list[float]:
    """The metric after each epoch, from metrics.jsonl, nan where it was not defined: what
    figures.curves_figure takes. Raises UserError."""
    lines = [json.loads(text) for text in (folder / METRICS).read_text().splitlines()]
    if not all(metric in line.get(split, {}) for line in lines):
        raise UserError(f"{folder.name}/{METRICS} has no {metric} of {split} after each epoch")
    values = [line[split][metric] for line in lines]
    return [math.nan if value is None else value for value in values]


def _epoch(
    run: _Run, task: Task, config: FinetuneConfig, chosen: Indices, device: torch.device | str
) -> dict[str, Any]:
    """One pass over the chosen samples; the line of metrics.jsonl."""
    number = len(run.lines)
    order = np.random.default_rng((config.seed, number)).permutation(chosen)
    parts = np.array_split(order, math.ceil(len(order) / config.batch_size))  # equal to within one sample
    run.network.train()
    total = torch.zeros((), device=device)
    with _seeded(config.seed, number + 1):
        for i, part in enumerate(parts):
            rate = _rate(config, number + i / len(parts))
            set_learning_rate(run.optimizer, rate)
            batch = [task.train.sample(j, _stream(config, number, j)) for j in part.tolist()]
            inputs = torch.from_numpy(np.stack([sample.input for sample in batch])).to(device)
            loss = task.loss(run.network, inputs, [sample.target for sample in batch])
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()
            total += loss.detach() * len(part)
    mean = float(total) / len(order)
    if not math.isfinite(mean):
        raise UserError(
            f"{task.name}: the loss of epoch {number + 1} is {mean}: lower learning_rate="
            f"{config.learning_rate:g}"
        )
    line: dict[str, Any] = {"epoch": number + 1, "loss": mean, "learning_rate": rate}
    line["val"] = evaluate(task, run.network, task.val, config.batch_size, device)
    if line["val"].get(task.selection) is None:
        raise UserError(
            f"{task.name}: val gives no {task.selection}, which chooses the best epoch: some label must "
            "occur in it, and not in every sample"
        )
    if config.evaluate_test:
        line["test"] = evaluate(task, run.network, task.test, config.batch_size, device)
    return line


def _subset(task: Task, config: FinetuneConfig) -> Indices:
    """The training samples. Raises UserError where there are fewer than a batch norm needs."""
    owners = task.train.patients
    strata = task.strata or dict.fromkeys(map(str, np.unique(owners)), 0)
    one = nested_subsets(owners, strata, fractions=[config.fraction], seeds=[config.seed])[0]
    if len(one.samples) < 2:
        raise UserError(f"{task.name}: {len(one.samples)} training samples are too few: raise fraction")
    return one.samples


def _stale(run: _Run, config: FinetuneConfig) -> bool:
    return config.patience > 0 and len(run.lines) - run.best_epoch >= config.patience and bool(run.lines)


def _rate(config: FinetuneConfig, epochs: float) -> float:
    """After so many epochs."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * epochs / config.epochs))


def _stream(config: FinetuneConfig, epoch: int, sample: int) -> np.random.Generator:
    return np.random.default_rng((config.seed, epoch, sample))


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """torch's generators as a function of the key, and as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


def _trained_state(network: nn.Module) -> Tensors:
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    state = network.state_dict()
    return {name: value.detach().cpu().clone() for name, value in state.items() if name not in frozen}


def _state(run: _Run) -> Tensors:
    """Parameters and buffers, and the optimizer's numbers of each parameter."""
    found = {f"network.{name}": value for name, value in _trained_state(run.network).items()}
    for number, values in run.optimizer.state_dict()["state"].items():
        found |= {
            f"optimizer.{number}.{name}": value.detach().cpu().clone() for name, value in values.items()
        }
    return found


def _progress(run: _Run) -> dict[str, Any]:
    return {"lines": run.lines, "best": run.best, "best_epoch": run.best_epoch}


def _resume(run: _Run, folder: Path, about: Mapping[str, Any]) -> None:
    """Go on from the state, if there is one. Raises UserError for that of another training."""
    if not (folder / STATE).exists():
        return
    tensors, said = _read(folder / STATE)
    _same(folder, said, about)
    below = {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
    _load(run.network, below, folder)
    moments: dict[int, Tensors] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, leaf = name.split(".")
            moments.setdefault(int(number), {})[leaf] = value
    run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": moments})
    run.lines, run.best, run.best_epoch = said["lines"], said["best"], said["best_epoch"]


def _load(network: nn.Module, tensors: Tensors, folder: Path) -> None:
    frozen = {n: p.detach() for n, p in network.named_parameters() if not p.requires_grad}
    load_strictly(network, frozen | tensors, f"{folder.name} holds another network")


def _finished(folder: Path, about: Mapping[str, Any]) -> Result | None:
    if not (folder / RESULT).exists():
        return None
    said = json.loads((folder / RESULT).read_text())
    _same(folder, said, about)
    (folder / STATE).unlink(missing_ok=True)
    return Result(**said["result"])


def _same(folder: Path, said: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    differ = [name for name in about if said.get(name) != about[name]]
    if differ:
        was, now = said.get(differ[0]), about[differ[0]]
        if isinstance(was, dict) and isinstance(now, dict):
            name = next(n for n in now if was.get(n) != now[n])
            differ, was, now = [name], was.get(name), now[name]
        if len(str(was)) + len(str(now)) > 300:
            raise UserError(
                f"{folder.name} holds a training with another {differ[0]}: give another folder, or remove it"
            )
        raise UserError(
            f"{folder.name} holds a training with {differ[0]}={was}, not {now}: give another folder, or "
            "remove it"
        )


def _write(path: Path, tensors: Tensors, about: Mapping[str, Any]) -> None:
    with files.disk_full_is_clear(f"writing {path.name}"):
        files.replace_file(path, safetensors.torch.save(tensors, metadata={_ABOUT: json.dumps(about)}))


def _read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError):
        raise UserError(f"{path.name} is damaged or gone: remove its folder and train again") from None


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    files.replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
