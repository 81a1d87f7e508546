"""`medswav presets`: which presets there are, and what is known of each."""

import json
from typing import Annotated, Any

import typer

from orchestration.cli_help import GROUP, presets_like

app = typer.Typer(**GROUP | {"no_args_is_help": False})

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.callback(invoke_without_command=True)
def presets(context: typer.Context, as_json: AsJson = False) -> None:
    """List the presets; `medswav presets show NAME` prints one with its command, hardware, time and figure.

    Example: medswav presets show paper_2d_xray
    """
    if context.invoked_subcommand is not None:
        return
    rows = summaries()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(f"{row['name']:22} {row['summary']}")
    typer.echo("\n`medswav presets show NAME`: the command, the hardware, the time, every setting.")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset, or a YAML file.", autocompletion=presets_like)],
    as_json: AsJson = False,
) -> None:
    """Print a preset: its description, then its settings; with --json all settings, with their defaults.

    Example: medswav presets show recommended_2d_xray
    """
    from trainer.config import load_config
    from trainer.preset_files import preset_about, preset_description, preset_text

    text = preset_text(name)
    config = load_config(name)
    if as_json:
        about = {
            "name": name,
            "description": preset_description(name),
            "about": preset_about(name).model_dump(),
        }
        typer.echo(json.dumps(about | {"settings": config.model_dump(mode="json")}, indent=1))
        return
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    typer.echo("\n".join([preset_description(name), "", *settings]).strip())


def summaries() -> list[dict[str, Any]]:
    """A row of each preset."""
    from trainer.config import load_config
    from trainer.preset_files import preset_description, preset_names

    rows = []
    for name in preset_names():
        config = load_config(name)
        rows.append(
            {
                "name": name,
                "summary": preset_description(name).splitlines()[0],
                "backbone": config.model.backbone,
                "modalities": list(config.data.modalities),
                "batch_size": config.data.batch_size,
                "max_steps": config.max_steps,
                "samples": config.max_steps * config.data.batch_size,
            }
        )
    return rows
