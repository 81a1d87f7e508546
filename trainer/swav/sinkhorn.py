"""Codes by entropic optimal transport (method.md eq. 2): Sinkhorn-Knopp over the samples of all ranks.

`Q = Diag(v) E Diag(u)`, `E = exp(S / epsilon)`, is held as E and two vectors. Only the sums over the samples
need other ranks; the sample count, the prototype count and the first normalisation cancel out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils.rnn import pad_sequence

from trainer.swav.collectives import gather_ranks, rank_and_world, sum_over_ranks

# Problems of more scores than this are solved one by one where no collective is shared: eight of 968 x 3000
# in one stack leave every cache, and take about three times as long on a CPU.
STACKED_BELOW = 1 << 20

# exp(-2 / epsilon), the span of the entries of E for unit vectors, must stay a normal float32.
LOG_DOMAIN_BELOW = 0.023


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float,
    iterations: int = 3,
    group: ProcessGroup | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Soft codes, float32, in the shape of `scores`; each row sums to 1.

    scores: [B, K] or a stack of independent problems [G, B, K]; products of unit vectors, any float dtype.
    B is this rank's share and may differ between ranks, or be 0; G, K and `iterations` may not. One
    collective an iteration. present: bool [B] or [G, B], False for padding rows, whose codes are 0.
    """
    with torch.autocast(scores.device.type, enabled=False):
        stacked = scores.float() if scores.ndim == 3 else scores.float().unsqueeze(0)
        mask = None if present is None else present.view(stacked.shape[:2])
        solve = _log_domain if epsilon < LOG_DOMAIN_BELOW else _linear
        return solve(stacked, epsilon, iterations, group, mask).view(scores.shape)


def sinkhorn_each(
    scores: Sequence[Tensor], epsilon: float, iterations: int = 3, group: ProcessGroup | None = None
) -> list[Tensor]:
    """Codes of several independent problems [B_g, K] with the collectives of one: they are stacked, padded
    if B_g differ. One process alone, which has no collectives, solves large ones one after the other.

    Every rank passes the same problems in the same order; a rank that holds no sample of one passes [0, K].
    """
    if rank_and_world(group)[1] == 1 and max(s.numel() for s in scores) >= STACKED_BELOW:
        return [sinkhorn(s, epsilon, iterations, group) for s in scores]
    sizes = [len(s) for s in scores]
    if len(set(sizes)) == 1:
        return list(sinkhorn(torch.stack(list(scores)), epsilon, iterations, group).unbind())
    padded = pad_sequence([s.float() for s in scores], batch_first=True)
    rows = torch.arange(padded.shape[1], device=padded.device)
    present = torch.stack([rows < size for size in sizes])  # a tensor of the sizes would wait for the device
    codes = sinkhorn(padded, epsilon, iterations, group, present)
    return [q[:size] for q, size in zip(codes, sizes, strict=True)]


def _linear(
    scores: Tensor, epsilon: float, iterations: int, group: ProcessGroup | None, present: Tensor | None
) -> Tensor:
    # exp((S - 1) / epsilon) of the text up to a constant, which cancels: exponents around 0 round less
    e = (scores / epsilon).exp_()  # [G, B, K]
    if present is not None:
        e = e * present.unsqueeze(2)
    v = e.new_ones(e.shape[:2])
    u = e.new_ones(e.shape[0], e.shape[2])
    for _ in range(iterations):
        # sums, not matrix products: those accumulate in order, three times the error on (1024, 3000)
        mass = (e * v.unsqueeze(2)).sum(1)
        u = sum_over_ranks(mass, group).reciprocal_()
        v = (e * u.unsqueeze(1)).sum(2).reciprocal_()
        if present is not None:
            v = torch.where(present, v, 0.0)
    return e.mul_(u.unsqueeze(1)).mul_(v.unsqueeze(2))


def _log_domain(
    scores: Tensor, epsilon: float, iterations: int, group: ProcessGroup | None, present: Tensor | None
) -> Tensor:
    log_e = scores / epsilon
    log_v = log_e.new_zeros(log_e.shape[:2])
    log_u = log_e.new_zeros(log_e.shape[0], log_e.shape[2])
    if present is not None:
        log_v = torch.where(present, log_v, -torch.inf)
    for _ in range(iterations):
        # logsumexp of the ranks' logsumexp: gathering it keeps one collective an iteration, a shared
        # maximum would need two
        mass = torch.logsumexp(log_e + log_v.unsqueeze(2), dim=1)
        log_u = -torch.logsumexp(gather_ranks(mass, group), dim=0)
        log_v = -torch.logsumexp(log_e + log_u.unsqueeze(1), dim=2)
        if present is not None:
            log_v = torch.where(present, log_v, -torch.inf)
    codes = torch.softmax(log_e + log_u.unsqueeze(1), dim=2)  # the last log_v, but its rows sum to 1 exactly
    return codes if present is None else codes * present.unsqueeze(2)
