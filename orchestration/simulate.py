"""`medswav simulate`: the plan of a run over any number of samples, held to its promises. No pixels are read.

Every step's global batch goes through trainer.batches.plan_batch itself, as one process would hold it; some
of the steps (the first and last, those where a pass ends, random ones) are planned once more for every rank
of several world sizes. The memory is a byte for each sample of the passes that are open.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.sandbox import process_usage
from shards.errors import UserError
from shards.order import lane_steps
from trainer.batches import blocks_of, plan_batch, plan_steps
from trainer.config import DataConfig
from trainer.sampling import sampling_weights

Part = Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]  # of a rank: (indices, passes) by modality
Plan = Callable[[int, Mapping[str, int], DataConfig, int, int, int], Part]

PlanMany = Callable[[range, Mapping[str, int], DataConfig, int, int, int], Part]  # int64[steps, n]

_MANY = 8  # steps that are planned at once: numpy is slow on short arrays
_TOLD = 3  # of the ways in which one promise is broken
_ELASTIC = (8, 2, 8)  # world sizes of a run that is stopped twice
_PROMISES = {
    "equal": "every batch holds B/M of each modality, every rank an equal part of it",
    "pass": "a pass has every sample exactly once, and at most one other pass is open",
    "overlap": "no sample is with two ranks of a step",
    "world": "the global batch does not depend on the number of ranks",
    "blocks": "what a rank reads lies in the blocks of few groups",
    "elastic": "stopped and continued on 8, 2, 8 ranks: no sample lost or twice",
}


@dataclass
class Check:
    """One promise: how often it was looked at, and the first ways in which it was broken."""

    promise: str
    looked: int = 0
    broken: int = 0
    first: list[str] = field(default_factory=list)

    def expect(self, held: bool, otherwise: str) -> None:
        self.looked += 1
        if not held:
            self.broken += 1
            if len(self.first) < _TOLD:
                self.first.append(otherwise)


@dataclass
class Simulation:
    """What was run, the checks by name, and what it took; bytes are those of the process (VmHWM)."""

    counts: Mapping[str, int]
    ranks: int
    steps: int
    draws: int
    checks: dict[str, Check]
    passes: dict[str, int]  # whole passes, by modality
    blocks: dict[str, float]  # see _locality
    block_samples: int
    worlds: tuple[int, ...]
    planned_again: int  # steps
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def held(self) -> bool:
        return not any(check.broken for check in self.checks.values())

    def as_dict(self) -> dict[str, Any]:
        return {"held": self.held, **asdict(self)}


def split_samples(samples: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`samples` shared out over modalities by largest remainder. Raises UserError: not one for each."""
    total = sum(shares.values())
    exact = {m: samples * share / total for m, share in shares.items()}
    counts = {m: int(n) for m, n in exact.items()}
    by_remainder = sorted(exact, key=lambda m: counts[m] - exact[m])
    for m in by_remainder[: samples - sum(counts.values())]:
        counts[m] += 1
    empty = [m for m, n in counts.items() if n < 1]
    if empty:
        raise UserError(f"{samples} samples leave none for {empty[0]}: raise --samples or its --share")
    return counts


def steps_of_a_pass(counts: Mapping[str, int], data: DataConfig) -> int:
    """Steps after which every sample of every modality was drawn at least once."""
    weights = sampling_weights(data, counts)
    of_a_step = {m: data.batch_size * w / sum(weights) for m, w in zip(data.modalities, weights, strict=True)}
    uneven = data.sampling != "equal"  # then a step holds a few images more or less than its share
    return max(int(np.ceil(counts[m] / n)) for m, n in of_a_step.items()) + uneven


def simulate(
    counts: Mapping[str, int],
    data: DataConfig,
    ranks: int,
    steps: int | None = None,
    seed: int = 0,
    plan: Plan = plan_batch,
    plan_many: PlanMany | None = plan_steps,
    again: int = 32,
    window: int = 1024,
    progress: Callable[[int], None] = lambda step: None,
) -> Simulation:
    """Run `plan` from step 0 and hold it to every promise.

    steps: None goes on until every modality had a whole pass. again: so many steps are planned for each rank
    of several world sizes too. window: steps over which the reads of a rank are looked at, for orders without
    virtual ranks. Raises UserError for a number of ranks that cannot share a batch.
    """
    began, cpu = time.perf_counter(), time.process_time()
    unit = data.per_modality if data.sampling == "equal" else data.batch_size
    if unit % ranks:
        raise UserError(f"{ranks} ranks cannot share {unit} images equally: use a divisor of {unit}")
    checks = {name: Check(promise) for name, promise in _PROMISES.items()}
    many = plan_many if data.sampling == "equal" else None
    one = _Planned(plan, many, counts, data, seed)
    passes = {m: _Passes(m, n, checks["pass"]) for m, n in counts.items()}
    done, ends = _walk(one, passes, checks["equal"], steps, progress)
    worlds = tuple(sorted({w for w in (2, 8, ranks // 2, ranks) if w > 0 and unit % w == 0}, reverse=True))
    looked = _chosen(done, ends, again, seed)
    for step in looked:
        _compare_worlds(one, step, worlds, checks)
    for step in looked[:: max(len(looked) // 4, 1)]:
        _stop_and_go(one, step, unit, checks["elastic"])
    return Simulation(
        counts=dict(counts),
        ranks=ranks,
        steps=done,
        draws=sum(each.draws for each in passes.values()),
        checks=checks,
        passes={m: each.whole for m, each in passes.items()},
        blocks=_locality(one, ranks, min(window, done), checks["blocks"]),
        block_samples=data.order.block_samples,
        worlds=worlds,
        planned_again=len(looked),
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu,
        peak_bytes=process_usage(os.getpid())[1],
    )


@dataclass(frozen=True)
class _Planned:
    plan: Plan
    many: PlanMany | None
    counts: Mapping[str, int]
    data: DataConfig
    seed: int

    def part(self, step: int, rank: int, world: int) -> Part:
        return self.plan(step, self.counts, self.data, self.seed, rank, world)

    def whole(self, first: int, end: int) -> Iterator[Part]:
        """The global batches of steps [first, end), planned together where that is possible."""
        if self.many is None:
            yield from (self.part(step, 0, 1) for step in range(first, end))
            return
        found = self.many(range(first, end), self.counts, self.data, self.seed, 0, 1)
        for row in range(end - first):
            yield {m: (index[row], number[row]) for m, (index, number) in found.items()}

    def parts(self, step: int, world: int) -> list[Part]:
        return [self.part(step, rank, world) for rank in range(world)]

    def draws(self, parts: Sequence[Part], modality: str) -> NDArray[np.int64]:
        """pass * samples + index of each draw, part after part: a number for each sample of each pass."""
        of = [part[modality] for part in parts if modality in part]
        draws = [number * self.counts[modality] + index for index, number in of]
        return np.concatenate([np.empty(0, np.int64), *draws])

    def even(self, part: Part, world: int) -> bool:
        """Has a rank its part of a batch? Of each modality with sampling=equal, else of all together."""
        sizes = _sizes(part)
        if list(sizes) != list(self.data.modalities):
            return False
        if self.data.sampling == "equal":
            return set(sizes.values()) == {self.data.per_modality // world}
        return min(sizes.values()) > 0 and sum(sizes.values()) * world == self.data.batch_size


def _walk(
    one: "_Planned",
    passes: Mapping[str, "_Passes"],
    equal: Check,
    steps: int | None,
    progress: Callable[[int], None],
) -> tuple[int, list[int]]:
    """Every global batch in turn: the number of steps, and those in which a pass ends."""
    ends: list[int] = []
    most = 2 * steps_of_a_pass(one.counts, one.data) if steps is None else steps
    batches = chain.from_iterable(
        one.whole(first, min(first + _MANY, most)) for first in range(0, most, _MANY)
    )
    for step, batch in enumerate(batches):
        equal.expect(one.even(batch, 1), f"step {step}: {_sizes(batch)}")
        ended = [passes[m].add(step, *batch[m]) for m in one.counts if m in batch]
        if any(ended):
            ends.append(step)
        progress(step + 1)
        if steps is None and any(ended) and all(each.whole for each in passes.values()):
            break
    for each in passes.values():
        each.close(whole=steps is None)
    return step + 1, ends


class _Passes:
    """Which samples of a modality the open passes have drawn: a byte each, dropped with a whole pass."""

    def __init__(self, modality: str, count: int, check: Check) -> None:
        self._name, self._count, self._check = modality, count, check
        self._open: dict[int, tuple[NDArray[np.bool_], int]] = {}  # pass: seen, number of draws
        self.draws, self.whole = 0, 0

    def add(self, step: int, index: NDArray[np.int64], number: NDArray[np.int64]) -> bool:
        """Note what a step draws; does a pass end in it?"""
        if not len(index):
            return False
        inside = index.min() >= 0 and index.max() < self._count
        self._check.expect(
            bool(inside), f"step {step}: {self._name} has no sample {index.min()} to {index.max()}"
        )
        if not inside:
            return False
        low, high = int(number.min()), int(number.max())
        ended = False
        for each in range(low, high + 1):
            drawn = index if low == high else index[number == each]
            self._mark(step, each, drawn)
            ended |= self._finish(each)
        self.draws += len(index)
        return ended

    def _mark(self, step: int, number: int, index: NDArray[np.int64]) -> None:
        if number not in self._open:
            self._check.expect(
                number <= self.whole + 1,
                f"step {step}: {self._name} begins pass {number} in pass {self.whole}",
            )
            fresh = np.zeros(self._count, np.bool_)
            self._open[number] = (fresh, 0)
        seen, draws = self._open[number]
        seen[index] = True
        self._open[number] = (seen, draws + len(index))

    def _finish(self, number: int) -> bool:
        seen, draws = self._open[number]
        if draws < self._count:
            return False
        del self._open[number]
        missing = self._count - int(np.count_nonzero(seen))
        self.whole += 1
        self._check.expect(
            missing == 0 and draws == self._count,
            f"{self._name}, pass {number}: {draws} draws of {self._count} samples, {missing} never drawn",
        )
        return True

    def close(self, whole: bool) -> None:
        """Of unfinished passes: nothing twice. whole: there is to be a finished one."""
        for number, (seen, draws) in self._open.items():
            twice = draws - int(np.count_nonzero(seen))
            self._check.expect(twice == 0, f"{self._name}, pass {number}: {twice} samples twice")
        if whole:
            self._check.expect(self.whole > 0, f"{self._name}: {self.draws} draws and no whole pass")


def _compare_worlds(one: _Planned, step: int, worlds: Sequence[int], checks: Mapping[str, Check]) -> None:
    whole = one.part(step, 0, 1)
    *_, walked = one.whole(step - step % _MANY, step + 1)
    for m in one.counts:
        same = np.array_equal(one.draws([walked], m), one.draws([whole], m))
        checks["world"].expect(same, f"step {step}: {m} is another when planned with its neighbours")
    for world in worlds:
        parts = one.parts(step, world)
        odd = [rank for rank, part in enumerate(parts) if not one.even(part, world)]
        where = f"step {step}, {world} ranks"
        checks["equal"].expect(not odd, f"{where}: rank {odd[0] if odd else 0} has an unequal part")
        for m in one.counts:
            sizes = [_sizes(part).get(m, 0) for part in parts]
            checks["equal"].expect(
                max(sizes) - min(sizes) <= 1, f"{where}: {m} by rank {min(sizes)} to {max(sizes)}"
            )
            drawn, batch = one.draws(parts, m), one.draws([whole], m)
            checks["overlap"].expect(len(np.unique(drawn)) == len(drawn), f"{where}: {m}")
            if one.data.sampling != "equal":  # a rank has every world-th image: another order, the same batch
                drawn, batch = np.sort(drawn), np.sort(batch)
            checks["world"].expect(np.array_equal(drawn, batch), f"{where}: {m}")


def _stop_and_go(one: _Planned, start: int, unit: int, check: Check) -> None:
    """Steps from `start` on with 8, then 2, then 8 ranks, against one process that did them all."""
    worlds = [w if unit % w == 0 else 1 for w in _ELASTIC]
    stretch = 2
    whole = [one.part(start + n, 0, 1) for n in range(stretch * len(worlds))]
    parts = [
        part
        for n, world in enumerate(worlds)
        for k in range(stretch)
        for part in one.parts(start + stretch * n + k, world)
    ]
    for m in one.counts:
        ours = np.sort(one.draws(parts, m))
        held = np.array_equal(ours, np.sort(one.draws(whole, m))) and len(np.unique(ours)) == len(ours)
        check.expect(held, f"steps {start} to {start + len(whole) - 1}: {m}")


def _locality(one: _Planned, ranks: int, window: int, check: Check) -> dict[str, float]:
    """Samples that a rank reads from a block of neighbours, by modality; 1: each is a place of its own.

    Over the steps in which a virtual rank reads a group of blocks, or over `window` steps where the order has
    no virtual ranks. The check: a run of n draws lies in at most n / (samples of a group) + 1 groups, and one
    more where a pass ends; a block at the end of the catalogue is ragged, and so many samples go astray.
    """
    data, order = one.data, one.data.order
    found: dict[str, list[float]] = {m: [] for m in one.counts}
    blocks = blocks_of(data) if data.sampling == "equal" else None
    runs = {
        m: window if blocks is None else lane_steps(n, data.per_modality, data.lanes, blocks)
        for m, n in one.counts.items()
    }
    for rank in sorted({0, ranks // 2, ranks - 1}):
        parts = [one.part(step, rank, ranks) for step in range(max(runs.values()))]
        for m, run in runs.items():
            index = one.draws(parts[:run], m) % one.counts[m]
            touched = len(np.unique(index // order.block_samples))
            found[m].append(len(index) / max(touched, 1))
            if blocks is not None:
                lanes = max(data.lanes // ranks, 1)
                groups = -(-len(index) // (lanes * blocks.window)) + 2
                most = lanes * groups * blocks.per_group + blocks.samples
                check.expect(
                    touched <= most, f"rank {rank}: {len(index)} {m} in {touched} blocks, not {most}"
                )
    return {m: float(np.mean(values)) for m, values in found.items()}


def _chosen(steps: int, ends: Sequence[int], number: int, seed: int) -> list[int]:
    """The first and the last step, ends of passes and the steps after them, and random ones."""
    around = [s for end in _spread(ends, number // 4) for s in (end, end + 1)]
    random = np.random.default_rng(seed).integers(0, steps, number).tolist()
    wanted = [0, steps - 1, *around, *random]
    return sorted(dict.fromkeys(s for s in wanted[:number] if s < steps))


def _spread(items: Sequence[int], most: int) -> list[int]:
    return list(items) if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def _sizes(part: Part) -> dict[str, int]:
    return {m: len(index) for m, (index, _) in part.items()}


def render(found: Simulation) -> str:
    """A screen for people."""
    return "\n".join(_lines(found))


def _lines(found: Simulation) -> Iterator[str]:
    counts = ", ".join(f"{m} {n:,}" for m, n in found.counts.items())
    yield f"{sum(found.counts.values()):,} samples ({counts}), {found.ranks} ranks"
    yield f"{found.steps:,} steps, {found.draws:,} draws; whole passes: " + ", ".join(
        f"{m} {n:,}" for m, n in found.passes.items()
    )
    worlds = ", ".join(str(world) for world in found.worlds)
    yield f"{found.planned_again} of the steps planned again for each rank of {worlds} ranks"
    for check in found.checks.values():
        state = "held" if not check.broken else f"BROKEN {check.broken:,} times"
        yield f"  {state:8} {check.promise} ({check.looked:,} looks)"
        yield from (f"           {text}" for text in check.first)
    blocks = ", ".join(f"{m} {n:.1f}" for m, n in found.blocks.items())
    yield f"samples that a rank reads from a block of {found.block_samples} neighbours: {blocks}"
    yield (
        f"{found.seconds:.1f} s ({found.cpu_seconds:.1f} s of one core), peak memory "
        f"{found.peak_bytes / 1e6:.0f} MB (VmHWM)"
    )
