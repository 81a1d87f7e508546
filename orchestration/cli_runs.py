"""`medswav report` and `ls`: what there is, and how it goes. Thin, like cli.py."""

from pathlib import Path
from typing import Annotated

import typer

from shards.objects import location

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command()(report)
    app.command()(ls)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several: side by side.")],
    output: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Where its dataset lies now; default: where the run found it.")
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures/--no-pictures", help="Views and contact sheets: as sensitive as the dataset."
        ),
    ] = True,
    sheet_images: Annotated[
        int, typer.Option(min=0, help="Images of a modality for the contact sheets; 0: none.")
    ] = 256,
    as_json: AsJson = False,
) -> None:
    """One HTML page of a pretraining run, while it goes on or after: curves, speed, pictures, advice.

    Example: medswav report RUN --output run.html
    Example: medswav report RUN OTHER --output both.html --no-pictures
    """
    from orchestration.run_report import report

    place = None if dataset is None else location(dataset)
    typer.echo(
        report(runs, output, dataset=place, pictures=pictures, sheet_images=sheet_images, as_json=as_json)
    )


def ls(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path(),
    depth: Annotated[int, typer.Option(min=0, help="Folders below it, at most.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Runs and datasets below a folder: running, done, stopped or broken; steps, checkpoint, images.

    Example: medswav ls /data/runs
    """
    from orchestration.run_list import ls

    typer.echo(ls(folder, depth, as_json))
