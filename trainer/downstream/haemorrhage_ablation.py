"""What each auxiliary task and the pretraining bring: the ablation table of the paper (method.md section 7).

    volume             the volume label alone, from random weights
    types              and the five types
    slices             and the slices
    self-supervision   and pretrained weights

    FOLDER/ARM/seed-S/...                  a training each (trainer.downstream.finetune)
    FOLDER/baselines.json                  logistic regression on voxels and on a histogram of HU
    FOLDER/ablation.json, .md, .csv        mean and spread over the seeds, validation and test
    FOLDER/curves.png, .csv                AUC on val after each epoch

A training is a function of its settings: killed anywhere, the same call goes on, and gives the same table.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.errors import UserError
from trainer import files
from trainer.downstream.finetune import METRICS, RESULT, Result, finetune, metric_curve
from trainer.downstream.haemorrhage import Config, heads_of, task_of
from trainer.downstream.haemorrhage_data import Heads
from trainer.downstream.linear import linear_probe_auc
from trainer.evaluate import figures
from trainer.labels import UNKNOWN

ARMS = ("volume", "types", "slices", "self-supervision")
TITLES = {
    "volume": "volume label",
    "types": "+ five types",
    "slices": "+ slices",
    "self-supervision": "+ self-supervision",
}
COLUMNS = ("auc", "average_precision", "auc_types", "auc_slices")
BASELINES = {"voxels": "logistic regression on voxels", "histogram": "logistic regression on an HU histogram"}
_GRID = (5, 12, 10)  # cells of the voxel baseline
_BINS = 40
_LOOK_SECONDS = 2.0

Told = Callable[[int, int], None]  # epochs done, of


@dataclass(frozen=True)
class Ablation:
    """What is compared. encoder: of the last arm; None leaves it out. jobs: trainings at a time, each in a
    process of one thread."""

    config: Config
    dataset: str
    labels: tuple[str, ...]
    encoder: Path | None
    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2

    @property
    def arms(self) -> tuple[str, ...]:
        return ARMS if self.encoder is not None else ARMS[:-1]

    def place(self, arm: str, seed: int) -> Path:
        return self.folder / arm / f"seed-{seed}"


Cell = tuple[str, int]  # arm, seed


def run(ablation: Ablation, progress: Told | None = None) -> dict[str, Any]:
    """Train what is missing and write the tables; the tree of ablation.json. Raises UserError."""
    if len(ablation.labels) != 2:
        raise UserError("the ablation needs two tables: --labels VOLUMES --labels SLICES")
    for name in ("types", "slices"):
        if getattr(ablation.config.weights, name) == 0:
            raise UserError(f"with weights.{name}=0 rows of the table are the same: give it a weight above 0")
    heads = heads_of(ablation.config, ablation.dataset, ablation.labels)
    for arm in ablation.arms:
        task_of(arm_config(ablation.config, arm), heads, _encoder(ablation, arm))  # refuses what cannot be
    ablation.folder.mkdir(parents=True, exist_ok=True)
    todo = [(arm, seed) for seed in ablation.seeds for arm in ablation.arms]
    if ablation.jobs <= 1:
        for cell in todo:
            _train(ablation, heads, cell)
            _tell(ablation, todo, progress)
    else:
        _in_processes(ablation, todo, progress)
    results = {cell: _train(ablation, heads, cell) for cell in todo}  # all are there: read and checked
    tree = {
        "format": 1,
        "seeds": list(ablation.seeds),
        "box": list(ablation.config.box),
        "volumes": {split: len(heads.where(split)) for split in ("train", "val", "test")},
        "baselines": _baselines(ablation, heads),
        "arms": {arm: [_row(results[arm, seed], seed) for seed in ablation.seeds] for arm in ablation.arms},
    }
    _write(ablation, tree)
    return tree


def arm_config(config: Config, arm: str) -> Config:
    """The losses of an arm; those that it has keep their weight."""
    off = {"volume": ("types", "slices"), "types": ("slices",)}.get(arm, ())
    return config.model_copy(update={"weights": config.weights.model_copy(update=dict.fromkeys(off, 0.0))})


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """mean, sd (of the sample; 0 of one value), low and high; None where a value is missing."""
    found = [v for v in values if v is not None]
    if len(found) < len(values) or not found:
        return None
    sd = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
    return {"mean": float(np.mean(found)), "sd": sd, "low": min(found), "high": max(found)}


def markdown(tree: Mapping[str, Any]) -> str:
    """The table: mean and standard deviation over the seeds."""
    count = tree["volumes"]
    lines = [
        f"{count['train']} volumes to train on, {count['val']} to validate, {count['test']} to test; "
        f"{len(tree['seeds'])} seeds, mean ± standard deviation",
        "",
        "| trained on | AUC, val | AUC, test | average precision, test | types, test | slices, test |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in BASELINES.items():
        found = tree["baselines"][name]
        val, test = ("-" if found[s] is None else f"{found[s]:.3f}" for s in ("val", "test"))
        lines.append(f"| {title} | {val} | {test} | - | - | - |")
    for arm, rows in tree["arms"].items():
        cells = [_cell([row["val"]["auc"] for row in rows])]
        cells += [_cell([row["test"][name] for row in rows]) for name in COLUMNS]
        lines.append(f"| {TITLES[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pixel_features(box: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What the baselines see of a box [Z, Y, X]: means of coarse cells, a histogram of what is not black."""
    parts: NDArray[Any] = box
    for axis, cells in enumerate(_GRID):
        edges = np.linspace(0, box.shape[axis], min(cells, box.shape[axis]) + 1).astype(int)
        sums = np.add.reduceat(parts, edges[:-1], axis=axis)
        sizes = np.diff(edges).astype(np.float32)
        parts = sums / np.expand_dims(sizes, tuple(a for a in range(3) if a != axis))
    counts, _ = np.histogram(box[(box > 0) & (box < 1)], bins=_BINS, range=(0, 1))
    share = counts / max(int(counts.sum()), 1)
    return {"voxels": parts.ravel().astype(np.float32), "histogram": np.sqrt(share).astype(np.float32)}


def _in_processes(ablation: Ablation, todo: Sequence[Cell], progress: Told | None) -> None:
    parts = [list(todo[i :: ablation.jobs]) for i in range(min(ablation.jobs, len(todo)))]
    with ProcessPoolExecutor(len(parts), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_train_all, ablation, part) for part in parts}
        while waiting:
            done, waiting = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            _tell(ablation, todo, progress)
            for future in done:
                future.result()


def _train_all(ablation: Ablation, cells: Sequence[Cell]) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    heads = heads_of(ablation.config, ablation.dataset, ablation.labels)
    for cell in cells:
        _train(ablation, heads, cell)


def _train(ablation: Ablation, heads: Heads, cell: Cell) -> Result:
    arm, seed = cell
    config = arm_config(ablation.config, arm)
    one = config.finetune.model_copy(update={"seed": seed})
    return finetune(task_of(config, heads, _encoder(ablation, arm)), one, ablation.place(arm, seed))


def _encoder(ablation: Ablation, arm: str) -> Path | None:
    return ablation.encoder if arm == ARMS[-1] else None


def _tell(ablation: Ablation, todo: Sequence[Cell], progress: Told | None) -> None:
    if progress is None:
        return
    done, each = 0, ablation.config.finetune.epochs
    for cell in todo:
        place = ablation.place(*cell)
        if (place / RESULT).is_file():
            done += each
        elif (place / METRICS).is_file():
            done += len((place / METRICS).read_text().splitlines())
    progress(done, each * len(todo))


def _baselines(ablation: Ablation, heads: Heads) -> dict[str, dict[str, float | None]]:
    """AUC of the volume label on val and test; the penalty is chosen by cross-validation on train."""
    path = ablation.folder / "baselines.json"
    identity = heads.identity
    if path.is_file():
        said = json.loads(path.read_text())
        if said.get("identity") == identity:
            found: dict[str, dict[str, float | None]] = said["baselines"]
            return found
    labels = heads.findings[:, 0].astype(np.int64)
    parts = {s: heads.where(s)[labels[heads.where(s)] != UNKNOWN] for s in ("train", "val", "test")}
    features = {i: pixel_features(heads.box(i)) for part in parts.values() for i in part.tolist()}
    found = {}
    for name in BASELINES:
        x = {s: np.stack([features[i][name] for i in part.tolist()]) for s, part in parts.items()}
        train = (x["train"], labels[parts["train"]])
        groups = heads.patients[parts["train"]]
        aucs = {s: linear_probe_auc(*train, x[s], labels[parts[s]], groups=groups) for s in ("val", "test")}
        found[name] = {s: value if math.isfinite(value) else None for s, value in aucs.items()}
    text = json.dumps({"identity": identity, "baselines": found}, indent=1)
    files.replace_file(path, text.encode())
    return found


def _row(result: Result, seed: int) -> dict[str, Any]:
    chosen = {"seed": seed, "best_epoch": result.best_epoch, "epochs": result.epochs}
    return {**chosen, "val": result.val, "test": result.test}


def _cell(values: Sequence[float | None]) -> str:
    found = spread(values)
    return "-" if found is None else f"{found['mean']:.3f} ± {found['sd']:.3f}"


def _write(ablation: Ablation, tree: Mapping[str, Any]) -> None:
    files.replace_file(ablation.folder / "ablation.json", (json.dumps(tree, indent=1) + "\n").encode())
    files.replace_file(ablation.folder / "ablation.md", (markdown(tree) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "seed", "split", "metric", "value"))
    for arm, rows in tree["arms"].items():
        for row in rows:
            for split in ("val", "test"):
                writer.writerows((arm, row["seed"], split, name, v) for name, v in row[split].items())
    files.replace_file(ablation.folder / "ablation.csv", text.getvalue().encode())
    curves = {
        TITLES[arm]: [metric_curve(ablation.place(arm, seed), "auc") for seed in ablation.seeds]
        for arm in ablation.arms
    }
    figures.curves_figure(ablation.folder / "curves", curves)
