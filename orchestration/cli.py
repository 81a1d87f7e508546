"""The commands `medswav` and `ingest`. Thin: options in, one call of the part that does the work, code out.

Exit codes: 0 done, 1 failed, 2 a mistake in the settings (one line on stderr says what to change), 3 failure
budget exceeded or units that failed, 130 interrupted. Heavy imports are inside the commands: --help is quick.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from orchestration import (
    cli_capacity,
    cli_checkpoints,
    cli_evaluate,
    cli_finetune,
    cli_ingest,
    cli_jobs,
    cli_model,
    cli_monitoring,
    cli_presets,
    cli_runs,
)
from orchestration.cli_help import PLAIN, InterruptedByUserError, benches_like, presets_like
from orchestration.cluster import JobFailedError
from shards.errors import UserError
from shards.objects import location

Address = Annotated[
    str | None,
    typer.Option(help="host:port of a running Ray cluster; default RAY_ADDRESS, else a local Ray is started"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change a setting; may be repeated.")
]

INTERRUPTED = "interrupted; the same command continues: what was complete is kept"

app = typer.Typer(
    name="medswav",
    help="Hospital image archives to training shards, and multi-modality SwAV pretraining on them.\n\n"
    "Example: medswav doctor && medswav demo --output demo",
    **PLAIN,
)
app.add_typer(cli_ingest.app, name="ingest")
app.add_typer(cli_presets.app, name="presets")
app.add_typer(cli_checkpoints.app, name="checkpoints")
app.add_typer(cli_jobs.app, name="jobs")
app.add_typer(cli_evaluate.app, name="evaluate")
app.command()(cli_monitoring.monitoring)


@app.command()
def pretrain(
    dataset: Annotated[
        Path | None, typer.Option(help="Dataset folder: the output of `ingest run`.", show_default="required")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints, metrics and the encoder.", show_default="required"),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Preset (`medswav presets`) or YAML file.", autocompletion=presets_like)
    ] = "demo",
    ranks: Annotated[
        str,
        typer.Option(help="Training processes, one a GPU where there are any; 2:8: as many as find a place."),
    ] = "2",
    resize_seconds: Annotated[
        float, typer.Option(min=1, help="With --ranks 2:8: between looks for more nodes.")
    ] = 60.0,
    feeders: Annotated[
        str, typer.Option(help="Augmentation actors of each rank; auto: as the first steps need.")
    ] = "auto",
    overflow_feeders: Annotated[
        int, typer.Option(min=0, help="More of them on other nodes, without GPU.")
    ] = 0,
    set_: Settings = None,
    address: Address = None,
    gpu: Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPUs where there are.")] = None,
    max_failures: Annotated[
        int, typer.Option(help="Restarts of the ranks without a new checkpoint before giving up; -1: no end.")
    ] = 3,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines scrape.")] = "127.0.0.1",
    verbose: Annotated[bool, typer.Option(help="Show Ray's own log lines.")] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Only print what follows from settings, ranks and dataset (if any)."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --explain: as JSON.")] = False,
) -> None:
    """Pretrain an encoder; the same command again continues the run.

    Example: medswav pretrain --preset demo --dataset DATASET --run-dir RUN --set max_steps=500
    """
    from orchestration.elastic import parse_ranks
    from orchestration.pretrain_job import pretrain
    from trainer.config import load_config, text_setting
    from trainer.explain_text import explained
    from trainer.feeding import parse_count

    fewest, most = parse_ranks(ranks)

    own = [] if dataset is None else [text_setting("data.dataset", location(dataset))]
    config = load_config(preset, [*(set_ or []), *own])
    if explain:
        typer.echo(explained(config, most, preset, as_json=as_json))
        return
    if as_json or dataset is None or run_dir is None:
        wanted = "--explain with --json" if as_json else "--dataset" if dataset is None else "--run-dir"
        raise UserError(f"pretrain needs {wanted} (see medswav pretrain --help)")
    result = pretrain(
        config,
        run_dir,
        most,
        parse_count(feeders, "--feeders"),
        overflow=overflow_feeders,
        fewest=fewest,
        resize_seconds=resize_seconds,
        address=address,
        gpu=gpu,
        max_failures=max_failures,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        verbose=verbose,
    )
    if result.finished:
        typer.echo(f"finished {result.step} steps; the encoder is {run_dir / 'encoder.safetensors'}")
    else:
        typer.echo(
            f"stopped at step {result.step}, {'checkpoint saved' if result.step else 'nothing done'}: "
            "the same command continues"
        )
    raise typer.Exit(result.exit_code)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="A medswav command.")],
    address: Annotated[
        str | None, typer.Option(help="Dashboard of the cluster, http://HEAD:8265; default RAY_ADDRESS.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; its jobs are NAME-1, NAME-2 ...")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Submit a failed job again, to resume.")] = 0,
    program: Annotated[str, typer.Option(help="The command `medswav` on the cluster.")] = "medswav",
) -> None:
    """Run a medswav command as a job on a running Ray cluster, with its true exit code.

    Example: medswav submit --address http://HEAD:8265 -- pretrain --dataset DATASET --run-dir RUN
    """
    from orchestration.submit import submit

    raise typer.Exit(submit(command, address, run_id, retries, program))


@app.command("fit-energy")
def fit_energy(
    dataset: Annotated[Path, typer.Option(help="Dataset folder.")],
    output: Annotated[Path, typer.Argument(help="File to write, for views.band_statistics; must be new.")],
    preset: Annotated[str, typer.Option(help="Preset or YAML file of the run it is for.")] = "demo",
    set_: Settings = None,
    images: Annotated[int, typer.Option(min=1, help="Reference images of each modality.")] = 1000,
) -> None:
    """Fit the reference energies of the energy augmentation to a file. Without one, pretrain fits its own.

    Example: medswav fit-energy --preset paper_2d_xray --dataset DATASET energies.json
    """
    from orchestration.fit_energy import fit_energy
    from trainer.config import load_config, text_setting

    config = load_config(preset, [*(set_ or []), text_setting("data.dataset", location(dataset))])
    for name, fitted in fit_energy(config, output, images).items():
        typer.echo(f"{name}: {fitted.count} images")


@app.command()
def probe(
    dataset: Annotated[Path, typer.Option(help="Dataset folder with labels (`ingest label`).")],
    encoder: Annotated[list[Path], typer.Option(help="encoder.safetensors of a run; may be repeated.")],
    labels: Annotated[str, typer.Option(help="Name of the label table.")] = "labels",
    backbone: cli_model.Backbone = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows and summary as JSON.")] = False,
) -> None:
    """AUC of linear probe and kNN on frozen features: pretrained, random-initialised, pixel baseline.

    Example: medswav probe --dataset DATASET --encoder RUN/encoder.safetensors
    """
    from orchestration.probe_job import probe

    typer.echo(probe(dataset, encoder, labels, as_json, backbone=backbone))


cli_model.register(app)  # export, embed, assign
cli_finetune.register(app)
cli_capacity.register(app)  # capacity, simulate
cli_runs.register(app)  # report, ls


@app.command()
def compare(
    plan: Annotated[Path, typer.Argument(help="YAML file: tables, tasks, arms, seeds.")],
    data: Annotated[
        Path, typer.Option(help="Folder of the labelled images, to which the plan's tables lie.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of dataset, runs, scores and tables.")],
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Arms at a time, each with one thread.")] = 2,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Judge each seed on another third of the patients of train; leave test out."
        ),
    ] = False,
    set_: Settings = None,
) -> None:
    """Pretraining methods side by side on labelled images: train, judge, table. Run again, it goes on.

    Example: medswav compare docs/experiments/labelled.yaml --data IMAGES --out COMPARISON
    """
    from orchestration.compare import compare
    from orchestration.compare_plan import load_plan

    chosen = load_plan(plan, set_ or [], arm or [])
    raise typer.Exit(compare(chosen, data, out, tune=tune, jobs=jobs))


@app.command()
def doctor(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Where datasets and runs are to be written."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of checks as JSON.")] = False,
) -> None:
    """Check this machine and these folders, with the fix for each failure; exit code 1 if one fails.

    Example: medswav doctor /lustre/datasets /lustre/runs
    """
    import json

    from orchestration.doctor import run_checks, text_of

    checks = run_checks(folders or ())
    typer.echo(json.dumps([c.as_dict() for c in checks], indent=1) if as_json else text_of(checks))
    raise typer.Exit(1 if any(check.level == "failed" for check in checks) else 0)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of everything that the demo makes.")] = Path("demo"),
    source: Annotated[
        list[Path] | None, typer.Option(help="Your own files instead of generated patients; may be repeated.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV with labels of your files.")] = None,
    set_: Settings = None,
    ranks: Annotated[int, typer.Option(min=1, help="Training processes.")] = 2,
    feeders: Annotated[int, typer.Option(min=1, help="Augmentation actors of each rank.")] = 1,
    patients: Annotated[
        int | None,
        typer.Option(min=2, help="Generated patients of each modality; default: as in `make demo`."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Pretrainings, each with a seed of its own (1); with --task: fine-tunings."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="A clinical task on generated files instead: findings, haemorrhage, metastases."),
    ] = None,
    address: Address = None,
) -> None:
    """The whole path: files to shards, a short pretraining, probes, one HTML report.

    Example: medswav demo --task haemorrhage --output heads
    """
    from orchestration import demo_tasks
    from orchestration.demo import demo

    if task is not None:
        if source or labels is not None:
            raise UserError("--task makes its own files and labels: leave --source and --labels away")
        options = demo_tasks.TaskOptions(
            task,
            output.absolute(),
            patients,
            repeats,
            tuple(set_ or ()),
            ranks,
            feeders,
            address,
        )
        raise typer.Exit(demo_tasks.demo(options))
    code = demo(
        output,
        source or [],
        labels,
        overrides=set_ or [],
        ranks=ranks,
        feeders=feeders,
        patients=patients,
        repeats=repeats or 1,
        address=address,
    )
    raise typer.Exit(code)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="ingest, plan, files, list, catalogue, decoders, augment, read, feed or step.",
            autocompletion=benches_like,
        ),
    ],
    seconds: Annotated[float, typer.Option(help="Measuring time; set-up comes on top.")] = 60.0,
    rows: Annotated[
        float | None, typer.Option(help="plan: rows of the inventory (105e6); catalogue (1e6).")
    ] = None,
    files: Annotated[
        list[float] | None, typer.Option(help="files: a number of files; repeated; default 1e4, 1e5.")
    ] = None,
    convert_up_to: Annotated[
        float | None, typer.Option(help="files: larger numbers are scanned and planned only; default 1e5.")
    ] = None,
    commits: Annotated[float | None, typer.Option(help="list: number of commits; default 2e4.")] = None,
    place: Annotated[
        str | None, typer.Option(help="list: s3://BUCKET/PREFIX to write to; default a local folder.")
    ] = None,
) -> None:
    """Measure this machine: one JSON object per figure, with the baseline measured in the same run.

    Example: medswav bench read --seconds 20
    """
    from orchestration.bench import run

    given = {
        "rows": rows,
        "files": files or None,
        "convert_up_to": convert_up_to,
        "commits": commits,
        "place": place,
    }
    options = {option: value for option, value in given.items() if value is not None}
    own = {
        "plan": {"rows"},
        "catalogue": {"rows"},
        "files": {"files", "convert_up_to"},
        "list": {"commits", "place"},
    }
    if options.keys() - own.get(name, set()):
        raise UserError(
            "--rows is an option of bench plan and catalogue, --files and --convert-up-to of bench files, "
            "--commits and --place of bench list"
        )
    run(name, seconds, options=options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `medswav`."""
    return run_app(app, "medswav", arguments)


def ingest_main(arguments: Sequence[str] | None = None) -> int:
    """The command `ingest`, which is `medswav ingest`."""
    return run_app(cli_ingest.app, "ingest", arguments)


def run_app(application: Callable[..., object], name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a typer application; its exit code. A user's mistake is one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with terminated_as_interrupted():
            code = application(given, prog_name=name, standalone_mode=False)
    except (UserError, JobFailedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except (InterruptedByUserError, KeyboardInterrupt, typer.Abort):
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except typer.TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", name)
        print(f"error: {usage_line(error)} (see {command} --help)", file=sys.stderr)
        return 2
    except Exception as error:
        mistake = _setting_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does; those that have something to save handle both themselves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def usage_line(error: Exception) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split()).rstrip(".")


def _setting_mistake(error: Exception) -> str | None:
    """One line for a pydantic error that no loader has turned into a UserError, without the value."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    first = error.errors(include_input=False, include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    return f"setting {name}: {first['msg']}" if name else first["msg"]


if __name__ == "__main__":
    sys.exit(main())
