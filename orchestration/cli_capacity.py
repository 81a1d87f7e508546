"""`medswav capacity` and `simulate`: what a cluster is to hold and do, before there is one. Thin."""

import json
from typing import Annotated

import typer

from shards.errors import UserError

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change a setting; may be repeated.")
]
Shares = Annotated[
    list[str] | None,
    typer.Option("--share", metavar="ct=.72", help="Part of the images; repeated. Default: those of D_M."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]

DEFAULT_SHARES = {"ct": 0.72, "mr": 0.25, "us": 0.02, "xr": 0.01}  # of D_M (method.md section 2)

_OF_OPTIONS = ("data.modalities", "data.batch_size")


def register(app: typer.Typer) -> None:
    app.command()(simulate)


def simulate(
    samples: Annotated[float, typer.Option(help="Images of all modalities.")] = 105e6,
    ranks: Annotated[int, typer.Option(min=1, help="Training processes.")] = 256,
    share: Shares = None,
    batch_per_rank: Annotated[int, typer.Option(min=1, help="Images of a rank in a step.")] = 32,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default: until every modality had a whole pass.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    set_: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Run the order and the batches of a training without any image, and check every promise of them.

    Exit code 1 where one is broken. Needs a byte a sample, and about 5 minutes for a pass over 105e6 samples.

    Example: medswav simulate --samples 105e6 --ranks 256
    """
    from orchestration.progress import Progress
    from orchestration.simulate import render, simulate, split_samples, steps_of_a_pass
    from shards.settings import apply_override
    from trainer.config_data import DataConfig

    shares = parse_shares(share)
    tree = {"data": {"modalities": list(shares), "batch_size": ranks * batch_per_rank}}
    for item in set_ or []:
        if not item.startswith("data.") or item.startswith(_OF_OPTIONS):
            raise UserError(
                f"--set {item}: only settings data.* decide what a batch holds, and of these --share and "
                "--batch-per-rank are options of their own"
            )
        apply_override(tree, item)
    data = DataConfig.model_validate(tree["data"])
    counts = split_samples(whole("--samples", samples), shares)
    with Progress("simulate", steps or steps_of_a_pass(counts, data), "steps") as progress:
        found = simulate(counts, data, ranks, steps, seed, progress=progress.update)
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else render(found))
    raise typer.Exit(0 if found.held else 1)


def parse_shares(given: list[str] | None) -> dict[str, float]:
    """`ct=.72` ... to {modality: part}; they need not add up to 1. Raises UserError."""
    if not given:
        return dict(DEFAULT_SHARES)
    shares: dict[str, float] = {}
    for item in given:
        name, _, text = item.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not name or name in shares or not 0 < value < float("inf"):
            raise UserError(f"--share {item}: give each modality once with a part above 0, such as ct=.72")
        shares[name] = value
    return shares


def whole(option: str, value: float) -> int:
    """1e6 to 1000000. Raises UserError below 1 and above 10**15."""
    if not 1 <= value <= 1e15:
        raise UserError(f"{option} {value:g}: give a number from 1 to 1e15")
    return int(value)
