"""`medswav bench step`: the training step; what grouped forwards and stacked Sinkhorns are worth."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing import get_context
from torch.nn.functional import normalize

from orchestration.bench import MINIMUM_TURNS, Figure, figure, take_turns
from trainer.config import TrainConfig, load_config
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
SINKHORNS = {"paper": (8, 968, 3000), "demo": (8, 32, 64)}
TWO_RANK_TURNS = 30


class ForwardPerCrop(MultiModalSwav):
    """The baseline: every crop goes through the backbone alone, with batch-norm statistics of its own."""

    def _pool(self, crops: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.backbone(crop.float().div(255)) for group in crops for crop in group])


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
        yield _two_ranks()
    finally:
        torch.set_num_threads(threads)


def _step(net: str, seconds: float) -> Figure:
    config = load_config("demo", (*NETS[net], "precision=fp32"))
    crops = _crops(config)
    sides = {
        "grouped": _stepper(MultiModalSwav, config, crops),
        "each": _stepper(ForwardPerCrop, config, crops),
    }
    took, turns = take_turns(sides, seconds)
    sizes = " + ".join(f"{c.count} x {c.size} px" for c in config.views.crops)
    return figure(
        f"step_{net}",
        1000 * took["grouped"],
        "ms",
        1000 * took["each"],
        "a backbone forward per crop",
        turns,
        f"batch {config.data.batch_size}, crops {sizes}, one thread, fp32; logged metrics left out",
    )


def _crops(config: TrainConfig) -> list[Tensor]:
    """Random uint8 crops [count, n, S, S]: the arithmetic does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    n = config.data.batch_size
    return [
        torch.randint(0, 256, (c.count, n, c.size, c.size), dtype=torch.uint8, generator=generator)
        for c in config.views.crops
    ]


def _stepper(kind: type[MultiModalSwav], config: TrainConfig, crops: list[Tensor]) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = kind(config.model, config.swav, config.data.modalities).train()
    optimizer = build_optimizer(model, config.optim)
    return lambda: train_step(model, optimizer, None, crops, 1, config)


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


def _two_ranks() -> Figure:
    shape = (8, 16, 64)
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
        stacked, each = answers.get()
    return figure(
        "sinkhorn_demo_2_ranks",
        1000 * stacked,
        "ms",
        1000 * each,
        "one Sinkhorn per crop and modality",
        TWO_RANK_TURNS,
        f"{shape[0]} problems of {shape[1]} x {shape[2]} on each of two gloo ranks, 3 collectives against 24",
    )


def _rank(rank: int, folder: str, shape: tuple[int, int, int], answers: Any) -> None:
    """One gloo rank. Both do the same number of turns: the collectives have to meet."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    rendezvous = Path(folder).resolve() / "rendezvous"
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    group, problems = distributed.group.WORLD, _problems(shape)
    sides = {
        "stacked": lambda: sinkhorn_each(problems, 0.03, 3, group),
        "each": lambda: [sinkhorn(p, 0.03, 3, group) for p in problems],
    }
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(TWO_RANK_TURNS // MINIMUM_TURNS):
        for name, seconds in _fixed_turns(sides).items():
            turns[name].append(seconds)
    if rank == 0:
        answers.put(tuple(sorted(turns[name])[len(turns[name]) // 2] for name in ("stacked", "each")))
    distributed.destroy_process_group()


def _fixed_turns(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """MINIMUM_TURNS turns, whatever the clock says."""
    return take_turns(sides, 0.0)[0]
