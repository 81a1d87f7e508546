"""A step in several micro-batches, in the memory of one: ONE Sinkhorn over them all (method.md, trap 10).

The codes need the scores of every image before the first gradient. So the first micro-batch goes through the
network with gradient and its graph waits, the others go through it without; then come the codes; then the
first goes backward, and each of the others forward again and backward: 2n - 1 forwards for n micro-batches.

Batch norm: each micro-batch is normalised with its own statistics, in both of its forwards alike, as if it
were a rank's batch (SyncBatchNorm: with those of the micro-batch of all ranks). Each micro-batch enters the
running averages once. With batch norm the result is therefore not that of the whole batch; without, it is. A
network that draws random numbers (dropout) gives codes and predictions of two different draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from trainer.config import TrainConfig
from trainer.models.embedder import Output
from trainer.precision import Precision
from trainer.swav.codes import assign_codes
from trainer.swav.model import MultiModalSwav
from trainer.swav.queue import FeatureQueue

MicroBatch = tuple[list[Tensor], dict[str, Tensor]]  # crops [count, b, C, *spatial] a group; labels [b, ...]


def micro_batches(
    crops: Sequence[Tensor], labels: Mapping[str, Tensor], config: TrainConfig
) -> list[MicroBatch]:
    """A rank's batch in optim.accumulation equal parts, each with an equal part of every modality,
    modality-major as the whole."""
    parts, n_modalities = config.optim.accumulation, len(config.data.modalities)
    if parts == 1:
        return [(list(crops), dict(labels))]
    cut_crops = [_cut(crop, n_modalities, parts, dim=1) for crop in crops]
    cut_labels = {name: _cut(values, n_modalities, parts, dim=0) for name, values in labels.items()}
    return [
        ([crop[i] for crop in cut_crops], {name: values[i] for name, values in cut_labels.items()})
        for i in range(parts)
    ]


def codes_of_all(
    core: MultiModalSwav,
    first: Output,
    others: Sequence[MicroBatch],
    queue: FeatureQueue | None,
    config: TrainConfig,
    group: ProcessGroup | None,
    precision: Precision,
) -> list[list[Tensor]]:
    """For each micro-batch the codes [A, b, K] of its groups. first: of the first one's forward."""
    scores = [[crops_of(s.detach(), config.swav.assign) for s in first.scores]]
    with torch.no_grad(), running_statistics_kept(core):
        for crops, _ in others:
            with precision.autocast(crops[0].device):
                out = core.look(crops)
            scores.append([crops_of(s, config.swav.assign) for s in out.scores])
    union = [torch.cat(of_group, dim=1) for of_group in zip(*scores, strict=True)]
    codes = assign_codes(core, union, queue, config.swav, group)
    apart = [q.chunk(len(scores), dim=1) for q in codes]
    return [list(of_part) for of_part in zip(*apart, strict=True)]


def crops_of(x: Tensor, chosen: Sequence[int]) -> Tensor:
    """[V, ...] to [A, ...]; not by indexing with a list, which would copy the indices to the device."""
    return torch.stack([x[crop] for crop in chosen])


def gradients_meet(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around forward and backward: DDP averages over the ranks with the last micro-batch only."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    quiet: AbstractContextManager[None] = model.no_sync()
    return quiet


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises with the batch's statistics, as in training, and leaves its averages alone."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _cut(x: Tensor, n_modalities: int, parts: int, dim: int) -> list[Tensor]:
    """A modality-major dimension in equal parts. Raises ValueError where it does not divide."""
    if x.shape[dim] % (n_modalities * parts):
        raise ValueError(f"{x.shape[dim]} images are no {parts} equal parts of {n_modalities} modalities")
    apart = x.unflatten(dim, (n_modalities, parts, -1))
    return [apart.select(dim + 1, i).flatten(dim, dim + 1) for i in range(parts)]
