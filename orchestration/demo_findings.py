"""`medswav demo --task findings`: chest radiographs with nodules and pneumothorax, from files to boxes and
fROC.

FOLDER/source, strict.csv, any_reader.csv    generated radiographs and two ground truths
FOLDER/dataset                               images, with the boxes of both
FOLDER/run                                   pretraining, without labels, on the training split
FOLDER/findings/pretrained, /random          the detector, trained on the strict truth (medswav finetune)
FOLDER/findings/table.md, .json, froc-FINDING.png, .csv, examples.png
"""

import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from orchestration import demo_tasks
from orchestration.demo_steps import StepLog
from orchestration.demo_tasks import TaskOptions, Told
from orchestration.finetune_job import Request
from trainer.config import TrainConfig, load_config, text_setting

PATIENTS, SEEDS = 180, 2
TRUTHS = ("strict", "any_reader")  # the first is trained on
ARMS = {"pretrained": True, "random": False}  # folder of the trainings: with the encoder of FOLDER/run?
BLOBS = "blob filter"
SPLITS = (0.5, 0.2, 0.3)
_EXAMPLES = 6
# Crops in which a nodule keeps its size: those of the demo preset show whole lungs, and it vanishes.
_PRETRAINING = (
    "data.modalities=[xr]",
    "max_steps=600",
    "views.crops=[{count: 2, size: 64, share: [0.2, 0.7]}, {count: 4, size: 32, share: [0.05, 0.15]}]",
    "swav.prototypes=32",
)


def demo(options: TaskOptions) -> int:
    """Run what is not yet done of the six steps. 0, or 130 when it was stopped. Raises UserError."""
    patients = options.patients or PATIENTS
    log = demo_tasks.begin(options, {"patients": patients})
    config = pretraining(options)  # a wrong setting is told now
    demo_tasks.generate(options, log, partial(_build, patients, options.seed), patients)
    if not demo_tasks.ingest(options, log, options.source, {"split_fractions": list(SPLITS)}):
        return 130
    tables = [{"table": options.source / f"{name}.csv", "name": name, "kind": "boxes"} for name in TRUTHS]
    demo_tasks.join(options, log, tables)
    if not demo_tasks.pretrain(options, log, config):
        return 130
    _finetune(options, log)
    with log.step("Table") as detail:
        print(_report(options))
        detail.text = str(options.tuned / "table.md")
    return 0


def pretraining(options: TaskOptions) -> TrainConfig:
    own = [text_setting("data.dataset", str(options.dataset)), f"seed={options.seed}", *_PRETRAINING]
    return load_config("demo", [*own, *options.overrides])


def _build(patients: int, seed: int, folder: Path, progress: Told) -> None:
    from ingest.synthetic.chest import build

    build(folder, patients, seed, progress=progress)


def requests(options: TaskOptions) -> dict[str, Request]:
    """The trainings of each arm, as `medswav finetune findings` takes them."""
    seeds = tuple(range(options.seeds or SEEDS))
    return {
        arm: Request(
            task="findings",
            dataset=str(options.dataset),
            labels=TRUTHS,
            encoder=str(options.encoder) if pretrained else "none",
            output=options.tuned / arm,
            seeds=seeds,
            device="cpu",
        )
        for arm, pretrained in ARMS.items()
    }


def _finetune(options: TaskOptions, log: StepLog) -> None:
    """The arms side by side, each in a process with one thread."""
    wanted = requests(options)
    with log.step("Fine-tune") as detail:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(options.ranks, len(wanted)), mp_context=context) as pool:
            for arm, _ in zip(wanted, pool.map(_train, wanted.values()), strict=True):
                log.say(f"      {arm}: done")
        detail.text = f"{', '.join(wanted)}; {len(next(iter(wanted.values())).seeds)} seeds each"


def _train(request: Request) -> None:
    import cv2
    import torch

    from orchestration.finetune_job import finetune

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with open(os.devnull, "w") as quiet:
        finetune(request, quiet)


def _report(options: TaskOptions) -> str:
    """Write table and figures; the table. Numbers of the detector: mean over the seeds; curves: of all seeds'
    detections together."""
    from trainer import files
    from trainer.evaluate.figures import froc_figure
    from trainer.evaluate.froc import froc

    found = _judged(options)
    rows = {arm: one["test"] for arm, one in found.items()}
    for finding in found[BLOBS]["matched"]:
        curves = {arm: froc(one["matched"][finding]) for arm, one in found.items()}
        title = f"{finding.capitalize()}, ground truth: {TRUTHS[0]}"
        froc_figure(options.tuned / f"froc-{finding}", curves, title=title)
    text = markdown(rows)
    files.replace_file(options.tuned / "table.md", (text + "\n").encode())
    files.replace_file(options.tuned / "table.json", (json.dumps(rows, indent=1) + "\n").encode())
    return text


def _judged(options: TaskOptions) -> dict[str, dict[str, Any]]:
    """Of each arm and the blob filter: test (metric to {mean, min, max}), matched (images by finding, strict
    truth)."""
    from orchestration.demo_findings_sheet import write_sheet
    from orchestration.finetune_job import configured
    from trainer.downstream.blobs import blob_detections
    from trainer.downstream.findings import Matches, matched, metrics, prepare
    from trainer.downstream.finetune import load_best, predict

    wanted = requests(options)
    _, config = configured("findings", "small", ())
    found: dict[str, dict[str, Any]] = {}
    shown: dict[str, list[Any]] = {}
    for arm, request in wanted.items():
        task = prepare(config, request.dataset, TRUTHS, options.encoder if ARMS[arm] else None)
        images: dict[str, list[Any]] = {finding: [] for finding in config.findings}
        for seed in request.seeds:
            network = task.network()
            load_best(network, request.output / "fraction-1" / f"seed-{seed}")
            predictions, targets = predict(task, network, task.test, config.finetune.batch_size)
            shown.setdefault(arm, predictions)
            for finding, of in matched(config, 0, predictions, targets).items():
                images[finding] += of
        tree = json.loads((request.output / "result.json").read_text())
        found[arm] = {"test": tree["summary"][0]["test"], "matched": images}
    predictions, targets = blob_detections(config, task.train, task.test)
    test = metrics(config, TRUTHS, Matches(), predictions, targets)
    spread = {name: {"mean": value, "min": value, "max": value} for name, value in test.items()}
    found[BLOBS] = {"test": spread, "matched": matched(config, 0, predictions, targets)}
    inputs = [task.test.sample(i, None).input for i in range(len(task.test))]
    write_sheet(options.tuned / "examples.png", inputs, targets, shown, config.findings, _EXAMPLES)
    return found


def markdown(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row a metric and ground truth, a column an arm: mean (lowest to highest seed)."""
    from orchestration.finetune_table import cell

    names: Sequence[str] = list(rows[next(iter(rows))])
    lines = [f"| test | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    for name in names:
        truth, _, metric = name.rpartition(":")
        cells = [cell(of.get(name)) for of in rows.values()]
        lines.append(f"| {metric}, {truth or TRUTHS[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)
