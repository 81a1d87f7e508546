"""The supervised part of the hybrid loss (method.md eq. 4): labels of some images, a linear head each."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from trainer.config import SupervisionConfig
from trainer.swav.collectives import rank_and_world, sum_over_ranks

Labels = Mapping[str, Tensor]  # by label set: int64 [n] (classes) or int8 [n, C] (multi); -1: unknown


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """L_sup of each image, [n] float32, 0 where it has no label; in the graph also where none has one,
    because a rank without labels takes part in the gradient all-reduce.

    logits: [A, n, C], of A crops of each image, over which the losses are averaged. labels: int64 [n],
    classes (cross-entropy); or [n, C] of 1, 0 and -1 (binary cross-entropy, mean over an image's known
    entries).
    """
    views, n, classes = logits.shape
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        if labels.ndim == 1:
            target = labels.clamp_min(0).expand(views, n).flatten()
            found = cross_entropy(logits.flatten(0, 1), target, reduction="none").view(views, n)
            return found.mean(0) * (labels >= 0)
        known = labels >= 0
        target = labels.clamp_min(0).to(logits.dtype).expand(views, n, classes)
        entries = binary_cross_entropy_with_logits(logits, target, reduction="none").mean(0)
        return (entries * known).sum(1) / known.sum(1).clamp_min(1)


def labelled(labels: Tensor) -> Tensor:
    """How many images have a label, or one known entry of it; int64 scalar."""
    known = labels >= 0
    return (known if labels.ndim == 1 else known.any(1)).sum()


def label_weights(
    labels: Labels, n: int, config: SupervisionConfig, group: ProcessGroup | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By label set: what this rank's sum of label_losses is multiplied with, so that the mean over the ranks
    is the term of equation 4 without its beta; and the labelled images of all ranks. n: images of this rank.
    """
    if not labels:
        return {}, {}
    _, world = rank_and_world(group)
    counts = sum_over_ranks(torch.stack([labelled(part) for part in labels.values()]), group)
    weights = {}
    for name, count in zip(labels, counts.unbind(), strict=True):
        whole = torch.full_like(count, n, dtype=torch.float32)
        weights[name] = 1 / whole if config.denominator == "batch" else world / count.float().clamp_min(1)
    return weights, dict(zip(labels, counts.unbind(), strict=True))
