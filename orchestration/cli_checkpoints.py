"""`medswav checkpoints`: which ones a run has, whether they verify, and why each is kept."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli_help import GROUP
from shards.errors import UserError

if TYPE_CHECKING:
    from trainer.checkpoint_files import Listed

app = typer.Typer(help="The checkpoints of a run.\n\nExample: medswav checkpoints ls RUN", **GROUP)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `medswav pretrain`.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command()
def ls(run: Run, as_json: AsJson = False) -> None:
    """List the checkpoints: step, bytes, age, attempt, state, why it is kept. Sizes are compared, no hashes.

    Example: medswav checkpoints ls RUN
    """
    typer.echo(_shown(listed(run, deep=False), "sizes", as_json))


@app.command()
def verify(run: Run, as_json: AsJson = False) -> None:
    """Hash every file of every checkpoint against its manifest; exit code 1 when one does not verify.

    Example: medswav checkpoints verify RUN
    """
    rows = listed(run, deep=True)
    typer.echo(_shown(rows, "verified", as_json))
    raise typer.Exit(1 if any(row.trouble is not None for row in rows) else 0)


def listed(run: Path, *, deep: bool) -> "list[Listed]":
    """Ascending by step. Raises UserError where there are none."""
    from trainer.checkpoint_files import list_steps, listing

    if not list_steps(run):
        raise UserError(f"{run} has no checkpoints: give the --run-dir of `medswav pretrain`")
    keep, keep_every = _settings(run)
    return listing(run, keep, keep_every, time.time(), deep=deep)


def _settings(run: Path) -> tuple[int, int | None]:
    """checkpoint.keep and keep_every_steps of the newest checkpoint that can be read."""
    from trainer.checkpoint_files import STATE, list_steps, path_of
    from trainer.config import CheckpointConfig

    for step in reversed(list_steps(run)):
        try:
            given = json.loads((path_of(run, step) / STATE).read_bytes())["config"]["checkpoint"]
            config = CheckpointConfig.model_validate(given)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return config.keep, config.keep_every_steps
    default = CheckpointConfig()
    return default.keep, default.keep_every_steps


def _shown(rows: "list[Listed]", good: str, as_json: bool) -> str:
    if as_json:
        return json.dumps([_plain(row, good) for row in rows], indent=1)
    lines = [f"{'step':>10} {'bytes':>14} {'age':>8} {'attempt':>7}  {'state':10} kept"]
    for row in rows:
        size = "-" if row.bytes is None else str(row.bytes)
        age = "-" if row.age_seconds is None else _duration(row.age_seconds)
        attempt = "-" if row.attempt is None else str(row.attempt)
        state = f"{good:10}" if row.trouble is None else f"BAD: {row.trouble};"
        lines.append(f"{row.step:>10} {size:>14} {age:>8} {attempt:>7}  {state} {row.why}")
    bad = sum(row.trouble is not None for row in rows)
    word = "verify" if good == "verified" else "have the sizes of their manifests"
    lines.append(f"{len(rows) - bad} of {len(rows)} {word}")
    return "\n".join(lines)


def _plain(row: "Listed", good: str) -> dict[str, Any]:
    return asdict(row) | {"checked": good}


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
