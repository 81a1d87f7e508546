"""One training step: crops to codes, loss, gradient, update, queue. Nothing here reads a disk or a clock."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer.config import TrainConfig
from trainer.optim import learning_rate, set_learning_rate
from trainer.swav.diagnostics import modality_diagnostics
from trainer.swav.loss import swapped_prediction
from trainer.swav.model import MultiModalSwav, group_slices
from trainer.swav.prototypes import freeze_prototypes
from trainer.swav.queue import FeatureQueue, queue_part
from trainer.swav.sinkhorn import sinkhorn_each


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    queue: FeatureQueue | None,
    crops: Sequence[Tensor],
    step: int,
    config: TrainConfig,
    group: ProcessGroup | None = None,
    autocast: bool = False,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Updates model, optimizer and queue in place; returns metrics as detached tensors and floats.

    model: MultiModalSwav, bare or in DistributedDataParallel, in training mode. crops: per crop group
    [count, n, C, S, S], [count, n, S, S] or [count * n, C, S, S], uint8 or float in [0, 1], on the model's
    device. step: 0-based. autocast: bf16 forward. sizes: see MultiModalSwav.forward.
    Always returned: loss (this rank's) and learning_rate. On logged steps loss is the mean over ranks, and
    there are loss_minus_ln_k and m/<modality>/<diagnostic> (m/all/... with swav.groups=shared).
    """
    core = unwrap(model)
    crops = as_groups(crops, config)
    rate = learning_rate(step, config)
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=True)

    with torch.autocast(crops[0].device.type, torch.bfloat16, enabled=autocast):
        features, scores = model(crops, sizes)  # [V, n, F]; per group [V, b, K]
    parts = group_slices(features.shape[1], len(scores), sizes)
    by_group = [features.detach()[:, part] for part in parts]
    codes = assign_codes(core, scores, queue if queue is not None and queue.full else None, config, group)
    losses = [
        swapped_prediction(s, q, config.swav.assign, config.swav.temperature)
        for s, q in zip(scores, codes, strict=True)
    ]
    shares = [s.shape[1] / features.shape[1] for s in scores]
    loss = torch.stack([share * part for share, part in zip(shares, losses, strict=True)]).sum()
    loss.backward()
    freeze_prototypes(core.prototypes, step, config.swav.freeze_prototypes_steps)
    optimizer.step()

    if queue is not None and step >= config.swav.queue_start_step:
        assign = list(config.swav.assign)
        queue.enqueue(torch.stack([z[assign] for z in by_group]), group)
    metrics: dict[str, Any] = {"loss": loss.detach(), "learning_rate": rate}
    if is_logged(step, config):
        detached = [part.detach() for part in losses]
        found = modality_diagnostics(
            detached, by_group, [s.detach() for s in scores], codes, config.swav.temperature, group
        )
        metrics |= _summarise(found, core.groups)
    return metrics


@torch.no_grad()
def assign_codes(
    core: MultiModalSwav,
    scores: Sequence[Tensor],
    queue: FeatureQueue | None,
    config: TrainConfig,
    group: ProcessGroup | None = None,
) -> list[Tensor]:
    """Codes [A, b_m, K] of each group, from the assigned crops' scores and, if given, the queue's.

    All crops and groups share one stacked Sinkhorn. Scores of queued features are computed anew with
    today's prototypes; each rank brings its own part of the global queue.
    """
    swav = config.swav
    queued = None if queue is None else queue_part(queue, group)
    problems = []
    for m, (name, s) in enumerate(zip(core.groups, scores, strict=True)):
        weight: Any = core.prototypes[name].weight
        for a, crop in enumerate(swav.assign):
            rows = s[crop].detach().float()
            if queued is not None:
                rows = torch.cat([rows, queued[m, a] @ weight.detach().float().T])
            problems.append(rows)
    found = sinkhorn_each(problems, swav.epsilon, swav.sinkhorn_iterations, group)
    n_assigned = len(swav.assign)
    return [
        torch.stack([q[: s.shape[1]] for q in found[m * n_assigned : (m + 1) * n_assigned]])
        for m, s in enumerate(scores)
    ]


def as_groups(crops: Sequence[Tensor], config: TrainConfig) -> list[Tensor]:
    """Crop tensors in any of the accepted layouts to [count, n, C, *spatial]."""
    counts = [c.count for c in config.views.crops]
    if len(crops) != len(counts):
        raise ValueError(f"{len(crops)} crop tensors for {len(counts)} crop groups of views.crops")
    channels = config.model.in_channels
    found = []
    for crop, count in zip(crops, counts, strict=True):
        if crop.ndim == 5:
            found.append(crop)
        elif channels == 1 and crop.shape[0] == count and crop.shape[1] != 1:
            found.append(crop.unsqueeze(2))
        else:
            found.append(crop.unflatten(0, (count, -1)))
    return found


def unwrap(model: nn.Module) -> MultiModalSwav:
    core = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(core, MultiModalSwav)
    return core


def is_logged(step: int, config: TrainConfig) -> bool:
    """Whether train_step computes the diagnostics of this step; the last step always is."""
    return step % config.log_every_steps == 0 or step == config.max_steps - 1


def _summarise(found: list[dict[str, Tensor]], groups: Sequence[str]) -> dict[str, Tensor]:
    metrics = {
        name: torch.stack([values[name] for values in found]).mean() for name in ("loss", "loss_minus_ln_k")
    }
    for group, values in zip(groups, found, strict=True):
        metrics |= {f"m/{group}/{name}": value for name, value in values.items()}
    return metrics
