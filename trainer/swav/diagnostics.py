"""What tells a run that learns from one that collapses, per modality, over the samples of all ranks.

Everything is a function of a few sums, so one all-reduce serves all modalities. Computed on logged steps
only.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.swav.collectives import sum_over_ranks
from trainer.swav.queue import FeatureQueue

# A prototype is dead when its mean predicted probability is below this share of 1/K.
DEAD_SHARE = 0.1


@torch.no_grad()
def modality_diagnostics(
    losses: list[Tensor],
    features: list[Tensor],
    scores: list[Tensor],
    codes: list[Tensor],
    temperature: float,
    group: ProcessGroup | None = None,
) -> list[dict[str, Tensor]]:
    """For each modality scalars (float32): loss, loss_minus_ln_k, target_entropy, target_perplexity,
    prediction_entropy, effective_prototypes, dead_prototypes, dead_share, feature_std, effective_rank, see
    `_summary`; and `use` [K], the mean prediction.

    losses: scalars; features [V, b_m, F]; scores [V, b_m, K]; codes [A, b_m, K]; F and K equal for all
    modalities.
    """
    k, f = scores[0].shape[2], features[0].shape[2]
    sums = [
        _sums(*parts, temperature=temperature) for parts in zip(losses, features, scores, codes, strict=True)
    ]
    totals = sum_over_ranks(torch.stack(sums), group)
    return [_summary(total, k, f) for total in totals]


def _sums(loss: Tensor, features: Tensor, scores: Tensor, codes: Tensor, *, temperature: float) -> Tensor:
    z, q = features.float().flatten(0, 1), codes.flatten(0, 1)
    log_p = torch.log_softmax(scores.float().flatten(0, 1) / temperature, dim=1)
    p = log_p.exp()
    scalars = torch.stack(
        [
            z.new_full((), features.shape[1]),
            loss.float() * features.shape[1],
            z.new_full((), len(z)),
            z.new_full((), len(q)),
            -(q * q.clamp_min(1e-38).log()).sum(),
            -(p * log_p).sum(),
        ]
    )
    return torch.cat([scalars, p.sum(0), feature_sums(z)])


def _summary(total: Tensor, k: int, f: int) -> dict[str, Tensor]:
    samples, loss, views, coded, target_entropy, prediction_entropy = total[:6].clamp_min(0).unbind()
    views, coded = views.clamp_min(1), coded.clamp_min(1)
    use = total[6 : 6 + k] / views
    loss = loss / samples.clamp_min(1)
    return {
        "loss": loss,
        "loss_minus_ln_k": loss - math.log(k),
        # mean entropy of a code in nats, and its exp: K for uniform codes, 1 for hard ones
        "target_entropy": target_entropy / coded,
        "target_perplexity": (target_entropy / coded).exp(),
        "prediction_entropy": prediction_entropy / views,
        **use_diagnostics(use),
        "use": use,
        **feature_diagnostics(total[6 + k :], views, f),
    }


def feature_sums(z: Tensor) -> Tensor:
    """Of features [n, F] all that `feature_diagnostics` needs, [F + F * F]; sums of parts may be added."""
    return torch.cat([z.sum(0), (z.T @ z).flatten()])


def feature_diagnostics(sums: Tensor, n: Tensor, f: int) -> dict[str, Tensor]:
    """feature_std and effective_rank of n unit features of length f, from their feature_sums."""
    mean, moment = sums[:f] / n, sums[f:].view(f, f) / n
    # Not finite: the loss tells, the decomposition must not fail before it does.
    eigenvalues = torch.linalg.eigvalsh(moment.double().nan_to_num(0, 0, 0)).clamp_min(0)
    spectrum = eigenvalues / eigenvalues.sum().clamp_min(1e-12)
    variance = (moment.diagonal() - mean.square()).clamp_min(0)
    return {
        # times sqrt(F): 1 for features spread over the sphere, 0 for one point
        "feature_std": variance.sqrt().mean() * math.sqrt(f),
        # exp of the entropy of the spectrum of E[z z^T], uncentred so that one point gives exactly 1
        "effective_rank": _entropy(spectrum).exp().float(),
    }


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-38).log()).sum()


def use_diagnostics(use: Tensor) -> dict[str, Tensor]:
    """From a mean prediction [K]: how many prototypes share the samples (exp of its entropy), and how many,
    and what share of them, are dead."""
    dead = (use < DEAD_SHARE / len(use)).float()
    return {
        "effective_prototypes": _entropy(use).exp(),
        "dead_prototypes": dead.sum(),
        "dead_share": dead.mean(),
    }


def queue_diagnostics(queue: FeatureQueue | None, added: int) -> dict[str, float]:
    """Share of the queue that is filled, and the age in steps of its oldest and mean entry, as the next step
    finds them: what the last step enqueued is 1 step old. Nothing of a queue that is off or still empty.

    added: images of a group in a global batch.
    """
    if queue is None or queue.filled == 0:
        return {}
    oldest = min(queue.filled, queue.length) / added
    return {
        "queue_fill": min(queue.filled / queue.length, 1.0),
        "queue_oldest_steps": oldest,
        "queue_age_steps": (oldest + 1) / 2,
    }


class PrototypeUse:
    """The use of prototypes over the last steps: one batch has too few samples to call a prototype dead.

    An exponential mean of the `use` of logged steps, over the last VIEWS_PER_PROTOTYPE * K views or so, on
    the device; the same on every rank, and part of a checkpoint.
    """

    VIEWS_PER_PROTOTYPE = 10

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}  # of a group: [K + 1], the weighted sum of `use` and its weight

    @torch.no_grad()
    def replace(self, metrics: dict[str, Any], views: int) -> dict[str, Any]:
        """metrics of train_step, those of use (`m/<group>/...`) over the last steps instead of over the
        batch alone, without `use`. views: of a group in a global batch."""
        found = dict(metrics)
        for name in [name for name in metrics if name.endswith("/use")]:
            use, group = found.pop(name), name.split("/")[1]
            keep = max(0.0, 1 - views / (self.VIEWS_PER_PROTOTYPE * len(use)))
            added = torch.cat([use, use.new_ones(1)])
            state = self._state.get(group)
            state = added if state is None else keep * state + added
            self._state[group] = state
            values = use_diagnostics(state[:-1] / state[-1])
            found |= {f"m/{group}/{key}": value for key, value in values.items()}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str) -> None:
        """Empty for a checkpoint of a version without it: the mean begins anew."""
        self._state = {name: value.to(device) for name, value in state.items()}
