"""The few collectives of the method, each a no-op in a single process.

`group=None` is the default group when torch.distributed is initialised, and this process alone when it is
not.
"""

from typing import Any

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


def gather_with_gradient(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`gather_ranks` through which every rank's losses reach the x of all ranks."""
    gathered: Tensor = _Gather.apply(x, group)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return gather_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rank, _ = rank_and_world(ctx.group)
        return sum_over_ranks(gradients[0].clone(), ctx.group)[rank], None
