"""`medswav finetune`: train a task on labels, from any encoder. Thin, like cli.py."""

from pathlib import Path
from typing import Annotated

import typer

from shards.errors import UserError
from shards.objects import location

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change a setting; may be repeated.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command()(finetune)
    app.command()(ablate)


def finetune(
    task: Annotated[
        str, typer.Argument(help="classify, findings, haemorrhage, metastases-mask or metastases.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the trainings.", show_default="required")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset: folder, s3://..., gs://...", show_default="required")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(help="Label table of the dataset, or a CSV or Parquet file with a column key."),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="encoder.safetensors or run folder; none or random; torchvision:WEIGHTS.")
    ] = "none",
    preset: Annotated[str, typer.Option(help="small or full.")] = "small",
    mode: Annotated[
        str | None, typer.Option(help="full: the whole network; frozen: a linear head. As mode=...")
    ] = None,
    set_: Settings = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option(help="Share of the training patients; repeated: nested. Default 1."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each fraction: seeds 0, 1, ...")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    explain: Annotated[
        bool, typer.Option("--explain", help="Only tell parameters, FLOPs and memory of a step.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Train a task on labels; the best epoch on val is tested. The same command again goes on.

    Example: medswav finetune classify --data DATASET --labels labels --encoder RUN --output TUNED
    """
    import json

    from orchestration import finetune_job

    overrides = [*(set_ or []), *([] if mode is None else [f"mode={mode}"])]
    request = finetune_job.Request(
        task=task,
        dataset="" if data is None else str(location(data)),
        labels=tuple(labels or ()),
        encoder=encoder,
        output=output or Path(),
        preset=preset,
        overrides=tuple(overrides),
        fractions=tuple(fraction or (1.0,)),
        seeds=tuple(range(seeds)),
        device=device,
    )
    if explain:
        found = finetune_job.explain(request)
        typer.echo(json.dumps(found, indent=1) if as_json else finetune_job.explained(found))
        return
    for name, given in (("--data", data), ("--labels", labels), ("--output", output)):
        if not given:
            raise UserError(f"finetune needs {name} (see medswav finetune --help)")
    tree = finetune_job.finetune(request)
    typer.echo(json.dumps(tree, indent=1) if as_json else finetune_job.markdown(tree))


def ablate(
    task: Annotated[str, typer.Argument(help="haemorrhage.")],
    output: Annotated[Path, typer.Option(help="Folder of the trainings and the table.")],
    data: Annotated[Path, typer.Option(help="Dataset: folder, s3://..., gs://...")],
    labels: Annotated[list[str], typer.Option(help="Label tables of volumes and of slices.")],
    encoder: Annotated[
        str, typer.Option(help="encoder.safetensors or run folder; none: without self-supervision.")
    ] = "none",
    preset: Annotated[str, typer.Option(help="small or full.")] = "small",
    set_: Settings = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row: seeds 0, 1, ...")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, on a CPU, of one thread each.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="All values as JSON.")] = False,
) -> None:
    """What each auxiliary task and pretraining bring, each added in turn. The same command again goes on.

    Example: medswav ablate haemorrhage --data DATASET --labels V --labels S --encoder RUN --output TABLE
    """
    import json

    from orchestration import finetune_job
    from orchestration.progress import Progress
    from trainer.downstream import haemorrhage_ablation as ablation

    if task != "haemorrhage":
        raise UserError(f"there is no ablation of {task!r}: choose haemorrhage")
    if any(item.partition("=")[0].strip() == "finetune.seed" for item in set_ or []):
        raise UserError("--set finetune.seed is an option of its own: use --seeds")
    _, config = finetune_job.configured(task, preset, set_ or [])
    wanted = ablation.Ablation(
        config=config,
        dataset=str(location(data)),
        labels=tuple(labels),
        encoder=finetune_job.encoder_file(encoder, output),
        folder=output,
        seeds=tuple(range(seeds)),
        jobs=jobs,
    )
    epochs = len(wanted.arms) * seeds * config.finetune.epochs
    with Progress("ablate", epochs, "epochs") as progress:
        tree = ablation.run(wanted, lambda done, _: progress.update(done))
    typer.echo(json.dumps(tree, indent=1) if as_json else ablation.markdown(tree))
