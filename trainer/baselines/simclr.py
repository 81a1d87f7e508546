"""SimCLR's loss (Chen et al., A simple framework for contrastive learning of visual representations, 2020),
as a baseline over the same batches, backbone, head and loop as SwAV."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from trainer.swav.collectives import gather_with_gradient, rank_and_world, sum_over_ranks
from trainer.swav.diagnostics import feature_diagnostics, feature_sums


def nt_xent(features: Tensor, temperature: float, group: ProcessGroup | None = None) -> Tensor:
    """NT-Xent of each image, [n] float32 with gradient: the mean over its two crops i of
    `-log(exp(z_i z_j / t) / sum_{k != i} exp(z_i z_k / t))`, j the other crop of the image.

    features: [2, n, F], unit vectors of this rank's n images; n equal on all ranks. k runs over both crops of
    the N images of all ranks, so the mean of the losses (and, under DDP, of the gradients) over the ranks is
    that of one process on the whole batch.
    """
    views, n, _ = features.shape
    if views != 2:
        raise ValueError(f"NT-Xent is for two crops of an image, there are {views}")
    rank, world = rank_and_world(group)
    with torch.autocast(features.device.type, enabled=False):
        z = features.float()
        everyone = gather_with_gradient(z, group).transpose(0, 1).reshape(2 * world * n, -1)  # crop-major
        logits = z.flatten(0, 1) @ everyone.T / temperature  # [2n, 2N]
        first = torch.arange(n, device=z.device) + rank * n  # this rank's images among the N
        itself = torch.cat([first, first + world * n]).unsqueeze(1)
        logits = logits.masked_fill(torch.arange(2 * world * n, device=z.device) == itself, -torch.inf)
        other = torch.cat([first + world * n, first])
        return cross_entropy(logits, other, reduction="none").unflatten(0, (2, n)).mean(0)


@torch.no_grad()
def contrastive_diagnostics(
    losses: Sequence[Tensor], features: Sequence[Tensor], n_images: int, group: ProcessGroup | None = None
) -> list[dict[str, Tensor]]:
    """For each group of images scalars over all ranks: loss, loss_minus_chance, feature_std and
    effective_rank. losses: scalars, of this rank's images, whose unit features are [2, n, F]; n_images: N of
    all ranks."""
    f = features[0].shape[2]
    own = [_sums(loss, z.float()) for loss, z in zip(losses, features, strict=True)]
    return [_summary(total, f, n_images) for total in sum_over_ranks(torch.stack(own), group)]


def _sums(loss: Tensor, z: Tensor) -> Tensor:
    images = z.new_full((), z.shape[1])
    return torch.cat([torch.stack([loss.float() * images, images]), feature_sums(z.flatten(0, 1))])


def _summary(total: Tensor, f: int, n_images: int) -> dict[str, Tensor]:
    images = total[1].clamp_min(1)
    loss = total[0] / images
    spread = feature_diagnostics(total[2:], 2 * images, f)
    return {"loss": loss, "loss_minus_chance": loss - chance_loss(n_images), **spread}


def chance_loss(n_images: int) -> float:
    """Where all 2N - 1 candidates of a crop are equally near."""
    return math.log(2 * n_images - 1)
