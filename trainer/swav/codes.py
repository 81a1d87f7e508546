"""Codes of a step: the assigned crops of every group, and the queue, in one stacked Sinkhorn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.config import SwavConfig
from trainer.swav.model import MultiModalSwav
from trainer.swav.queue import FeatureQueue, queue_part
from trainer.swav.sinkhorn import sinkhorn_each


@torch.no_grad()
def assign_codes(
    core: MultiModalSwav,
    scores: Sequence[Tensor],
    queue: FeatureQueue | None,
    swav: SwavConfig,
    group: ProcessGroup | None = None,
) -> list[Tensor]:
    """Codes [A, b, K] of each group, from the scores [A, b, K] of the assigned crops and, if it is full,
    the queue's.

    All crops and groups share one stacked Sinkhorn. Scores of queued features are computed anew with
    today's prototypes; each rank brings its own part of the global queue.
    """
    queued = queue_part(queue, group) if queue is not None and queue.full else None
    problems = []
    for g, (name, s) in enumerate(zip(core.groups, scores, strict=True)):
        weight: Any = core.prototypes[name].weight
        for a, rows in enumerate(s.detach().float()):
            if queued is not None:
                rows = torch.cat([rows, queued[g, a] @ weight.detach().float().T])
            problems.append(rows)
    found = sinkhorn_each(problems, swav.epsilon, swav.sinkhorn_iterations, group)
    n_assigned = len(swav.assign)
    return [
        torch.stack([q[: s.shape[1]] for q in found[g * n_assigned : (g + 1) * n_assigned]])
        for g, s in enumerate(scores)
    ]
