"""Swapped prediction (method.md eq. 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def swapped_prediction(scores: Tensor, codes: Tensor, assign: Sequence[int], temperature: float) -> Tensor:
    """`1/A sum_{i in assign} 1/(V-1) sum_{v != i} CE(q_i, softmax(S_v / temperature))`, mean over the
    samples; scalar.

    scores: [V, B, K] with gradient; codes: [A, B, K] without, in the order of `assign`. B = 0 gives 0 that
    is still part of the graph, because a rank without samples of a modality takes part in the gradient
    all-reduce.
    """
    n_crops, batch, _ = scores.shape
    with torch.autocast(scores.device.type, enabled=False):
        log_p = log_softmax(scores.float() / temperature, dim=2)
        # sum over v != i of log p_v: one product with each code instead of V - 1
        everything = log_p.sum(dim=0)
        total = scores.new_zeros((), dtype=torch.float32)
        for code, i in zip(codes, assign, strict=True):
            total = total - (code * (everything - log_p[i])).sum()
        return total / (len(assign) * (n_crops - 1) * max(batch, 1))
