"""Past features that join the Sinkhorn problem of a small batch.

Contents are global: every rank holds the same features of all ranks, so a checkpoint of one rank is the
whole queue and loads on any world size. In Sinkhorn each rank scores only its own part of them.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from shards.errors import UserError
from trainer.config import TrainConfig
from trainer.swav.collectives import gather_ranks, rank_and_world


class FeatureQueue:
    """First-in first-out unit features, float32 [groups, assigned crops, length, F]; usable once full.

    length: entries per group and assigned crop over all ranks; a multiple of the global images per group
    (the modalities, or one for all). `filled` counts what was ever enqueued, so fullness needs no look at the
    contents and no host sync.
    """

    def __init__(
        self,
        length: int,
        n_groups: int,
        n_assigned: int,
        feature_dim: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length = length
        self.filled = 0
        self.features = torch.zeros(n_groups, n_assigned, length, feature_dim, device=device)

    @property
    def full(self) -> bool:
        return self.length > 0 and self.filled >= self.length

    def part(self, rank: int, world: int) -> Tensor:
        """The entries that this rank brings into Sinkhorn: [groups, assigned, <= ceil(length / world),
        F].
        """
        return self.features[:, :, rank::world]

    @torch.no_grad()
    def enqueue(self, features: Tensor, group: ProcessGroup | None = None) -> None:
        """Adds the features of all ranks in place of the oldest. Call it after the codes are computed.

        features: [groups, assigned, b, F] of this rank, b equal on all ranks; taken detached, as float32.
        """
        gathered = gather_ranks(features.detach().float(), group)  # [world, M, A, b, F]
        world, _, _, b, _ = gathered.shape
        added = world * b
        if self.length % added:
            raise ValueError(f"queue length {self.length} is no multiple of {added} images per group")
        start = self.filled % self.length
        self.features[:, :, start : start + added] = gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)
        self.filled += added

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only: `features` and `filled` (int64 scalar)."""
        return {"features": self.features.clone(), "filled": torch.tensor(self.filled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Strict; raises UserError for another shape."""
        if state["features"].shape != self.features.shape:
            raise UserError(
                f"the checkpoint's queue is {list(state['features'].shape)} (groups, assigned crops, "
                f"length, features), this run's {list(self.features.shape)}: resume with the same settings"
            )
        self.features.copy_(state["features"])
        self.filled = int(state["filled"])


def build_queue(config: TrainConfig, device: torch.device | str = "cpu") -> FeatureQueue | None:
    """The queue of a run, an equal part of queue_length for each group and assigned crop; None when it is
    switched off, and for another method than SwAV.
    """
    n_groups = len(config.groups)
    length = config.swav.queue_length // n_groups
    if length == 0 or config.method != "swav":
        return None
    return FeatureQueue(length, n_groups, len(config.swav.assign), config.model.feature_dim, device)


def queue_part(queue: FeatureQueue, group: ProcessGroup | None) -> Tensor:
    return queue.part(*rank_and_world(group))
