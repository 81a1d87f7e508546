"""Batches for one rank, made ahead of time by restartable actors on the rank's own node.

A batch is a pure function of its step number, so any actor can make any batch: actors are cattle, and a
killed one is started again by Ray, which also repeats the calls that it owed. The consumer reads the
references in submission order, copies the arrays once and drops the reference.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestration.cluster import pin_threads, runtime_env
from shards.errors import UserError

if TYPE_CHECKING:  # the trainer's data side; imports no torch
    from trainer.batches import Batch
    from trainer.config import TrainConfig
    from trainer.labels import LabelSet

DEPTH = 3  # batches ahead of a rank: more only fills the object store
BATCH_TIMEOUT_SECONDS = 900.0

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
        return self._make(step)


class Feed:
    """`feed(step)` gives the batch of `step`; steps are asked for in rising order, from any first one.

    factory(*args) makes the batch function inside each actor; `feeders` actors take the steps in turn.
    `stop`: the first step that is never asked for. Close it, or leave its `with` block, to end the actors.
    """

    def __init__(
        self,
        factory: Callable[..., MakeBatch],
        args: Sequence[Any],
        feeders: int,
        stop: int,
        depth: int = DEPTH,
        cpus: float = 0.0,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = ray.get_runtime_context().get_node_id()
        # Across nodes a batch costs twice as much. The affinity takes the actor out of the rank's placement
        # group, and a node that is full would let it wait for ever: it asks for no CPU of its own, because
        # the rank has reserved those of its actors (rank_resources).
        actor: Any = ray.remote(Augmenter).options(
            num_cpus=cpus,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env=runtime_env(),
        )
        self._actors: list[Any] = [actor.remote(factory, tuple(args)) for _ in range(feeders)]
        self._pending: deque[tuple[int, Any]] = deque()
        self._next, self._stop, self._depth = 0, stop, max(depth, feeders)

    @property
    def depth(self) -> int:
        """Batches asked for and not yet read."""
        return len(self._pending)

    def ready(self, timeout: float = 120.0) -> list[dict[str, Any]]:
        """Wait until every actor runs. Raises ray.exceptions.GetTimeoutError, RayActorError."""
        import ray

        return ray.get([a.ready.remote() for a in self._actors], timeout=timeout)

    def __call__(self, step: int) -> "Batch":
        import ray

        if not self._pending or self._pending[0][0] != step:
            self._pending.clear()  # the first call, or a jump: what was in the making is of no use
            self._next = step
        self._fill()
        _, reference = self._pending.popleft()
        try:
            batch: Batch = ray.get(reference, timeout=BATCH_TIMEOUT_SECONDS)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):  # without the actor's traceback
                raise UserError(str(error.cause)) from None
            raise
        copied = replace(batch, crops=tuple(crop.copy() for crop in batch.crops))
        del batch, reference  # the copy is ours: free the object store before the next batch is asked for
        self._fill()
        return copied

    def _fill(self) -> None:
        while len(self._pending) < self._depth and self._next < self._stop:
            actor = self._actors[self._next % len(self._actors)]
            self._pending.append((self._next, actor.batch.remote(self._next)))
            self._next += 1

    def close(self) -> None:
        import ray

        self._pending.clear()
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def rank_resources(feeders: int, use_gpu: bool) -> dict[str, float]:
    """What Ray reserves for a rank: itself and its augmentation actors, which so always have a place."""
    return {"CPU": 1.0 + feeders} | ({"GPU": 1.0} if use_gpu else {})


def batch_bytes(config: "TrainConfig", world: int) -> int:
    """Bytes of the uint8 crops of one batch of one rank."""
    images = config.data.batch_size // world
    return images * config.model.in_channels * sum(c.count * c.size**2 for c in config.views.crops)


def object_store_bytes(config: "TrainConfig", world: int, depth: int, at_least: int) -> int:
    """A local object store in which the batches in flight fill less than half (unbounded ones spill)."""
    return max(at_least, round(2.5 * world * (depth + 1) * batch_bytes(config, world)))
