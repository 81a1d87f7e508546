"""One training step: crops to codes, loss, gradient, update, queue. Nothing here reads a disk or a clock."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer.baselines.simclr import contrastive_diagnostics, nt_xent
from trainer.config import TrainConfig
from trainer.models.embedder import Embedder
from trainer.optim import learning_rate, set_learning_rate
from trainer.precision import FLOAT32, Precision
from trainer.swav.codes import assign_codes
from trainer.swav.diagnostics import modality_diagnostics
from trainer.swav.loss import swapped_prediction
from trainer.swav.model import MultiModalSwav, group_slices
from trainer.swav.prototypes import freeze_prototypes
from trainer.swav.queue import FeatureQueue


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    queue: FeatureQueue | None,
    crops: Sequence[Tensor],
    step: int,
    config: TrainConfig,
    group: ProcessGroup | None = None,
    precision: Precision = FLOAT32,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Updates model, optimizer and queue in place; returns metrics as detached tensors and floats.

    model: of build_model, bare or in DistributedDataParallel, in training mode. crops: per crop group
    [count, n, C, S, S], [count, n, S, S] or [count * n, C, S, S], uint8 or float in [0, 1], on the model's
    device. step: 0-based. sizes: see Embedder.forward.
    Always returned: loss (this rank's), learning_rate and the flags of Precision.check. On logged steps loss
    is the mean over ranks, and there are m/<modality>/<diagnostic> (m/all/... with swav.groups=shared; of
    them m/<modality>/use is a vector) and loss_minus_ln_k, or for SimCLR loss_minus_chance.
    """
    core = unwrap(model)
    crops = as_groups(crops, config)
    rate = learning_rate(step, config)
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=True)

    with precision.autocast(crops[0].device):
        out = model(crops, sizes)
    parts = group_slices(out.features.shape[1], len(core.groups), sizes)
    assign, codes = config.swav.assign, []
    if isinstance(core, MultiModalSwav):
        assigned = [_crops_of(s.detach(), assign) for s in out.scores]
        codes = assign_codes(core, assigned, queue, config.swav, group)
        losses = [
            swapped_prediction(s, q, assign, config.swav.temperature)
            for s, q in zip(out.scores, codes, strict=True)
        ]
    else:
        of_images = nt_xent(out.features, config.simclr.temperature, group)
        losses = [of_images[part].sum() / max(part.stop - part.start, 1) for part in parts]
    loss = _weighted(losses, parts)
    precision.backward(loss)
    flags = precision.check(optimizer)  # of all gradients, before any of them is dropped
    if isinstance(core, MultiModalSwav):
        freeze_prototypes(core.prototypes, step, config.swav.freeze_prototypes_steps)
    precision.update(optimizer)

    by_group = [out.features.detach()[:, part] for part in parts]
    if queue is not None and step >= config.swav.queue_start_step:
        queue.enqueue(torch.stack([_crops_of(z, assign) for z in by_group]), group)
    metrics: dict[str, Any] = {"loss": loss.detach(), "learning_rate": rate, **flags}
    if is_logged(step, config):
        detached = [part.detach() for part in losses]
        if codes:
            scores = [s.detach() for s in out.scores]
            found = modality_diagnostics(detached, by_group, scores, codes, config.swav.temperature, group)
        else:
            found = contrastive_diagnostics(detached, config.data.batch_size, group)
        metrics |= _summarise(found, core.groups)
    return metrics


def _weighted(losses: Sequence[Tensor], parts: Sequence[slice]) -> Tensor:
    """Mean over the images of a batch, from the means over the images of its groups."""
    sizes = [part.stop - part.start for part in parts]
    shares = [size / sum(sizes) for size in sizes]
    return torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()


def _crops_of(x: Tensor, chosen: Sequence[int]) -> Tensor:
    """[V, ...] to [A, ...]; not by indexing with a list, which would copy the indices to the device."""
    return torch.stack([x[crop] for crop in chosen])


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


def unwrap(model: nn.Module) -> Embedder:
    core = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(core, Embedder)
    return core


def is_logged(step: int, config: TrainConfig) -> bool:
    """Whether train_step computes the diagnostics of this step; the last step always is."""
    return step % config.log_every_steps == 0 or step == config.max_steps - 1


def _summarise(found: list[dict[str, Tensor]], groups: Sequence[str]) -> dict[str, Tensor]:
    names = [name for name in found[0] if name.startswith("loss")]
    metrics = {name: torch.stack([values[name] for values in found]).mean() for name in names}
    for group, values in zip(groups, found, strict=True):
        metrics |= {f"m/{group}/{name}": value for name, value in values.items()}
    return metrics
