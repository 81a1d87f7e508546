"""The loss of a forward: SwAV or SimCLR without labels, and the supervised part of the labelled images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.baselines.simclr import chance_loss, contrastive_diagnostics, nt_xent
from trainer.config import TrainConfig
from trainer.models.embedder import Output
from trainer.supervised import Labels, label_losses
from trainer.swav.collectives import rank_and_world, sum_over_ranks
from trainer.swav.diagnostics import modality_diagnostics
from trainer.swav.loss import swapped_prediction


@dataclass(frozen=True)
class Outcome:
    """Of the images of a forward. loss: what is minimised, with gradient. The rest is detached. loss_self
    and, for each label set, supervised: the terms of equation 4 without alpha and beta. For each group of
    images: losses (scalars), features [V, b, F], scores [V, b, K], codes [A, b, K] (both empty for SimCLR).
    """

    loss: Tensor
    loss_self: Tensor
    losses: list[Tensor]
    supervised: dict[str, Tensor]
    features: list[Tensor]
    scores: list[Tensor]
    codes: list[Tensor]


def outcome_of(
    out: Output,
    codes: Sequence[Tensor],
    parts: Sequence[slice],
    labels: Labels,
    weights: Mapping[str, Tensor],
    config: TrainConfig,
    share: float = 1.0,
    group: ProcessGroup | None = None,
) -> Outcome:
    """codes: of assign_codes, for SwAV. parts: where the groups' images lie. weights: of label_weights.
    share: the images' part of the step's, by which their loss without labels counts."""
    if config.method == "simclr":
        of_images = nt_xent(out.features, config.simclr.temperature, group)
        losses = [of_images[part].sum() / max(part.stop - part.start, 1) for part in parts]
    else:
        swav = config.swav
        losses = [
            swapped_prediction(s, q, swav.assign, swav.temperature)
            for s, q in zip(out.scores, codes, strict=True)
        ]
    loss = loss_self = _weighted(losses, parts) * share
    supervised = {
        name: label_losses(out.logits[name], labels[name]).sum() * weights[name] for name in out.logits
    }
    if supervised:
        loss = loss * config.supervision.alpha
        for one in config.supervision.labels:
            loss = loss + one.beta * supervised[one.name]
    return Outcome(
        loss,
        loss_self.detach(),
        [part.detach() for part in losses],
        {name: value.detach() for name, value in supervised.items()},
        [out.features.detach()[:, part] for part in parts],
        [s.detach() for s in out.scores],
        list(codes),
    )


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Of the equal parts of a step, whose losses are detached, the step's."""
    if len(outcomes) == 1:
        return outcomes[0]
    return Outcome(
        torch.stack([o.loss for o in outcomes]).sum(),
        torch.stack([o.loss_self for o in outcomes]).sum(),
        [torch.stack(parts).mean() for parts in zip(*(o.losses for o in outcomes), strict=True)],
        {n: torch.stack([o.supervised[n] for o in outcomes]).sum() for n in outcomes[0].supervised},
        _side_by_side([o.features for o in outcomes]),
        _side_by_side([o.scores for o in outcomes]),
        _side_by_side([o.codes for o in outcomes]),
    )


def _side_by_side(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """[V, b, ...] of each part and group to those of each group."""
    return [torch.cat(of_group, dim=1) for of_group in zip(*parts, strict=True)]


@torch.no_grad()
def diagnose(
    outcome: Outcome,
    groups: Sequence[str],
    labelled: Mapping[str, Tensor],
    config: TrainConfig,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Of a step, over all ranks: loss, what it is made of, and m/<group>/<diagnostic>."""
    if config.method == "simclr":
        found = contrastive_diagnostics(outcome.losses, outcome.features, config.data.batch_size, group)
        below, chance = "loss_minus_chance", chance_loss(config.data.batch_size)
    else:
        found = modality_diagnostics(
            outcome.losses, outcome.features, outcome.scores, outcome.codes, config.swav.temperature, group
        )
        below, chance = "loss_minus_ln_k", math.log(config.swav.prototypes)
    own = torch.stack([outcome.loss, outcome.loss_self, *outcome.supervised.values()])
    loss, loss_self, *supervised = (sum_over_ranks(own, group) / rank_and_world(group)[1]).unbind()
    metrics = {"loss": loss, below: loss_self - chance}
    if outcome.supervised:
        metrics["loss_self"] = loss_self
        named = zip(outcome.supervised, supervised, strict=True)
        metrics |= {f"loss_supervised/{name}": value for name, value in named}
        metrics |= {f"labelled/{name}": count for name, count in labelled.items()}
    for name, values in zip(groups, found, strict=True):
        metrics |= {f"m/{name}/{key}": value for key, value in values.items()}
    return metrics


def _weighted(losses: Sequence[Tensor], parts: Sequence[slice]) -> Tensor:
    """Mean over the images of a batch, from the means over the images of its groups."""
    sizes = [part.stop - part.start for part in parts]
    shares = [size / sum(sizes) for size in sizes]
    return torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()
