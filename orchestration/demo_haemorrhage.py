"""`medswav demo --task haemorrhage`: head CT with bleedings of five types, from files to the ablation table.

FOLDER/source/heads, volumes.csv, slices.csv     generated series and their truth
FOLDER/dataset                                   slices and volumes, with labels of both
FOLDER/run                                       3D pretraining, without labels, on the training split
FOLDER/haemorrhage                               the ablation (trainer.downstream.haemorrhage_ablation)
"""

from functools import partial
from pathlib import Path
from typing import Any

from orchestration import demo_tasks
from orchestration.demo_steps import StepLog
from orchestration.demo_tasks import TaskOptions, Told
from orchestration.progress import Progress
from trainer.config import TrainConfig, load_config, text_setting

PATIENTS, SEEDS = 200, 2
LABELS = ("haemorrhage", "haemorrhage_slices")
SPLITS = (0.6, 0.15, 0.25)
# Over the preset `demo`: the boxes of the fine-tuning, few steps, shades on both sides of 1.
PRETRAINING = (
    "data.modalities=[ct_volumes]",
    "data.batch_size=16",
    "views.volume={box: [16, 48, 40]}",
    "views.crops=[{count: 2, size: [44, 36], share: [0.5, 1.0]}, "
    "{count: 2, size: [28, 24], share: [0.2, 0.5]}]",
    "views.border=[0.0, 0.0]",
    "views.energy_probability=0",
    "views.gamma=[0.7, 1.4]",
    "model.backbone=densenet3d",
    "max_steps=240",
    "swav.freeze_prototypes_steps=20",
    "checkpoint.every_steps=60",
)


def demo(options: TaskOptions) -> int:
    """Run what is not yet done of the six steps. 0, or 130 when it was stopped. Raises UserError."""
    from ingest.synthetic import heads

    patients = options.patients or PATIENTS
    config = pretraining(options)  # a wrong setting is told now, not after the ingest
    log = demo_tasks.begin(options, {"patients": patients})
    demo_tasks.generate(options, log, partial(_build, patients, options.seed), patients)
    outputs: dict[str, Any] = {"outputs": ["slices", "volumes"], "split_fractions": list(SPLITS)}
    if not demo_tasks.ingest(options, log, options.source / heads.FILES, outputs):
        return 130
    volumes: dict[str, Any] = {"table": options.source / heads.VOLUMES, "name": LABELS[0], "of": "volumes"}
    slices = {"table": options.source / heads.SLICES, "name": LABELS[1], "label_column": heads.FINDING}
    demo_tasks.join(options, log, [{**volumes, "kind": "multi", "values": heads.COLUMNS}, slices])
    if not demo_tasks.pretrain(options, log, config):
        return 130
    tree = _finetune(options, log)
    with log.step("Table") as detail:
        detail.text = str(options.tuned / "ablation.md")
        print(tree)
    return 0


def pretraining(options: TaskOptions) -> TrainConfig:
    own = [text_setting("data.dataset", str(options.dataset)), f"seed={options.seed}"]
    return load_config("demo", [*PRETRAINING, *own, *options.overrides])


def _build(patients: int, seed: int, folder: Path, progress: Told) -> None:
    from ingest.synthetic.heads import build_heads

    build_heads(folder, patients, seed, progress=progress)


def _finetune(options: TaskOptions, log: StepLog) -> str:
    """The ablation; its table."""
    from trainer.downstream import haemorrhage_ablation as ablation
    from trainer.downstream.haemorrhage import PRESETS

    wanted = ablation.Ablation(
        config=PRESETS["small"],
        dataset=str(options.dataset),
        labels=LABELS,
        encoder=options.encoder,
        folder=options.tuned,
        seeds=tuple(range(options.seeds or SEEDS)),
        jobs=options.ranks,
    )
    cells = len(wanted.arms) * len(wanted.seeds)
    with log.step("Fine-tune") as detail:
        with Progress(
            "fine-tune", cells * wanted.config.finetune.epochs, "epochs", stream=options.stream
        ) as p:
            tree = ablation.run(wanted, lambda done, _: p.update(done))
        detail.text = f"{len(wanted.arms)} sets of labels, {len(wanted.seeds)} seeds each"
    return ablation.markdown(tree)
