"""`ingest quarantine ...`: the refused inputs of a dataset."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The refused inputs of a dataset, by pseudonym.", no_args_is_help=True)

Dataset = Annotated[Path, typer.Argument(metavar="OUT", help="Dataset: folder, s3://..., gs://...")]
Paths = Annotated[
    Path | None,
    typer.Option("--path-map", help="Private file of `ingest run --path-map`: shows paths. Keep the output."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def ls(
    dataset: Dataset,
    reason: Annotated[str | None, typer.Option(help="Only this reason, as `ingest status` names it.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows at most; 0: all.")] = 50,
    path_map: Paths = None,
    as_json: AsJson = False,
) -> None:
    """List what was refused: pseudonym of the source, reason, modality, kind."""
    from orchestration.quarantine_report import listing

    typer.echo(listing(dataset, reason, limit, path_map, as_json))


@app.command()
def show(
    dataset: Dataset,
    source: Annotated[str, typer.Argument(help="Pseudonym of a source, or a unique beginning of it.")],
    path_map: Paths = None,
    as_json: AsJson = False,
) -> None:
    """Say why one source was refused, in full."""
    from orchestration.quarantine_report import show as shown

    typer.echo(shown(dataset, source, path_map, as_json))
