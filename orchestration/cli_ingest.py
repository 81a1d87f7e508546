"""`medswav ingest ...`, which is also the command `ingest`: source folders to a dataset."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration import cli_quarantine
from orchestration.cli_help import PLAIN
from shards.errors import UserError
from shards.objects import location
from shards.settings import apply_override

if TYPE_CHECKING:
    from ingest.config import IngestConfig

app = typer.Typer(
    name="ingest",
    help="Source folders (DICOM, NIfTI, images + CSV) to a dataset of committed shards.\n\n"
    "Example: ingest plan ARCHIVE && ingest run ARCHIVE DATASET",
    **PLAIN,
)
app.add_typer(cli_quarantine.app, name="quarantine")

Key = Annotated[
    Path | None,
    typer.Option(
        "--key",
        "--key-file",
        help="Key file of the pseudonyms; default MEDSWAV_KEY, else OUT.key, which a first run creates.",
    ),
]
Site = Annotated[str | None, typer.Option(help="Keeps equal patient ids of two hospitals apart.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change a setting; may be repeated.")
]
Table = Annotated[
    list[Path] | None,
    typer.Option(help="CSV that lists images (columns file, modality, patient); may be repeated."),
]
BytesPerSecond = Annotated[
    str | None,
    typer.Option(
        metavar="AMOUNT",
        help="Read no more of the sources than this, all workers together; 50MB, 200KiB. Default: no limit.",
    ),
]
Outputs = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="KINDS",
        help="slices (default), or slices,volumes: series of slices as 3D samples too.",
    ),
]
OpenFiles = Annotated[
    int | None, typer.Option(min=1, help="Source files open at a time, all workers together.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Dataset = Annotated[Path, typer.Argument(metavar="OUT", help="Dataset: folder, s3://..., gs://...")]


def build_config(
    sources: list[Path],
    output: Path | None,
    key: Path | None = None,
    site: str | None = None,
    config_file: Path | None = None,
    overrides: list[str] | None = None,
    tables: list[Path] | None = None,
    path_map: Path | None = None,
    bytes_per_second: str | None = None,
    open_files: int | None = None,
    outputs: str | None = None,
) -> "IngestConfig":
    """Options over the YAML file over the defaults; output None: of a plan. Raises UserError."""
    from ingest.config import load_config, read_settings

    settings = read_settings(config_file) if config_file is not None else {}
    for item in overrides or []:
        apply_override(settings, item)
    settings["sources"] = [location(path) for path in sources]
    settings["output"] = "" if output is None else location(output)
    limits = {"bytes_per_second": bytes_per_second, "open_files": open_files}
    settings |= {name: value for name, value in limits.items() if value is not None}
    if outputs is not None:
        settings["outputs"] = [name.strip() for name in outputs.split(",")]
    if path_map is not None:
        settings["path_map"] = str(path_map.absolute())
    if key is not None:
        settings["key_file"] = str(key)
    if site is not None:
        settings["site"] = site
    if tables:
        listed = list(settings.get("tables", []))
        settings["tables"] = listed + [{"path": str(table.absolute())} for table in tables]
    return load_config(settings)


@app.command()
def plan(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Folders, s3://, gs://...")],
    config_file: ConfigFile = None,
    set_: Settings = None,
    table: Table = None,
    outputs: Outputs = None,
    as_json: AsJson = False,
) -> None:
    """What a run would do: counts, refusals by reason, bytes, core-seconds. Writes nothing.

    Example: ingest plan ARCHIVE --as slices,volumes
    """
    from orchestration.ingest_report import plan_report

    config = build_config(sources, None, None, None, config_file, set_, table, outputs=outputs)
    typer.echo(plan_report(config, as_json))


@app.command()
def run(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE... OUT",
            help="Source folders, s3:// or gs:// prefixes, then the dataset: a folder, s3://BUCKET/PREFIX, gs://...",
        ),
    ],
    key: Key = None,
    site: Site = None,
    config_file: ConfigFile = None,
    set_: Settings = None,
    table: Table = None,
    outputs: Outputs = None,
    path_map: Annotated[
        Path | None,
        typer.Option(help="Private file that names the source of each pseudonym; mode 0600, outside of OUT."),
    ] = None,
    bytes_per_second: BytesPerSecond = None,
    open_files: OpenFiles = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Units at a time; default one a CPU.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="host:port of a Ray cluster; default RAY_ADDRESS, else a local Ray."),
    ] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines scrape.")] = "127.0.0.1",
    verbose: Annotated[bool, typer.Option(help="Show Ray's own log lines.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert source folders to a dataset; run again, it goes on where it was.

    Example: ingest run s3://BUCKET/EXPORT DATASET --key site.key
    Example: ingest run ARCHIVE DATASET --as slices,volumes
    """
    import dataclasses

    from orchestration.ingest_job import run_ingest

    if len(paths) < 2:
        raise UserError("give the source folders and then the output folder: ingest run SOURCE... OUT")
    given = (key, site, config_file, set_, table, path_map, bytes_per_second, open_files, outputs)
    config = build_config(paths[:-1], paths[-1], *given)
    summary = run_ingest(
        config,
        workers=workers,
        address=address,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        verbose=verbose,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), indent=1))
    raise typer.Exit(summary.exit_code)


@app.command()
def watch(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE... OUT", help="Landing folders, then the dataset, as in `ingest run`."
        ),
    ],
    key: Key = None,
    site: Site = None,
    config_file: ConfigFile = None,
    set_: Settings = None,
    table: Table = None,
    outputs: Outputs = None,
    path_map: Annotated[Path | None, typer.Option(help="As in `ingest run`.")] = None,
    settle: Annotated[
        float, typer.Option(min=0.1, help="Seconds a file must be unchanged before it is read.")
    ] = 60.0,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 10.0,
    once: Annotated[bool, typer.Option(help="One look, then end, for cron.")] = False,
    bytes_per_second: BytesPerSecond = None,
    open_files: OpenFiles = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Units at a time; default one a CPU.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="host:port of a Ray cluster; default RAY_ADDRESS, else a local Ray."),
    ] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines scrape.")] = "127.0.0.1",
    verbose: Annotated[bool, typer.Option(help="Show Ray's own log lines.")] = False,
) -> None:
    """Convert what lands in a folder, as it lands; end it with Ctrl-C or SIGTERM.

    Example: ingest watch LANDING DATASET --key site.key --bytes-per-second 50MB
    """
    from orchestration.watch import watch as watched

    if len(paths) < 2:
        raise UserError("give the landing folders and then the output folder: ingest watch SOURCE... OUT")
    settings = [*(set_ or []), f"settle_seconds={settle}"]
    given = (key, site, config_file, settings, table, path_map, bytes_per_second, open_files, outputs)
    config = build_config(paths[:-1], paths[-1], *given)
    code = watched(
        config,
        every,
        once=once,
        workers=workers,
        address=address,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        verbose=verbose,
    )
    raise typer.Exit(code)


@app.command()
def status(dataset: Dataset, as_json: AsJson = False) -> None:
    """Units planned and committed, images by modality and split, refusals by reason.

    Example: ingest status DATASET
    """
    from orchestration.ingest_report import status_report

    typer.echo(status_report(dataset, as_json))


@app.command()
def report(
    dataset: Dataset,
    out: Annotated[Path | None, typer.Option(help="HTML page to write, outside of the dataset.")] = None,
    as_json: AsJson = False,
) -> None:
    """One HTML page: counts, refusals, vendors, sizes, sample pictures. As sensitive as the dataset.

    Example: ingest report DATASET --out PAGE.html
    """
    from orchestration import ingest_page

    typer.echo(ingest_page.report(dataset, out, as_json))


@app.command()
def verify(
    dataset: Dataset,
    deep: Annotated[bool, typer.Option(help="Also hash every file and decode every image.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a dataset against its commits; exit code 1 when something is wrong. Changes nothing.

    Example: ingest verify DATASET --deep
    """
    from orchestration.ingest_report import verify_report

    clean, text = verify_report(dataset, deep, as_json)
    typer.echo(text)
    raise typer.Exit(0 if clean else 1)


@app.command()
def repair(
    dataset: Dataset,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SOURCE]...", help="As given to `ingest run`; none: only look."),
    ] = None,
    key: Key = None,
    site: Site = None,
    config_file: ConfigFile = None,
    set_: Settings = None,
    table: Table = None,
    outputs: Outputs = None,
    as_json: AsJson = False,
) -> None:
    """Make broken or missing files again from the sources, byte for byte; exit code 1 when some stay broken.

    Example: ingest repair DATASET ARCHIVE --key site.key --site north
    """
    from orchestration.repair_job import look, run_repair

    if sources:
        summary = run_repair(
            build_config(sources, dataset, key, site, config_file, set_, table, outputs=outputs)
        )
    else:
        summary = look(location(dataset))
    typer.echo(summary.to_json() if as_json else summary.text())
    raise typer.Exit(summary.exit_code)


@app.command()
def snapshot(dataset: Dataset, as_json: AsJson = False) -> None:
    """Copy all commit records into one file, which makes a dataset of many units quick to open.

    Example: ingest snapshot s3://BUCKET/PREFIX
    """
    from orchestration.ingest_report import snapshot_report

    typer.echo(snapshot_report(dataset, as_json))


@app.command()
def dedupe(dataset: Dataset, as_json: AsJson = False) -> None:
    """Compare the images of all units; readers leave out equal ones. The end of `ingest run` does this too.

    Example: ingest dedupe DATASET
    """
    from orchestration.dedupe_job import dedupe_report

    typer.echo(dedupe_report(dataset, as_json))


@app.command()
def label(
    dataset: Dataset,
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="Labels by file, UID or patient.")],
    key: Key = None,
    site: Site = None,
    name: Annotated[str, typer.Option(help="Name of the label table.")] = "labels",
    source: Annotated[
        list[Path] | None, typer.Option(help="Source folder of `ingest run`, where the CSV lies above it.")
    ] = None,
    kind: Annotated[str, typer.Option(help="classes | multi | boxes | masks")] = "classes",
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column of the labels; repeated: multi, or x0 y0 x1 y1 of boxes."),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Joining column, where the CSV has several.")] = None,
    of: Annotated[str, typer.Option(help="images | volumes (of --as slices,volumes)")] = "images",
) -> None:
    """Join a table of labels to the samples by their pseudonyms; no shard is rewritten.

    Example: ingest label DATASET LABELS.csv --key site.key --column finding
    """
    from orchestration.ingest_report import label_report

    typer.echo(label_report(dataset, csv, key, site, name, source, kind, column, by, of))


@app.command("key")
def key_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Key file to create, outside of any dataset.")],
) -> None:
    """Create a key for the pseudonyms. Keep it secret and keep it: the same key gives the same pseudonyms.

    Example: ingest key site.key
    """
    from shards.ids import create_key

    create_key(file)
    typer.echo(f"created {file}; keep it secret, keep a copy, and give it to every run: --key {file}")
