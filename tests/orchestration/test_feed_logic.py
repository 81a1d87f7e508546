"""Which actor makes which batch, and what becomes of those of other nodes; with a stand-in for Ray."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestration.feed import Feed, Feeders
from trainer.batches import Batch

NODES = [
    {"NodeID": "here", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}},
    {"NodeID": "gpus", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
    {"NodeID": "spare", "Alive": True, "Resources": {"CPU": 4.0}},
]


class ActorLostError(Exception):
    """Stands for ray.exceptions.RayActorError."""


@dataclass
class Reference:
    """A call of an actor; its value is computed when it is asked for."""

    actor: "Actor"
    call: Callable[[], Any]


@dataclass
class Actor:
    """state: of the whole life of the process: works | late | dead. made: steps asked of it."""

    options: dict[str, Any]
    factory: Callable[..., Any]
    args: tuple[Any, ...]
    state: str = "works"
    starts: bool = True
    made: list[int] = field(default_factory=list)

    @property
    def batch(self) -> SimpleNamespace:
        return SimpleNamespace(remote=self._batch)

    @property
    def ready(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: Reference(self, lambda: {"pid": 1}))

    @property
    def local(self) -> bool:
        return "label_selector" not in self.options

    def _batch(self, step: int) -> Reference:
        self.made.append(step)
        return Reference(self, lambda: self.factory(*self.args)(step))


class FakeRay(ModuleType):
    """What Feed uses of ray, in this process."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.actors: list[Actor] = []
        self.start_elsewhere = True
        self.exceptions = SimpleNamespace(
            RayActorError=ActorLostError, ObjectLostError=KeyError, RayTaskError=ZeroDivisionError
        )

    def nodes(self) -> list[dict[str, Any]]:
        return NODES

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_node_id=lambda: "here")

    def remote(self, _: type) -> SimpleNamespace:
        def options(**given: Any) -> SimpleNamespace:
            def start(factory: Callable[..., Any], args: tuple[Any, ...]) -> Actor:
                actor = Actor(given, factory, args)
                actor.starts = actor.local or self.start_elsewhere
                self.actors.append(actor)
                return actor

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def wait(
        self, references: list[Reference], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Reference], list[Reference]]:
        done = [one for one in references if one.actor.starts and one.actor.state != "late"]
        return done, [one for one in references if one not in done]

    def get(self, reference: Reference, timeout: float | None = None) -> Any:
        if reference.actor.state == "dead":
            raise ActorLostError
        return reference.call()

    def kill(self, actor: Actor) -> None:
        actor.state = "dead"

    @property
    def elsewhere(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.local]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake, util = FakeRay(), ModuleType("ray.util")
    strategies: Any = ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: (node, soft)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.util", util)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    return fake


def counting() -> Callable[[int], Batch]:
    return lambda step: Batch(step, (np.full(4, step % 251, np.uint8),), ("ct",), ("a",), (0,), {})


def read(feed: Feed, steps: "count[int]", number: int) -> None:
    for step in (next(steps) for _ in range(number)):
        batch = feed(step)
        assert batch.step == step and (batch.crops[0] == step % 251).all()


def test_local_actors_come_first_and_all_stay_busy(ray):
    with Feed(counting, (), Feeders(2, 2, overflow=1), stop=100) as feed:
        steps = count()
        read(feed, steps, 1)
        assert feed.count == 3 and feed.overflowing == 1
        first, second, other = ray.actors
        assert (first.local, second.local, other.local) == (True, True, False)
        read(feed, steps, 60)
        assert feed.depth == 5  # three actors and two batches more
        made = [len(actor.made) for actor in ray.actors]
        assert made[0] >= made[1] >= made[2] > 0 and sum(made) == 61 + 5
        assert sorted(step for actor in ray.actors for step in actor.made) == list(range(66))
        assert other.options["label_selector"] == {"ray.io/node-id": "!in(gpus,here)"}
    assert {actor.state for actor in ray.actors} == {"dead"}


@pytest.mark.parametrize("end", ["dead", "late"])
def test_what_another_node_owes_is_made_here_when_it_is_lost_or_late(ray, end):
    with Feed(counting, (), Feeders(1, 1, overflow=1), stop=1000) as feed:
        steps = count()
        read(feed, steps, 10)
        (lost,) = ray.elsewhere
        ray.start_elsewhere = False
        lost.state = end
        read(feed, steps, 20)
        assert lost.state == "dead" and feed.count == 1 and feed.overflowing == 0
        replacement = ray.elsewhere[1]
        assert replacement.made == []  # it has no place yet, and nobody waits for it
        replacement.starts = True
        read(feed, steps, 20)
        assert feed.overflowing == 1 and replacement.made


def test_growth_takes_local_places_first_then_those_of_other_nodes(ray):
    with Feed(counting, (), Feeders(1, 3, overflow=2), stop=1000) as feed:
        steps = count()
        read(feed, steps, 3)
        assert len(ray.actors) == 1  # nothing was measured yet
        for makers, local in ((2, 2), (4, 3), (9, 3)):
            feed.grow(makers)
            read(feed, steps, 5)
            assert (feed.count, feed.count - feed.overflowing) == (min(makers, 5), local)
