"""The ranks of `medswav pretrain`: trainer.loop.train in a Ray Train worker, and a mailbox to the driver."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.elastic import preempted
from orchestration.feed import Feed, Feeders, batch_bytes, feeders_here, make_batches
from shards.errors import UserError
from trainer.feeding import Ahead, Pace
from trainer.utilisation import figures, peak_of

if TYPE_CHECKING:
    from trainer.batches import Batch
    from trainer.config import TrainConfig

PAUSE_SECONDS = 0.5


@dataclass
class ControlState:
    """What the ranks told since the last look: metrics of steps, (step, number of ranks) of each start, lines
    for the user, failures of the ranks and the newest error; what ends the job (a user's mistake, a fatal
    error, the result) stays."""

    steps: list[dict[str, float]] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: int = 0
    user_error: str | None = None
    fatal: str | None = None
    error: str | None = None
    result: dict[str, Any] | None = None


class Control:
    """The mailbox between the driver and the ranks: an actor of a few fields, on the driver's node.

    Ranks that end before the last step learn here what they are to do: `end`; `wait` to be replaced by
    another number of ranks; `leave`, because a node of theirs is about to be taken away.
    """

    def __init__(self) -> None:
        self._stop, self._ended = asyncio.Event(), asyncio.Event()
        self._outcome, self._paused_at = "", 0
        self._pausing = False
        self._state = ControlState()
        self._group = ""  # the newest ranks, which the driver's failures and restarts have left

    async def wait_stop(self) -> bool:
        """Returns when a stop is asked for; every rank keeps one call open: asking costs no step time."""
        await self._stop.wait()
        return True

    async def request_stop(self) -> None:
        self._pausing = False
        if self._outcome == "wait":
            self._outcome = "end"
            self._state.result = {"step": self._paused_at, "finished": False}
        self._stop.set()

    async def request_pause(self) -> None:
        """The ranks save after this step, and wait."""
        if not self._stop.is_set():
            self._pausing = True
            self._stop.set()

    async def is_paused(self) -> bool:
        return self._outcome == "wait"

    async def resume(self) -> None:
        """For the ranks that are started next; those that wait are about to be ended."""
        if self._pausing:
            self._pausing, self._stop = False, asyncio.Event()
        self._outcome, self._ended = "", asyncio.Event()

    async def outcome(self) -> str:
        """What the ranks do now; returns when rank 0 has told its result."""
        await self._ended.wait()
        return self._outcome

    async def tell(self, kind: str, value: Any) -> None:
        if kind == "step":
            self._state.steps.append(value)
        elif kind == "start":
            self._outcome, self._ended = "", asyncio.Event()
            self._state.starts.append(value)
        elif kind == "note":
            self._state.notes.append(value)
        elif kind == "group":
            self._group = value
        elif kind == "replaced":
            group, text = value
            if group == self._group:  # by another command; ranks of before, by those that took their place
                self._state.user_error = text
        elif kind == "failure":
            if self._outcome not in ("leave", "wait"):
                self._state.failures += 1
                self._state.error = self._state.error or value
        elif kind == "result":
            self._end(value)
        else:
            setattr(self._state, kind, value)

    def _end(self, result: dict[str, Any]) -> None:
        if result["finished"] or (self._stop.is_set() and not self._pausing):
            self._outcome, self._state.result = "end", result
        else:
            self._outcome = "wait" if self._pausing else "leave"
            self._paused_at = int(result["step"])
            self._state.notes.append(
                f"the ranks saved step {self._paused_at} and make way for a change of the nodes"
            )
        self._ended.set()

    async def drain(self) -> ControlState:
        """What was told; steps, starts, notes and failures are handed out once."""
        state = self._state
        self._state = ControlState(user_error=state.user_error, fatal=state.fatal, result=state.result)
        return state


class LeavingError(Exception):
    """Ends ranks that made way for a node's end: a clean return would end the whole training."""


@dataclass(frozen=True)
class RankSettings:
    """All that a rank needs, in plain values. feeders: None for as many as the rates ask for."""

    config_json: str
    run_dir: str
    feeders: int | None
    overflow: int
    bands: Any
    dataset_fingerprint: str
    labels: Any
    control: Any  # actor handle


def run_rank(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every rank, the process group being there already."""
    import ray
    import ray.train

    from trainer.attempts import ReplacedError
    from trainer.distributed import ReportedError
    from trainer.meter import NotFiniteError

    given: RankSettings = settings["rank"]
    group = os.urandom(8).hex()
    try:
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(given.control.tell.remote("group", group))
        _train(given)
    except ReplacedError as error:
        ray.get(given.control.tell.remote("replaced", (group, str(error))))
        time.sleep(60)
        raise
    except (UserError, NotFiniteError) as error:
        kind = "user_error" if isinstance(error, UserError) else "fatal"
        if not isinstance(error, ReportedError):  # rank 0 tells it
            ray.get(given.control.tell.remote(kind, str(error)))
        time.sleep(60)  # a raise would have Ray Train start the ranks over before the driver ends the job
        raise
    except LeavingError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        ray.get(given.control.tell.remote("error", text))
        raise


def _train(given: RankSettings) -> None:
    import ray.train
    import ray.train.torch
    import torch

    from trainer.compute import host_arrays, step_clock
    from trainer.config import TrainConfig
    from trainer.loop import train
    from trainer.prepare import bands_digest

    config = TrainConfig.model_validate_json(given.config_json)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.threads)
    stop = _watch_stop(given.control)
    arguments = (given.config_json, rank, world, given.bands, given.dataset_fingerprint, given.labels)
    ranks, nbytes = context.get_local_world_size(), batch_bytes(config, world)
    feeders = feeders_here(given.feeders, given.overflow, ranks, nbytes)
    feed = Feed(make_batches, arguments, feeders, config.max_steps, allocate=host_arrays(device))
    control = given.control if rank == 0 else None
    with Ahead(feed, config.max_steps, _pace(given, feeders, control, step_clock(device))) as ahead:
        source = _Source(feed, ahead, control, world, _cost(config, device, world) if rank == 0 else None)
        result = train(
            config,
            source,
            Path(given.run_dir),
            rank=rank,
            world=world,
            device=device,
            dataset_fingerprint=given.dataset_fingerprint,
            bands_digest=bands_digest(given.bands),
            labels=given.labels,
            on_metrics=source.report if rank == 0 else None,
            should_stop=lambda: stop.is_set() or preempted(),
        )
    if rank == 0:
        ended = {"step": result.step, "finished": result.finished}
        ray.get(given.control.tell.remote("result", ended))
    if not result.finished:
        _make_way(given.control)


def _make_way(control: Any) -> None:
    """What a rank does that ended before the last step. Raises LeavingError."""
    import ray

    while (outcome := ray.get(control.outcome.remote())) == "wait":
        if preempted():  # then Ray Train changes no number any more: it waits for these ranks to end
            outcome = "leave"
            break
        time.sleep(PAUSE_SECONDS)  # Ray Train ends this rank
    if outcome == "leave":
        raise LeavingError("a node is about to be taken away")


def _pace(
    given: RankSettings, feeders: Feeders, control: Any | None, clock: Callable[[], float]
) -> Pace | None:
    """What decides on more feeders, unless the user did; rank 0 tells of it."""
    if given.feeders is not None:
        return None

    def say(text: str) -> None:
        if control is not None:
            control.tell.remote("note", f"feeders of rank 0: {text}")

    return Pace(feeders.most + feeders.overflow, say, clock)


def _watch_stop(control: Any) -> threading.Event:
    """An event that the driver sets. When the driver is gone, so is its mailbox: then the rank ends at once,
    and does not go on writing beside the next attempt."""
    import ray

    event = threading.Event()

    def watch() -> None:
        try:
            ray.get(control.wait_stop.remote())
        except ray.exceptions.RayActorError:
            os._exit(1)
        event.set()

    threading.Thread(target=watch, daemon=True).start()
    return event


@dataclass(frozen=True)
class _Cost:
    """Operations of a step on one rank, and the peak of its GPU; None where they are not known."""

    flop: float | None
    peak: float | None


def _cost(config: "TrainConfig", device: Any, world: int) -> _Cost | None:
    """None on a CPU. Networks that are not ours would have to be run to be counted."""
    if device.type != "cuda":
        return None
    import torch

    from trainer.config import OWN_BACKBONES
    from trainer.explain_model import measure_model
    from trainer.precision import kind_on

    if config.model.backbone not in OWN_BACKBONES:
        return _Cost(None, None)
    flop = measure_model(config).flop_per_sample() * config.data.batch_size / world
    peak = peak_of(torch.cuda.get_device_name(device), kind_on(config.precision, device))
    return _Cost(flop, peak)


class _Source:
    """next_batch of a rank; rank 0 also sends what the driver shows and serves, without waiting."""

    def __init__(
        self, feed: Feed, ahead: Ahead, control: Any | None, world: int, cost: "_Cost | None"
    ) -> None:
        self._feed, self._ahead, self._control, self._cost = feed, ahead, control, cost
        self._world = world
        self._loader: dict[str, float] = {}
        self._began = False

    def __call__(self, step: int) -> "Batch":
        if self._control is not None and not self._began:
            self._began = True
            self._control.tell.remote("start", (step, self._world))
        batch = self._ahead(step)
        if self._control is not None:
            self._loader |= {f"loader/{name}": seconds for name, seconds in batch.seconds.items()}
            self._loader |= {f"loader/{name}": float(number) for name, number in batch.reads.items()}
            # Of this rank's part; the parts of the others are like it.
            equal = (len(batch.keys) // len(batch.modalities),) * len(batch.modalities)
            for name, number in zip(batch.modalities, batch.sizes or equal, strict=True):
                seen = self._loader.get(f"samples/{name}", 0.0)
                self._loader[f"samples/{name}"] = seen + float(number * self._world)
            self._loader["loader/depth"] = float(self._feed.depth)
            self._loader["loader/feeders"] = float(self._feed.count)
        return batch

    def report(self, metrics: dict[str, float]) -> None:
        if self._control is None:
            return
        values = {name: float(value) for name, value in metrics.items()} | self._loader
        self._loader = {}
        if self._cost is not None:
            import torch

            values["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
            if self._cost.flop is not None:
                values |= figures(self._cost.flop, values.get("step_seconds", 0.0), self._cost.peak)
        self._control.tell.remote("step", values)
