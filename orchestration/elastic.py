"""Ranks that come and go with the nodes: `medswav pretrain --ranks 2:8`.

Ray Train's elastic policy takes any number of ranks between two bounds. Ours takes those that can share a
batch equally: the batches are then the same at every number. Two more things it knows: a node that is dead or
about to be taken away counts no more, whatever the last survey said; and ranks that are to become more (or
fewer) first save a checkpoint, so that no step is done twice.

Everything that touches Ray's inner parts is here: ray.train.v2._internal of ray 2.60.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from trainer.config import TrainConfig

RESIZE_SECONDS = 60.0  # between two looks for nodes that have come back
SAVE_SECONDS = 300.0  # for the checkpoint before a change of the number of ranks
# For a placement that cannot be (a node died a moment ago, and Ray does not know): Ray's own is 60 s.
START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")


@dataclass(frozen=True)
class Ranks:
    """`sizes`: the numbers of ranks that a run may have, ascending; one number: it is fixed."""

    sizes: tuple[int, ...]

    @property
    def fewest(self) -> int:
        return self.sizes[0]

    @property
    def most(self) -> int:
        return self.sizes[-1]

    @property
    def elastic(self) -> bool:
        return len(self.sizes) > 1

    def text(self) -> str:
        *others, last = map(str, self.sizes)
        return f"{', '.join(others)} or {last}" if others else last


def parse_ranks(text: str) -> tuple[int, int]:
    """`8` or `2:8` to (fewest, most). Raises UserError."""
    first, colon, second = text.partition(":")
    try:
        bounds = (int(first), int(second) if colon else int(first))
    except ValueError:
        bounds = (0, 0)
    if not 1 <= bounds[0] <= bounds[1]:
        raise UserError(f"--ranks {text} is no number of ranks: give a number, as 8, or two bounds, as 2:8")
    return bounds


def possible_ranks(config: "TrainConfig", fewest: int, most: int) -> Ranks:
    """Those numbers of ranks from `fewest` to `most` that can share a batch. Raises UserError: the fixed
    number cannot, or none of them can."""
    from trainer.config import check_world

    if fewest == most:
        check_world(config, most)
        return Ranks((most,))
    sizes = []
    for size in range(fewest, most + 1):
        try:
            check_world(config, size)
        except UserError as error:
            refused = str(error)
        else:
            sizes.append(size)
    if not sizes:
        raise UserError(f"no number of ranks from {fewest} to {most} fits: {refused}")
    return Ranks(tuple(sizes))


def count_ranks(possible: int, sizes: Sequence[int]) -> int:
    """The largest allowed number that is possible, 0 where there is none."""
    return max((size for size in sizes if size <= possible), default=0)


def lost_nodes() -> set[str]:
    """Ids of the nodes that are dead or being drained."""
    import ray
    from ray._private.state import state

    dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    return dead | set(state.get_draining_nodes() or ())


def preempted() -> bool:
    """In a rank: is a node of the job about to be taken away? Ray Train tells all ranks; no collective."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def elastic_trainer(ranks: Ranks, control: Any, **arguments: Any) -> Any:
    """A TorchTrainer of Ray Train whose number of ranks is any of `ranks`."""
    from ray.train.torch import TorchTrainer

    os.environ.setdefault(*START_TIMEOUT)

    class ElasticTrainer(TorchTrainer):
        def _initialize_and_run_controller(self, **given: Any) -> Any:
            given["scaling_policy"] = whole_batches(self.scaling_config, ranks.sizes, control)
            return super()._initialize_and_run_controller(**given)  # type: ignore[misc]

    return ElasticTrainer(**arguments)


def whole_batches(scaling_config: Any, sizes: Sequence[int], control: Any) -> Any:
    """The policy; it runs in Ray Train's controller. `control`: the mailbox of the ranks."""
    import ray
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        NoopDecision,
        ScalingDecision,
    )

    class WholeBatches(ElasticScalingPolicy):
        def __init__(self) -> None:
            super().__init__(scaling_config)
            self._wanted: ScalingDecision | None = None
            self._asked = self._looked = 0.0

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            lost = lost_nodes()
            left = {node: one for node, one in reserved_resources.items() if node not in lost}
            return count_ranks(super()._count_possible_workers(left), sizes)

        def _get_reserved_resources(self) -> Any:
            """With a fresh look at the cluster: the survey is up to 20 s old."""
            if time.monotonic() - self._looked >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
                self._looked = time.monotonic()
                survey = self._autoscaling_coordinator.get_reserved_resources
                with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                    ray.get(survey.remote(self._requester_id, True), timeout=5)
            return super()._get_reserved_resources()

        def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
            if self._wanted is not None:  # they died while they were asked
                self._go_on()
            return super().make_decision_for_non_running_worker_group()

        def make_decision_for_running_worker_group(self, *state: Any, **more: Any) -> ScalingDecision:
            if self._wanted is None:
                decision = super().make_decision_for_running_worker_group(*state, **more)
                if not isinstance(decision, NoopDecision):
                    self._wanted, self._asked = decision, time.monotonic()
                    control.request_pause.remote()
                return NoopDecision()
            saved = ray.get(control.is_paused.remote(), timeout=30)
            if not saved and time.monotonic() - self._asked < SAVE_SECONDS:
                return NoopDecision()
            decision = self._wanted
            self._go_on()
            return decision

        def _go_on(self) -> None:
            self._wanted = None
            ray.get(control.resume.remote(), timeout=30)

    return WholeBatches()
