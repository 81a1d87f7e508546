"""`medswav evaluate`: tables and figures of the paper from runs of `medswav finetune`. Thin, like cli.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli_help import GROUP

if TYPE_CHECKING:
    from orchestration.evaluate_job import Finding

app = typer.Typer(
    help="Tables and figures of the paper from runs of finetune, as PNG, CSV, JSON and one HTML page.\n\n"
    "Example: medswav evaluate fractions --help",
    **GROUP,
)
Runs = Annotated[
    list[str], typer.Argument(metavar="[NAME=]RUN...", help="Folders of finetune; equal names are one arm.")
]
Output = Annotated[Path, typer.Option(help="Folder of tables, figures and the page.")]
Reference = Annotated[
    str | None, typer.Option(help="Arm that the others are compared with. Default: none, or the first.")
]
Fraction = Annotated[float | None, typer.Option(help="Label fraction; default: the largest.")]
AsJson = Annotated[bool, typer.Option("--json", help="What was found as JSON.")]


@app.command()
def fractions(runs: Runs, output: Output, reference: Reference = None, as_json: AsJson = False) -> None:
    """Test metrics by share of the training patients, and what is gained over the reference.

    Example: medswav evaluate fractions none=RUN1 pretrained=RUN2 --output FIGURES
    """
    from orchestration import evaluate_job
    from orchestration.evaluate_runs import read_arms

    _told(evaluate_job.fractions(read_arms(runs), output, reference), output, as_json)


@app.command()
def convergence(runs: Runs, output: Output, reference: Reference = None, as_json: AsJson = False) -> None:
    """Epochs until 98 % of the final best on val, and who is faster.

    Example: medswav evaluate convergence none=RUN1 pretrained=RUN2 --output FIGURES
    """
    from orchestration import evaluate_job
    from orchestration.evaluate_runs import read_arms

    _told(evaluate_job.convergence(read_arms(runs), output, reference), output, as_json)


@app.command()
def curves(
    runs: Runs,
    output: Output,
    metric: Annotated[str | None, typer.Option(help="Default: the one that chose the epochs.")] = None,
    fraction: Fraction = None,
    as_json: AsJson = False,
) -> None:
    """A metric by epoch on val, and on test where finetune.evaluate_test was set.

    Example: medswav evaluate curves none=RUN1 pretrained=RUN2 --metric auc --output FIGURES
    """
    from orchestration import evaluate_job
    from orchestration.evaluate_runs import read_arms

    _told(evaluate_job.curves(read_arms(runs), output, metric, fraction), output, as_json)


@app.command()
def robustness(
    runs: Runs,
    output: Output,
    fraction: Fraction = None,
    images: Annotated[int, typer.Option(min=1, help="Test images of cases.")] = 50,
    transforms: Annotated[int, typer.Option(min=1, help="Random transforms of each.")] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """How much a case's probability moves when its image is transformed, arms side by side.

    Example: medswav evaluate robustness none=RUN1 pretrained=RUN2 --output FIGURES
    """
    from orchestration import evaluate_robust
    from orchestration.evaluate_runs import read_arms
    from orchestration.finetune_job import chosen_device

    found = evaluate_robust.robustness(
        read_arms(runs),
        output,
        fraction=fraction,
        images=images,
        transforms=transforms,
        device=chosen_device(device),
    )
    _told(found, output, as_json)


@app.command()
def experiment(
    plan: Annotated[Path, typer.Argument(help="YAML file: tables, tasks, arms, seeds, fractions.")],
    output: Annotated[Path, typer.Option(help="Folder of everything that is made.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the labelled images, to which the plan's tables lie.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Instead: a dataset with label tables of the tasks' names.")
    ] = None,
    encoder: Annotated[
        list[Path] | None,
        typer.Option(
            help="Pretrained encoder or run; repeated: seeds take them in turn. Default: made here."
        ),
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time, each with one thread.")] = 2,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change a setting of the plan.")
    ] = None,
) -> None:
    """Tasks x arms x label fractions x seeds: fine-tune, and all tables and figures. Run again, it goes on.

    Example: medswav evaluate experiment docs/experiments/fractions.yaml --data IMAGES --output OUT
    """
    from orchestration.compare_plan import load_as
    from orchestration.experiment import experiment
    from orchestration.experiment_plan import Experiment
    from shards.objects import location

    chosen = load_as(Experiment, plan, set_ or [], arm or [])
    there = None if dataset is None else str(location(dataset))
    code = experiment(chosen, output, data=data, dataset=there, encoders=encoder or (), jobs=jobs)
    raise typer.Exit(code)


def _told(found: "Finding", output: Path, as_json: bool) -> None:
    import json

    from orchestration.evaluate_job import write
    from orchestration.evaluate_page import markdown

    write(found, output)
    if as_json:
        typer.echo(json.dumps(found.tree, indent=1))
        return
    typer.echo("\n".join(markdown(table) for table in found.section.tables))
    typer.echo(f"wrote {output / found.name}.html")
