"""`medswav bench step`: the training step against the usual one (bench_reference), and the Sinkhorn alone.

Both sides of a step begin with the same weights; that they compute the same loss is checked in the run.
"""

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing import get_context
from torch.nn.functional import normalize

from orchestration.bench import MINIMUM_TURNS, Figure, figure, take_turns
from orchestration.bench_reference import ReferenceStep
from trainer.compute import prepare_network
from trainer.config import TrainConfig, load_config
from trainer.loop import in_parallel
from trainer.optim import build_optimizer
from trainer.step import train_step
from trainer.swav.model import MultiModalSwav
from trainer.swav.sinkhorn import sinkhorn, sinkhorn_each

NETS: dict[str, tuple[str, ...]] = {
    "resnet-tiny": (),
    "resnet50": (
        "model.backbone=resnet50",
        "data.batch_size=16",
        "views.crops=[{count: 2, size: 64, share: [0.3, 1.0]}, {count: 6, size: 32, share: [0.05, 0.3]}]",
    ),
}
# Crops that give codes times modalities, samples with the queue, prototypes: 4 modalities of 2 crops.
LARC = (
    *("precision=fp32", "optim.optimizer=larc-sgd", "optim.learning_rate=0.3", "optim.weight_decay=0.000001"),
    "swav.freeze_prototypes_steps=0",
)
VERSUS = "the usual step: NCHW, a Sinkhorn per crop and modality, LARC by parameter, norms on the host"
SINKHORNS = {"paper": (8, 968, 3000), "demo": (8, 32, 64)}
TWO_RANK_TURNS = 30
TWO_RANK_STEPS = 9


def measure(
    seconds: float,
    nets: Sequence[str] = tuple(NETS),
    sinkhorns: Mapping[str, tuple[int, int, int]] = SINKHORNS,
) -> Iterator[Figure]:
    """Milliseconds of a step on one CPU thread; then the Sinkhorn alone, on one rank and on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for net in nets:
            yield _step(net, 0.4 * seconds / len(nets))
        for name, shape in sinkhorns.items():
            yield _sinkhorn(name, shape, 0.4 * seconds / len(sinkhorns))
        yield from _two_ranks()
    finally:
        torch.set_num_threads(threads)


def _step(net: str, seconds: float) -> Figure:
    config = _config(net)
    sides = _sides(config)
    first = {name: float(step()) for name, step in sides.items()}
    if abs(first["ours"] - first["reference"]) > 1e-4 * first["reference"]:
        raise RuntimeError(f"the two sides compute different losses: {first}")
    took, turns = take_turns({name: partial(_cpu_seconds, step) for name, step in sides.items()}, seconds)
    return _figure(f"step_{net}", took, turns, f"{_described(config)}, seconds of CPU of one thread")


def _cpu_seconds(step: Callable[[], Tensor]) -> float:
    """What one thread needs, whatever else the machine does."""
    start = time.process_time()
    step()
    return time.process_time() - start


def _figure(name: str, took: Mapping[str, float], turns: int, detail: str) -> Figure:
    return figure(name, 1000 * took["ours"], "ms", 1000 * took["reference"], VERSUS, turns, detail)


def _config(net: str) -> TrainConfig:
    return load_config("demo", (*NETS[net], *LARC))


def _described(config: TrainConfig) -> str:
    sizes = " + ".join(f"{c.count} x {c.size} px" for c in config.views.crops)
    return f"batch {config.data.batch_size}, crops {sizes}, LARC, fp32; logged metrics left out"


def _sides(config: TrainConfig, ranks: int = 1) -> dict[str, Callable[[], Tensor]]:
    """A step of each side on the same crops; of several `ranks` on this one of the default group."""
    torch.manual_seed(0)
    core = MultiModalSwav(config.model, config.swav, config.data.modalities).train()
    reference = ReferenceStep(copy.deepcopy(core), config, ranks > 1)
    prepare_network(core, config.model, torch.device("cpu"), world=1)
    model = in_parallel(core, torch.device("cpu")) if ranks > 1 else core
    optimizer, crops = build_optimizer(model, config.optim), _crops(config, ranks)
    group = distributed.group.WORLD if ranks > 1 else None
    return {
        "ours": lambda: train_step(model, optimizer, None, crops, 1, config, group)["loss"],
        "reference": lambda: reference(crops, 1),
    }


def _crops(config: TrainConfig, ranks: int = 1) -> list[Tensor]:
    """Random uint8 crops [count, n, S, S]: the arithmetic does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    n = config.data.batch_size // ranks
    return [
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        for shape in config.views.stack_shapes(n)
    ]


def _problems(shape: tuple[int, int, int]) -> list[Tensor]:
    """Scores of `shape[0]` independent Sinkhorn problems [B, K]."""
    generator = torch.Generator().manual_seed(0)
    count, batch, prototypes = shape
    weights = normalize(torch.randn(prototypes, 64, generator=generator), dim=1)
    return [normalize(torch.randn(batch, 64, generator=generator), dim=1) @ weights.T for _ in range(count)]


def _sinkhorn(name: str, shape: tuple[int, int, int], seconds: float) -> Figure:
    problems = _problems(shape)
    sides = {
        "stacked": lambda: sinkhorn_each(problems, 0.03, 3),
        "each": lambda: [sinkhorn(p, 0.03, 3) for p in problems],
    }
    took, turns = take_turns(sides, seconds)
    return figure(
        f"sinkhorn_{name}_1_rank",
        1000 * took["stacked"],
        "ms",
        1000 * took["each"],
        "one Sinkhorn per crop and modality",
        turns,
        f"{shape[0]} problems of {shape[1]} x {shape[2]}, 3 iterations",
    )


def _two_ranks() -> Iterator[Figure]:
    """The Sinkhorn of the demo's size and its whole step on two gloo ranks of this machine."""
    shape, config = (8, 16, 64), _config("resnet-tiny")
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:
        answers = context.SimpleQueue()
        ranks = [context.Process(target=_rank, args=(r, folder, shape, answers), daemon=True) for r in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        codes = [process.exitcode for process in ranks]
        if codes != [0, 0]:
            for process in ranks:
                process.kill()
            raise RuntimeError(f"the two gloo ranks ended with {codes}")
        sinkhorns, steps = answers.get()
    yield figure(
        "sinkhorn_demo_2_ranks",
        1000 * sinkhorns["stacked"],
        "ms",
        1000 * sinkhorns["each"],
        "one Sinkhorn per crop and modality",
        TWO_RANK_TURNS,
        f"{shape[0]} problems of {shape[1]} x {shape[2]} on each of two gloo ranks, 3 collectives against 24",
    )
    detail = f"{_described(config)}, two gloo ranks of one thread"
    yield _figure("step_resnet-tiny_2_ranks", steps, TWO_RANK_STEPS, detail)


def _rank(rank: int, folder: str, shape: tuple[int, int, int], answers: Any) -> None:
    """One gloo rank. Both do the same number of turns: the collectives have to meet."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    rendezvous = Path(folder).resolve() / "rendezvous"
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    group, problems = distributed.group.WORLD, _problems(shape)
    sinkhorns = _fixed_turns(
        {
            "stacked": lambda: sinkhorn_each(problems, 0.03, 3, group),
            "each": lambda: [sinkhorn(p, 0.03, 3, group) for p in problems],
        },
        TWO_RANK_TURNS,
    )
    steps = _fixed_turns(_sides(_config("resnet-tiny"), ranks=2), TWO_RANK_STEPS)
    if rank == 0:
        answers.put((sinkhorns, steps))
    distributed.destroy_process_group()


def _fixed_turns(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median seconds of each side over so many turns, whatever the clock says."""
    rounds = [take_turns(sides, 0.0)[0] for _ in range(turns // MINIMUM_TURNS)]
    return {name: statistics.median(one[name] for one in rounds) for name in sides}
