"""`ingest quarantine ...`: the refused inputs of a dataset."""

from pathlib import Path
from typing import Annotated

import typer

from orchestration.cli_help import GROUP

app = typer.Typer(
    help="The refused inputs of a dataset, by pseudonym.\n\nExample: ingest quarantine ls DATASET", **GROUP
)

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
    """List what was refused: pseudonym of the source, reason, modality, kind.

    Example: ingest quarantine ls DATASET --reason crashed
    """
    from orchestration.quarantine_report import listing

    typer.echo(listing(dataset, reason, limit, path_map, as_json))


@app.command()
def show(
    dataset: Dataset,
    source: Annotated[str, typer.Argument(help="Pseudonym of a source, or a unique beginning of it.")],
    path_map: Paths = None,
    as_json: AsJson = False,
) -> None:
    """Say why one source was refused, in full.

    Example: ingest quarantine show DATASET 22tq74
    """
    from orchestration.quarantine_report import show as shown

    typer.echo(shown(dataset, source, path_map, as_json))


@app.command()
def retry(
    dataset: Dataset,
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Source folders, as given to `ingest run`.")
    ],
    reason: Annotated[
        list[str] | None,
        typer.Option(
            help="Reason to try again, may be repeated; default crashed, decode_failed, unreadable, "
            "transfer_syntax_unsupported, source_missing."
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", "--key-file", help="As in `ingest run`.")] = None,
    site: Annotated[str | None, typer.Option(help="As in `ingest run`.")] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="As in `ingest run`.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=value", help="As in `ingest run`; file_seconds may differ."),
    ] = None,
    table: Annotated[list[Path] | None, typer.Option(help="As in `ingest run`.")] = None,
    outputs: Annotated[str | None, typer.Option("--as", help="As in `ingest run`.")] = None,
    bytes_per_second: Annotated[str | None, typer.Option(help="As in `ingest run`.")] = None,
    open_files: Annotated[int | None, typer.Option(min=1, help="As in `ingest run`.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Units at a time; default one a CPU.")] = None,
    address: Annotated[str | None, typer.Option(help="host:port of a running Ray cluster.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert refused inputs again, after a decoder was added or a limit raised; nothing is rewritten.

    Example: ingest quarantine retry DATASET ARCHIVE --reason crashed --set file_seconds=600
    """
    import dataclasses
    import json

    from orchestration.cli_ingest import build_config
    from orchestration.retry_job import run_retry

    limits = (bytes_per_second, open_files)
    config = build_config(sources, dataset, key, site, config_file, set_, table, None, *limits, outputs)
    summary = run_retry(config, reason, workers=workers, address=address)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), indent=1))
    raise typer.Exit(summary.exit_code)
