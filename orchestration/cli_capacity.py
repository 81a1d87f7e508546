"""`medswav capacity` and `simulate`: what a cluster is to hold and do, before there is one. Thin."""

import json
from pathlib import Path
from typing import Annotated

import typer

from shards.errors import UserError
from shards.objects import location

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change a setting; may be repeated.")
]
Shares = Annotated[
    list[str] | None,
    typer.Option("--share", metavar="ct=.72", help="Repeated; default: D_M."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]

DEFAULT_SHARES = {"ct": 0.72, "mr": 0.25, "us": 0.02, "xr": 0.01}  # of D_M (method.md section 2)

_OF_OPTIONS = ("data.modalities", "data.batch_size")


def register(app: typer.Typer) -> None:
    app.command()(capacity)
    app.command()(simulate)


def capacity(
    gpus: Annotated[int, typer.Option(min=1, help="A rank each.")],
    images: Annotated[float, typer.Option(help="Of all modalities.")] = 105e6,
    share: Shares = None,
    preset: Annotated[str, typer.Option(help="Or a YAML file.")] = "paper_2d_mixed",
    set_: Settings = None,
    measure: Annotated[bool, typer.Option("--measure", help="Rates of a core, now.")] = False,
    dataset: Annotated[Path | None, typer.Option(help="Measure its images.")] = None,
    gpu: Annotated[str, typer.Option(help="Of the docs: v100, h200.")] = "v100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Of a node.")] = 8,
    cores_per_node: Annotated[int | None, typer.Option(min=1, help="Default: 80.")] = None,
    memory_per_node: Annotated[str | None, typer.Option(metavar="SIZE", help="Default: 512GB.")] = None,
    storage_bandwidth: Annotated[str | None, typer.Option(metavar="SIZE/s", help="Of all, 2GB/s.")] = None,
    network_bandwidth: Annotated[str | None, typer.Option(metavar="SIZE/s", help="Of a node.")] = None,
    step_seconds: Annotated[float | None, typer.Option(help="Of such a step.")] = None,
    gpu_rate: Annotated[float | None, typer.Option(help="Samples/s of a GPU.")] = None,
    core_rate: Annotated[float | None, typer.Option(help="Samples/s, all views.")] = None,
    ingest_rate: Annotated[float | None, typer.Option(help="Images/s of a core.")] = None,
    source_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Of an image.")] = None,
    stored_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Of an image.")] = None,
    days: Annotated[float | None, typer.Option(help="What it takes to be done.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time, storage, cores, memory and bandwidth of ingest and pretraining, and what limits them.

    Every figure says where it is from: given, measured, or the docs.

    Example: medswav capacity --images 105e6 --gpus 32 --measure --storage-bandwidth 2GB/s
    """
    from orchestration.capacity_job import Asked
    from orchestration.capacity_job import capacity as reckon
    from orchestration.capacity_rates import GPU_KINDS
    from orchestration.capacity_text import render

    if gpu not in GPU_KINDS:
        raise UserError(
            f"--gpu {gpu}: rates are documented for {' and '.join(GPU_KINDS)}; for others give --step-seconds"
        )
    if dataset is not None and not measure:
        raise UserError("--dataset is what --measure measures: add --measure")
    asked = Asked(
        images=whole("--images", images),
        shares=parse_shares(share),
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        preset=preset,
        settings=set_ or [],
        dataset="" if dataset is None else location(dataset),
        measure=measure,
        gpu_kind=gpu,
        cores_per_node=cores_per_node,
        memory_per_node=memory_per_node,
        storage_bandwidth=storage_bandwidth,
        network_bandwidth=network_bandwidth,
        step_seconds=step_seconds,
        per_gpu=gpu_rate,
        per_core=core_rate,
        ingest_per_core=ingest_rate,
        source_bytes=source_bytes,
        stored_bytes=stored_bytes,
        days=days,
    )
    found = reckon(asked)
    typer.echo(json.dumps(found, indent=1) if as_json else render(found))


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
