"""Batch norms whose statistics are those of several ranks (`model.sync_batchnorm`).

As torch's SyncBatchNorm computes them, but (a) on CPU ranks too, so that the numbers can be tested, and (b)
without its wait for the device in every forward: it drops ranks with an empty batch, which do not occur here.
Mean, variance and count of each rank are gathered and joined by the formula of Chan et al. (1979), because
sums of squares lose digits where the mean is large. One collective in the forward, one in the backward.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from shards.errors import UserError
from trainer.swav.collectives import gather_ranks, sum_over_ranks

_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NODE_VARIABLES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


class SyncedBatchNorm(_BatchNorm):
    """Takes [n, C, ...]; n may differ between ranks but is not 0. Evaluates as any batch norm."""

    group: ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        running: tuple[Tensor | None, Tensor | None] = None, None
        if self.track_running_stats:  # switched off where a batch is looked at twice
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            running = self.running_mean, self.running_var
        out: Tensor = _Synced.apply(x, self.weight, self.bias, *running, self.momentum, self.eps, self.group)
        return out


def synchronise(module: nn.Module, group: ProcessGroup | None) -> None:
    """Turn every batch norm below `module` into a synchronised one over the ranks of `group` (None: all).

    In place; parameters, buffers and their names stay. Raises UserError for one of another kind.
    """
    for path, child in list(module.named_modules()):
        if not isinstance(child, _BatchNorm):
            continue
        plain = child.affine and child.track_running_stats and child.momentum is not None
        if type(child) not in _CONVERTED or not plain:
            raise UserError(
                f"model.sync_batchnorm cannot take {path}, a {type(child).__name__}, which is no plain "
                "batch norm: set it to off, or choose another backbone"
            )
        new = SyncedBatchNorm(child.num_features, child.eps)
        new.momentum = child.momentum
        for name, value in (*child.named_parameters(), *child.named_buffers()):
            setattr(new, name, value)
        new.group = group
        new.train(child.training)
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, new)


def node_group(device: torch.device) -> ProcessGroup:
    """The ranks of this rank's node; every rank calls it. Raises UserError, on all ranks alike."""
    own = torch.tensor([int(os.environ.get(name, "-1")) for name in NODE_VARIABLES], device=device)
    everyone = [(int(local), int(size)) for local, size in gather_ranks(own, None).tolist()]
    nodes = node_ranks(everyone)
    groups = [dist.new_group(ranks) for ranks in nodes]  # every rank makes every group, in the same order
    return next(g for g, ranks in zip(groups, nodes, strict=True) if dist.get_rank() in ranks)


def node_ranks(everyone: Sequence[tuple[int, int]]) -> list[list[int]]:
    """(local rank, ranks on its node) of each rank to the ranks of each node. Raises UserError."""
    nodes: list[list[int]] = []
    while sum(map(len, nodes)) < len(everyone):
        first = sum(map(len, nodes))
        size = everyone[first][1]
        ranks = list(range(first, first + size))
        if size < 1 or list(everyone[first : first + size]) != [(i, size) for i in range(size)]:
            raise UserError(
                "model.sync_batchnorm=node needs to know which ranks share a node: start them with torchrun "
                f"or Ray, which set {' and '.join(NODE_VARIABLES)}, or set it to global"
            )
        nodes.append(ranks)
    return nodes


class _Synced(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and (biased) var over all samples of the group.

    With xhat = (x - mean) invstd and N samples a channel, for losses L summed over the ranks:
    dL/dx = weight invstd (dy - sum(dy) / N - xhat sum(dy xhat) / N), the sums over all ranks. Gradients of
    weight and bias are this rank's: data parallelism averages them with all others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        x = _dense(x)
        mean, var = _statistics(x, eps)
        count = torch.full_like(mean[:1], x.numel() // x.shape[1])
        gathered = gather_ranks(torch.cat([mean, var, count]), group)  # [world, 2 C + 1]
        means, variances, counts = gathered.split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        share = counts / total
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        invstd = (var + eps).rsqrt()
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (total / (total - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, invstd, counts.view(-1))
        ctx.group = group
        if x.is_cuda:
            return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
        scale = weight * invstd
        return (x.float() * _wide(scale, x) + _wide(bias - mean * scale, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_layout(x))
        if x.is_cuda:
            sum_dy, sum_dy_xmu, of_weight, of_bias = torch.batch_norm_backward_reduce(
                dy, x, mean, invstd, weight, True, True, True
            )
        else:
            sum_dy, sum_dy_xmu = _sums(dy.float()), _sums(dy.float() * (x.float() - _wide(mean, x)))
            of_weight, of_bias = sum_dy_xmu * invstd, sum_dy.clone()
        sums = sum_over_ranks(torch.cat([sum_dy, sum_dy_xmu]), ctx.group)
        sum_dy, sum_dy_xmu = sums.split(len(mean))
        if x.is_cuda:
            dx = torch.batch_norm_backward_elemt(
                dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts.to(torch.int32)
            )
        else:
            total = counts.sum()
            centred = (x.float() - _wide(mean, x)) * _wide(sum_dy_xmu * invstd.square() / total, x)
            dx = (dy.float() - _wide(sum_dy / total, x) - centred) * _wide(weight * invstd, x)
        return dx.to(x.dtype), of_weight, of_bias, None, None, None, None, None


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel on this rank, float32 [C]."""
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(x, eps)
        return mean, invstd.pow(-2) - eps
    var, mean = torch.var_mean(x.float(), _others(x), correction=0)
    return mean, var


def _sums(x: Tensor) -> Tensor:
    return x.sum(_others(x))


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [0, *range(2, x.ndim)]


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """[C] to the shape of x, for broadcasting."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def _layout(x: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.ndim)
    last = wanted is not None and x.is_contiguous(memory_format=wanted)
    return wanted if last and wanted is not None else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_layout(x))
