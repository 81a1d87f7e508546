"""Batches for one rank, made ahead of time by restartable actors on the rank's own node.

A batch is a pure function of its step number, so any actor can make any batch: actors are cattle, and a
killed one is started again by Ray, which also repeats the calls that it owed. The consumer reads the
references in submission order, copies the arrays once and drops the reference.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestration.cluster import pin_threads, runtime_env
from shards.errors import UserError
from trainer.feeding import Allocate, copied, most_makers, new_array

if TYPE_CHECKING:  # the trainer's data side; imports no torch
    from trainer.batches import Batch
    from trainer.config import TrainConfig
    from trainer.labels import LabelSet

log = logging.getLogger(__name__)
DEPTH = 3  # batches ahead of a rank with one actor: more only fills the object store
BATCH_TIMEOUT_SECONDS = 900.0
PATIENCE_SECONDS = 15.0  # with a batch of another node, whose death Ray notices after 13 s

MakeBatch = Callable[[int], "Batch"]


def make_batches(
    config_json: str,
    rank: int,
    world: int,
    bands: Any,
    fingerprint: str | None = None,
    labels: Sequence["LabelSet"] | None = None,
) -> MakeBatch:
    """The factory that the actors call: `trainer.batches.BatchMaker` for one rank."""
    from trainer.batches import BatchMaker
    from trainer.config import TrainConfig

    config = TrainConfig.model_validate_json(config_json)
    return BatchMaker(config, rank, world, bands, fingerprint, labels)


class Augmenter:
    """The actor's body. `factory(*args)` gives the function step -> Batch; it runs in the actor."""

    def __init__(self, factory: Callable[..., MakeBatch], args: Sequence[Any]) -> None:
        pin_threads()
        self._make = factory(*args)

    def ready(self) -> dict[str, Any]:
        """Process id and whether torch was imported (it must not be: 300 MB and seconds for nothing)."""
        import os

        return {"pid": os.getpid(), "torch": "torch" in sys.modules}

    def batch(self, step: int) -> "Batch":
        began = time.perf_counter()
        batch = self._make(step)
        return replace(batch, seconds=batch.seconds | {"make": time.perf_counter() - began})


@dataclass
class _Maker:
    """An actor, whether it is on this node, and the batches that it owes. `starting`: until it answers."""

    actor: Any
    local: bool
    owed: int = 0
    starting: Any | None = None


@dataclass(frozen=True)
class _Owed:
    """A batch that was asked for."""

    step: int
    maker: _Maker
    reference: Any


@dataclass(frozen=True)
class Feeders:
    """Actors of one rank: `start` of them to begin with, up to `most` on the rank's node where the rates ask
    for them (most = start: the user's number), and `overflow` more on other nodes without GPU, which are
    asked only when each local one has something to do."""

    start: int = 1
    most: int = 1
    overflow: int = 0


class Feed:
    """`feed(step)` gives the batch of `step`; steps are asked for in rising order, from any first one.

    factory(*args) makes the batch function inside each actor. A step goes to the actor that owes the fewest,
    and at most `depth` + (number of actors - 1) batches are asked for and not read. `stop`: the first step
    that is never asked for. allocate(shape): the uint8 array that pixels are copied to, once, out of the
    object store. Close it, or leave its `with` block, to end the actors.
    """

    def __init__(
        self,
        factory: Callable[..., MakeBatch],
        args: Sequence[Any],
        feeders: int | Feeders,
        stop: int,
        depth: int = DEPTH,
        cpus: float = 0.0,
        allocate: Allocate = new_array,
    ) -> None:
        import ray

        self._feeders = feeders if isinstance(feeders, Feeders) else Feeders(feeders, feeders)
        self._task, self._allocate = (factory, tuple(args)), allocate
        self._node = ray.get_runtime_context().get_node_id()
        self._makers = [self._start(local=True, cpus=cpus) for _ in range(self._feeders.start)]
        self._starting: list[_Maker] = []
        self._pending: deque[_Owed] = deque()
        self._next, self._stop, self._depth = 0, stop, depth
        if self._feeders.most == self._feeders.start:  # the user's number: there is nothing to wait for
            self.grow(self._feeders.start + self._feeders.overflow)

    @property
    def depth(self) -> int:
        """Batches asked for and not yet read."""
        return len(self._pending)

    @property
    def count(self) -> int:
        """Actors at work."""
        return len(self._makers)

    @property
    def overflowing(self) -> int:
        """Of them on other nodes."""
        return sum(not maker.local for maker in self._makers)

    def ready(self, timeout: float = 120.0) -> list[dict[str, Any]]:
        """Wait until every actor runs. Raises ray.exceptions.GetTimeoutError, RayActorError."""
        import ray

        starting: list[Any] = [maker.starting for maker in self._starting]
        ray.get(starting, timeout=timeout)
        self._join()
        return ray.get([maker.actor.ready.remote() for maker in self._makers], timeout=timeout)

    def __call__(self, step: int) -> "Batch":
        if not self._pending or self._pending[0].step != step:
            self._forget()  # the first call, or a jump: what was in the making is of no use
            self._next = step
        self._join()
        self._fill()
        owed = self._pending.popleft()
        batch = self._read(owed)
        crops = tuple(copied(crop, self._allocate) for crop in batch.crops)
        labels = {name: values.copy() for name, values in batch.labels.items()}
        ours = replace(batch, crops=crops, labels=labels)
        del batch, owed  # nothing of it is held: free the object store before the next batch is asked for
        self._fill()
        return ours

    def grow(self, makers: int) -> None:
        """Start actors up to that number, local ones first; each has work from when it answers, so that one
        without a place holds up nothing."""
        makers = min(makers, self._feeders.most + self._feeders.overflow)
        while len(there := [*self._makers, *self._starting]) < makers:
            self._add(local=sum(maker.local for maker in there) < self._feeders.most)

    def interrupt(self) -> None:
        import ray

        for maker in (*self._makers, *self._starting):
            ray.kill(maker.actor)

    def close(self) -> None:
        self.interrupt()
        self._pending.clear()
        self._makers, self._starting = [], []

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _forget(self) -> None:
        self._pending.clear()
        for maker in self._makers:
            maker.owed = 0

    def _add(self, local: bool) -> None:
        maker = self._start(local, cpus=1.0)
        maker.starting = maker.actor.ready.remote()
        self._starting.append(maker)

    def _start(self, local: bool, cpus: float) -> _Maker:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any]
        if local:
            # Across nodes a batch costs twice as much. The affinity takes the actor out of the rank's
            # placement group, and a node that is full would let it wait for ever: those of the start ask for
            # no CPU of their own, because the rank has reserved them (rank_resources).
            here = NodeAffinitySchedulingStrategy(self._node, soft=False)
            options = {"scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
        else:  # one that is lost is replaced, and what it owed is made here
            gpus = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0) > 0]
            others = ",".join(sorted({self._node, *gpus}))
            options = {"label_selector": {"ray.io/node-id": f"!in({others})"}, "max_restarts": 0}
        actor: Any = ray.remote(Augmenter).options(num_cpus=cpus, runtime_env=runtime_env(), **options)
        return _Maker(actor.remote(*self._task), local)

    def _join(self) -> None:
        """Those that answer by now are makers."""
        if not self._starting:
            return
        import ray

        waiting = [maker.starting for maker in self._starting]
        done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        self._makers += [maker for maker in self._starting if maker.starting in done]
        self._starting = [maker for maker in self._starting if maker.starting not in done]

    def _fill(self) -> None:
        while len(self._pending) < self._depth + len(self._makers) - 1 and self._next < self._stop:
            self._pending.append(self._ask(self._next, self._makers))
            self._next += 1

    def _ask(self, step: int, makers: Sequence[_Maker]) -> _Owed:
        maker = min(makers, key=lambda one: (one.owed, not one.local))
        maker.owed += 1
        return _Owed(step, maker, maker.actor.batch.remote(step))

    def _read(self, owed: _Owed) -> "Batch":
        """Wait for a batch. One of another node that is late or lost is made here: it is the same batch."""
        if not owed.maker.local:
            batch = _from_elsewhere(owed.reference)
            if batch is not None:
                owed.maker.owed -= 1
                return batch
            self._replace(owed.maker)
            owed = self._ask(owed.step, self._local)
        batch = _get(owed.reference)
        owed.maker.owed -= 1
        return batch

    def _replace(self, lost: _Maker) -> None:
        """Another actor for one of another node; what it owed is asked of those here."""
        import ray

        self._makers.remove(lost)
        ray.kill(lost.actor)
        self._add(local=False)
        for position, owed in enumerate(self._pending):
            if owed.maker is lost:
                self._pending[position] = self._ask(owed.step, self._local)

    @property
    def _local(self) -> list[_Maker]:
        return [maker for maker in self._makers if maker.local]


def _get(reference: Any) -> "Batch":
    """A batch, its arrays in the object store. Raises UserError without the actor's traceback."""
    import ray

    try:
        batch: Batch = ray.get(reference, timeout=BATCH_TIMEOUT_SECONDS)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    return batch


def _from_elsewhere(reference: Any) -> "Batch | None":
    """A batch of another node, or None where it is late or lost."""
    import ray

    arrived, _ = ray.wait([reference], timeout=PATIENCE_SECONDS)  # that it is made, and on this node
    if not arrived:
        return None
    try:
        return _get(reference)
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        log.info("a batch was lost on its way from another node (%s)", type(error).__name__)
        return None


def rank_resources(feeders: int, use_gpu: bool) -> dict[str, float]:
    """What Ray reserves for a rank: itself and the augmentation actors of its start, which so always have a
    place."""
    return {"CPU": 1.0 + feeders} | ({"GPU": 1.0} if use_gpu else {})


def feeders_here(feeders: int | None, overflow: int, ranks: int, nbytes: int) -> Feeders:
    """The actors of each of the `ranks` of this node, for batches of nbytes. Raises UserError."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (resources,) = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
    store = int(resources.get("object_store_memory", 0))
    return choose_feeders(feeders, overflow, ranks, nbytes, int(resources.get("CPU", 0)), store)


def choose_feeders(
    feeders: int | None, overflow: int, ranks: int, nbytes: int, cpus: int, store: int
) -> Feeders:
    """feeders: the user's number, or None: one, and more as the rates ask for them, within a node's `cpus`.

    The batches in flight have to fit into half of the object store of `store` bytes, because others are
    spilled to disk. Raises UserError where the user's numbers do not fit.
    """
    fit = store // 2 // (ranks * max(nbytes, 1)) - DEPTH
    least = (feeders or 1) + overflow
    if fit < least:
        needed = 2 * (least + DEPTH) * ranks * nbytes
        raise UserError(
            f"the object store of a node has {store >> 20} MiB, and batches for {ranks} ranks of {least} "
            f"feeders each need {(needed >> 20) + 1}: start Ray with a larger --object-store-memory, or use "
            "fewer --feeders or a smaller data.batch_size"
        )
    if feeders is not None:
        return Feeders(feeders, feeders, overflow)
    return Feeders(1, min(most_makers(cpus, ranks), fit - overflow), overflow)


def batch_bytes(config: "TrainConfig", world: int) -> int:
    """Bytes of the uint8 crops of one batch of one rank."""
    images = config.data.batch_size // world
    return images * config.views.crop_values


def object_store_bytes(config: "TrainConfig", world: int, feeders: int, at_least: int) -> int:
    """A local object store in which the batches in flight fill less than half (unbounded ones spill)."""
    return max(at_least, round(2.5 * world * (DEPTH + feeders) * batch_bytes(config, world)))
