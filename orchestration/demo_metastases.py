"""`medswav demo --task metastases`: brain MR with small lesions, from files to the table of the encoders.

FOLDER/source/mr, slices.csv, masks.csv   generated series and their truth
FOLDER/dataset                            slices and volumes, with labels and masks of slices
FOLDER/run                                pretraining on slices, without labels, on the training split
FOLDER/metastases/masks                   the mask network (medswav finetune metastases-mask)
FOLDER/metastases/none-..., pretrained-...    the classifiers (medswav finetune metastases)
FOLDER/metastases.md, .json               the table
FOLDER/metastases-curves.png, -masks.png  figures, each with its CSV
"""

import io
import json
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from orchestration import demo_tasks, finetune_job
from orchestration.demo_steps import StepLog
from orchestration.demo_tasks import TaskOptions, Told
from orchestration.finetune_job import Request
from orchestration.finetune_table import cell
from orchestration.progress import Progress
from trainer import files
from trainer.config import TrainConfig, load_config, text_setting

PATIENTS, SEEDS = 72, 1
SPLITS = (0.55, 0.15, 0.3)
# Over the preset `demo`: crops at about the resolution of the slices: lesions stay a few pixels wide.
PRETRAINING = (
    "data.modalities=[mr]",
    "views.crops=[{count: 2, size: 64, share: [0.35, 0.8]}, {count: 4, size: 32, share: [0.08, 0.2]}]",
    "max_steps=1500",
)
METRICS = {"auc": "AUC", "average_precision": "average precision", "accuracy": "accuracy at .6"}
MASKS, PIXELS = "masks", "pixels"
ARMS = {  # folder: name in the table
    PIXELS: "bare pixels (32 x 32), linear",
    MASKS: "the mask network alone: its highest probability",
    "none-plain": "none, five slices",
    "none-mask": "none, with the mask",
    "pretrained-plain": "pretrained, five slices",
    "pretrained-mask": "pretrained, with the mask",
}


def demo(options: TaskOptions) -> int:
    """Run what is not yet done of the six steps. 0, or 130 when it was stopped. Raises UserError."""
    from ingest.synthetic import metastases as generated

    patients = options.patients or PATIENTS
    log = demo_tasks.begin(options, {"patients": patients})
    config = pretraining(options)  # a wrong setting is told now
    demo_tasks.generate(options, log, partial(_build, patients, options.seed), patients)
    settings: dict[str, Any] = {"outputs": ["slices", "volumes"], "split_fractions": list(SPLITS)}
    if not demo_tasks.ingest(options, log, options.source, settings):
        return 130
    slices = {"table": options.source / generated.SLICES_CSV, "name": "slices"}
    masks = {"table": options.source / generated.MASKS_CSV, "name": MASKS, "kind": "masks"}
    demo_tasks.join(options, log, [slices, masks])
    if not demo_tasks.pretrain(options, log, config):
        return 130
    trees = _finetune(options, log)
    with log.step("Table") as detail:
        text = table(trees)
        _figures(options)
        tree = {name: {"name": ARMS[name], "summary": one["summary"]} for name, one in trees.items()}
        files.replace_file(options.folder / "metastases.json", (json.dumps(tree, indent=1) + "\n").encode())
        files.replace_file(options.folder / "metastases.md", (text + "\n").encode())
        detail.text = "metastases.md, metastases-curves.png and metastases-masks.png"
    print(text)
    return 0


def pretraining(options: TaskOptions) -> TrainConfig:
    own = [text_setting("data.dataset", str(options.dataset)), f"seed={options.seed}"]
    return load_config("demo", [*PRETRAINING, *own, *options.overrides])


def requests(options: TaskOptions) -> dict[str, Request]:
    """The trainings, by folder: that of the masks first, which others need."""
    every = partial(Request, dataset=str(options.dataset), device="cpu")
    seeds = tuple(range(options.seeds or SEEDS))
    masks = every(task="metastases-mask", labels=(MASKS,), encoder="none", output=options.tuned / MASKS)
    found = {MASKS: masks}
    frozen = ("features=pixels", "mode=frozen", "modalities=[mr]", "augment.shift=0", "augment.crop=[1,1]")
    found[PIXELS] = every(
        task="classify",
        labels=("slices",),
        encoder="none",
        output=options.tuned / PIXELS,
        overrides=(*frozen, "augment.gamma=[1,1]"),
    )
    shown = {"plain": "attention=false", "mask": text_setting("segmenter", str(options.tuned / MASKS))}
    for encoder, weights in (("none", "none"), ("pretrained", str(options.encoder))):
        for what, setting in shown.items():
            found[f"{encoder}-{what}"] = every(
                task="metastases",
                labels=("slices",),
                encoder=weights,
                output=options.tuned / f"{encoder}-{what}",
                overrides=(setting,),
                seeds=seeds,
            )
    return found


def table(trees: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each of ARMS, test metrics with their intervals."""
    lines = [f"| slices with a lesion | {' | '.join(METRICS.values())} | best epoch |"]
    lines.append("|---" * (len(METRICS) + 2) + "|")
    for name, title in ARMS.items():
        one = trees[name]["summary"][0]
        cells = [cell(one["test"].get(metric)) for metric in METRICS]
        lines.append(f"| {title} | {' | '.join(cells)} | {one['best_epoch']['mean']:.1f} |")
    masks = trees[MASKS]["summary"][0]
    dice, single = (cell(masks["test"].get(name)) for name in ("dice", "dice_slices"))
    lines += [
        "",
        f"Dice of the masks over the pixels of all slices {dice}, mean over the slices with a lesion "
        f"{single}. {masks['test_patients']} test patients, [95 % interval by patient]; the epoch is "
        "the best one on val.",
    ]
    return "\n".join(lines)


def _build(patients: int, seed: int, folder: Path, progress: Told) -> None:
    from ingest.synthetic.metastases import build

    build(folder, patients, seed, progress=progress)


def _finetune(options: TaskOptions, log: StepLog) -> dict[str, Any]:
    """All trainings, `ranks` at a time: the tree of each result.json."""
    todo = requests(options)
    trees: dict[str, Any] = {}
    with log.step("Fine-tune") as detail, _pool(options.ranks) as pool:
        with Progress("fine-tune", len(todo), "trainings", stream=options.stream) as progress:
            first = {n: todo.pop(n) for n in (MASKS, PIXELS)} | {
                n: todo.pop(n) for n in list(todo) if n.endswith("plain")
            }
            for group in (first, todo):
                running = {pool.submit(_train, request): name for name, request in group.items()}
                for future in as_completed(running):
                    trees[running[future]] = future.result()
                    progress.update(len(trees), running[future])
        detail.text = f"{len(trees)} trainings"
    return trees


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _train(request: Request) -> dict[str, Any]:
    return finetune_job.finetune(request, stream=io.StringIO())


def _figures(options: TaskOptions) -> None:
    """Validation AUC by epoch of the classifiers, and some masks of test patients."""
    from trainer.downstream.finetune import metric_curve
    from trainer.downstream.metastases_mask import examples_of_test
    from trainer.evaluate.figures import curves_figure
    from trainer.evaluate.masks_figure import masks_figure

    runs = {n: sorted((options.tuned / n).glob("fraction-1/seed-*")) for n in ARMS if "-" in n}
    curves = {ARMS[name]: [metric_curve(run, "auc") for run in of] for name, of in runs.items()}
    curves_figure(options.folder / "metastases-curves.png", curves, title="Slices with a lesion, validation")
    examples = examples_of_test(_mask_config(), str(options.dataset), MASKS, options.tuned / MASKS)
    masks_figure(options.folder / "metastases-masks.png", examples, title="Masks of test patients")


def _mask_config() -> Any:
    return finetune_job.configured("metastases-mask", "small", ())[1]
