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
    """Add the command to an application."""
    app.command()(finetune)


def finetune(
    task: Annotated[str, typer.Argument(help="classify.")],
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
