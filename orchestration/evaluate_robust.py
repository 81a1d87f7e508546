"""`medswav evaluate robustness`: how much a case's probability moves when its image is transformed.

50 images of cases of the test split x 50 random transforms (method.md section 7), the same for every arm,
with the best networks of its trainings at one label fraction.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from orchestration.evaluate_job import Finding
from orchestration.evaluate_page import Chart, Section, Table, Value
from orchestration.evaluate_runs import Arm, Cell, common_seeds, fractions_of
from orchestration.finetune_job import TASKS, configured
from orchestration.progress import Progress
from shards.errors import UserError
from shards.ids import digest
from shards.store import file_sha256
from trainer.batches import dataset_fingerprint
from trainer.downstream.finetune import load_best
from trainer.downstream.tables import table_digest
from trainer.evaluate import figures
from trainer.evaluate import robustness as robust

if TYPE_CHECKING:
    from trainer.downstream.task import Task

KINDS: tuple[robust.Kind, ...] = ("gamma", "geometric", "both")
_KEY: Literal["robustness"] = "robustness"  # of the draw of images and transforms


def robustness(
    arms: Sequence[Arm],
    out: Path,
    *,
    fraction: float | None = None,
    images: int = robust.IMAGES,
    transforms: int = robust.TRANSFORMS,
    device: str = "cpu",
    title: str = "",
) -> Finding:
    """Box plots of the relative deviation, a kind of transforms beside the other. Raises UserError."""
    listed = fractions_of(arms)
    chosen = listed[0] if fraction is None else fraction
    seeds = common_seeds(arms, chosen)
    if not seeds:
        raise UserError(
            f"the arms have no seed in common at fraction {chosen:g}: give runs of the same seeds"
        )
    deviations: dict[str, dict[str, NDArray[np.float64]]] = {kind: {} for kind in KINDS}
    used = 0
    with Progress("robustness", len(arms) * len(seeds) * len(KINDS), "measurements") as progress:
        for arm in arms:
            parts: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in KINDS}
            for cell in arm.at(chosen, seeds):
                task, module = opened(cell, arm.task)
                network = task.network().to(device)
                load_best(network, cell.folder)
                cases = [i for i in range(len(task.test)) if module.is_case(task.test.sample(i, None).target)]
                if not cases:
                    raise UserError(f"{arm.name} has no case in test: give runs whose test split has one")
                drawn = [cases[i] for i in robust.draw_images(len(cases), (_KEY,), images)]
                inputs = [task.test.sample(i, None).input for i in drawn]
                if inputs[0].ndim < 3:
                    raise UserError(
                        f"{arm.name} was trained on features, not on images: give runs of mode=full"
                    )
                probability = partial(_probability, task, module, network, device)
                for kind in KINDS:
                    keys = [(_KEY, i) for i in drawn]
                    parts[kind].append(robust.measure(probability, inputs, keys, kind, transforms))
                    progress.update(progress.done + 1, f"{arm.name}, seed {cell.seed}")
                used = len(drawn)
            for kind in KINDS:
                deviations[kind][arm.name] = np.concatenate(parts[kind])
    paths = figures.robustness_figure(out / "robustness", deviations, title=title)
    return _finding(arms, deviations, paths, chosen, seeds, used, transforms)


def opened(cell: Cell, name: str) -> tuple["Task", Any]:
    """The task of a training, and its module. Raises UserError where its inputs are gone or others now."""
    about = json.loads((cell.run / "run.json").read_text())
    source = json.loads((cell.run / "source.json").read_text())
    module, _ = configured(name, "small", ())
    if not (hasattr(module, "is_case") and hasattr(module, "case_probability")):
        able = [n for n in TASKS if hasattr(configured(n, "small", ())[0], "case_probability")]
        raise UserError(f"{name} gives no probability of a case: robustness is of {', '.join(able)}")
    encoder = None if source["encoder"] is None else Path(source["encoder"])
    if encoder is not None and (not encoder.is_file() or digest(file_sha256(encoder)) != about["encoder"]):
        raise UserError(f"the encoder of {cell.run.name} is gone or another now: put {encoder} back")
    if dataset_fingerprint(source["dataset"]) != about["dataset"]:
        raise UserError(f"the dataset of {cell.run.name} is another now: put it back, or train again")
    if [table_digest(source["dataset"], one) for one in source["labels"]] != about["labels"]:
        raise UserError(f"the labels of {cell.run.name} are others now: put them back, or train again")
    config = module.Config.model_validate(about["settings"])
    return module.prepare(config, source["dataset"], source["labels"], encoder), module


def _probability(
    task: "Task", module: Any, network: torch.nn.Module, device: str, images: NDArray[np.float32]
) -> NDArray[np.float64]:
    network.eval()
    with torch.inference_mode():
        found = task.predict(network, torch.from_numpy(images).to(device))
    return np.asarray(module.case_probability(found))


def _finding(
    arms: Sequence[Arm],
    deviations: dict[str, dict[str, NDArray[np.float64]]],
    paths: tuple[Path, Path],
    fraction: float,
    seeds: Sequence[int],
    images: int,
    transforms: int,
) -> Finding:
    compared = {kind: robust.compare(of) for kind, of in deviations.items()}
    rows = []
    for arm in arms:
        cells = []
        for kind in KINDS:
            one = next(row for row in compared[kind] if row["model"] == arm.name)
            quartiles = f"({100 * one['box'].q1:.1f} to {100 * one['box'].q3:.1f} %)"
            cells.append(Value(f"{100 * one['box'].median:.1f} %", quartiles))
        rows.append((arm.name, cells))
    caption = "median over images, transforms and seeds (quartiles): the smaller, the steadier"
    tables = [Table("Relative deviation of the case probability", ["", *KINDS], rows, caption)]
    tree = {
        "task": arms[0].task,
        "fraction": fraction,
        "seeds": list(seeds),
        "images": images,
        "transforms": transforms,
        "ranges": asdict(robust.Ranges()),
        "kinds": {kind: [{**row, "box": asdict(row["box"])} for row in of] for kind, of in compared.items()},
    }
    lead = (
        f"{images} test images of cases x {transforms} random transforms x {len(seeds)} seeds, trained on "
        f"{100 * fraction:g} % of the patients; |p_t - p| / p. gamma U[1.8, 2.6]; geometric: rotation by "
        "U[-10, 10] degrees and scaling by U[.9, 1.1]; both."
    )
    chart = Chart("Relative deviation of the case probability", *paths)
    return Finding("robustness", tree, Section("Robustness", lead, tables, [chart], anchor="robustness"))
