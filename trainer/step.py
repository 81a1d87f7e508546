"""One training step: crops to codes, loss, gradient, update, queue. Nothing here reads a disk or a clock."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer.accumulation import codes_of_all, crops_of, gradients_meet, micro_batches
from trainer.config import TrainConfig
from trainer.models.embedder import Embedder
from trainer.objective import diagnose, joined, outcome_of
from trainer.optim import learning_rate, set_learning_rate
from trainer.precision import FLOAT32, Precision
from trainer.supervised import Labels, label_weights
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
    labels: Labels | None = None,
) -> dict[str, Any]:
    """Updates model, optimizer and queue in place; returns metrics as detached tensors and floats.

    model: of build_model, bare or in DistributedDataParallel, in training mode. crops: per crop group
    [count, n, C, S, S], [count, n, S, S] or [count * n, C, S, S] (of volumes Z, Y, X for S, S), uint8 or
    float in [0, 1], on the model's device. step: 0-based. sizes: see Embedder.forward; not with accumulation.
    labels: of each set of supervision.labels, see trainer.supervised.
    Always returned: loss (this rank's), learning_rate and the flags of Precision.check. On logged steps loss
    is the mean over ranks, and there are m/<modality>/<diagnostic> (m/all/... with swav.groups=shared; of
    them m/<modality>/use is a vector); loss_minus_ln_k, or for SimCLR loss_minus_chance; with labels
    loss_self, loss_supervised/<set> and labelled/<set>, a count of images.
    """
    core = unwrap(model)
    batch = micro_batches(as_groups(crops, config), labels or {}, config)
    n = batch[0][0][0].shape[1]  # images of a micro-batch
    parts = group_slices(n, len(core.groups), sizes)
    weights, labelled = label_weights(labels or {}, n * len(batch), config.supervision, group)
    rate = learning_rate(step, config)
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=True)
    device = crops[0].device

    with gradients_meet(model, last=len(batch) == 1), precision.autocast(device):
        out = model(batch[0][0], sizes)
    codes: list[list[Tensor]] = [[]] * len(batch)
    if isinstance(core, MultiModalSwav):
        codes = codes_of_all(core, out, batch[1:], queue, config, group, precision)
    outcomes = []
    for i, (part_crops, part_labels) in enumerate(batch):
        with gradients_meet(model, last=i == len(batch) - 1):
            if i > 0:
                with precision.autocast(device):
                    out = model(part_crops, sizes)
            outcome = outcome_of(
                out, codes[i], parts, part_labels, weights, config, share=1 / len(batch), group=group
            )
            precision.backward(outcome.loss)
        outcomes.append(replace(outcome, loss=outcome.loss.detach()))
    whole = joined(outcomes)
    flags = precision.check(optimizer)  # of all gradients, before any of them is dropped
    if isinstance(core, MultiModalSwav):
        freeze_prototypes(core.prototypes, step, config.swav.freeze_prototypes_steps)
    precision.update(optimizer)

    if queue is not None and step >= config.swav.queue_start_step:
        queue.enqueue(torch.stack([crops_of(z, config.swav.assign) for z in whole.features]), group)
    metrics: dict[str, Any] = {"loss": whole.loss, "learning_rate": rate, **flags}
    if is_logged(step, config):
        metrics |= diagnose(whole, core.groups, labelled, config, group)
    return metrics


def as_groups(crops: Sequence[Tensor], config: TrainConfig) -> list[Tensor]:
    """Crop tensors in any of the accepted layouts to [count, n, C, *spatial]."""
    counts = [c.count for c in config.views.crops]
    if len(crops) != len(counts):
        raise ValueError(f"{len(crops)} crop tensors for {len(counts)} crop groups of views.crops")
    channels, whole = config.model.in_channels, 3 + len(config.views.crop_shapes[0])
    found = []
    for crop, count in zip(crops, counts, strict=True):
        if crop.ndim == whole:
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
