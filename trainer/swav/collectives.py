"""The few collectives of the method, each a no-op in a single process.

`group=None` is the default group when torch.distributed is initialised, and this process alone when it is
not.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduced sum, in place where there is more than one rank."""
    if rank_and_world(group)[1] > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def gather_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] of equal shape on every rank to [world, ...] on all of them; carries no gradient."""
    _, world = rank_and_world(group)
    if world == 1:
        return x.unsqueeze(0)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)
