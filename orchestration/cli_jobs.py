"""`medswav jobs`: what runs on a cluster. Thin, like cli.py."""

from typing import Annotated

import typer

from orchestration.cli_help import GROUP

app = typer.Typer(help="The jobs of a cluster: list, output, stop.\n\nExample: medswav jobs ls", **GROUP)
Address = Annotated[
    str | None, typer.Option(help="Dashboard of the cluster, http://HEAD:8265; default RAY_ADDRESS.")
]
Name = Annotated[str, typer.Argument(help="A run (`submit --run-id`), or one of its jobs.")]


@app.command("ls")
def list_(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list as JSON.")] = False,
) -> None:
    """Run, job, state, exit code, start, duration, command; oldest first.

    Example: medswav jobs ls --address http://HEAD:8265
    """
    from orchestration.job_list import list_jobs

    typer.echo(list_jobs(address, as_json))


@app.command()
def logs(
    name: Name,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """What a job printed; of a run, its newest job.

    Example: medswav jobs logs north --follow
    """
    from orchestration.job_list import show_log

    show_log(address, name, follow)


@app.command()
def stop(name: Name, address: Address = None) -> None:
    """Stop a job; a pretraining saves a checkpoint first. The same `submit` goes on with the run.

    Example: medswav jobs stop north
    """
    from orchestration.job_list import stop

    stop(address, name)
