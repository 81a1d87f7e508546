"""What tells a run that learns from one that collapses, per modality, over the samples of all ranks.

Everything is a function of a few sums, so one all-reduce serves all modalities. Computed on logged steps
only.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.swav.collectives import sum_over_ranks

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
    """For each modality scalars (float32): loss, loss_minus_ln_k, target_perplexity, prediction_entropy,
    effective_prototypes, dead_prototypes, feature_std, effective_rank; see `_summary`.

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
            z.new_tensor(features.shape[1]),
            loss.float() * features.shape[1],
            z.new_tensor(len(z)),
            z.new_tensor(len(q)),
            -(q * q.clamp_min(1e-38).log()).sum(),
            -(p * log_p).sum(),
        ]
    )
    return torch.cat([scalars, p.sum(0), z.sum(0), (z.T @ z).flatten()])


def _summary(total: Tensor, k: int, f: int) -> dict[str, Tensor]:
    samples, loss, views, coded, target_entropy, prediction_entropy = total[:6].clamp_min(0).unbind()
    use, mean, moment = total[6:].split([k, f, f * f])
    views, coded = views.clamp_min(1), coded.clamp_min(1)
    use, mean, moment = use / views, mean / views, moment.view(f, f) / views
    loss = loss / samples.clamp_min(1)
    # Not finite: the loss tells, the decomposition must not fail before it does.
    eigenvalues = torch.linalg.eigvalsh(moment.double().nan_to_num(0, 0, 0)).clamp_min(0)
    spectrum = eigenvalues / eigenvalues.sum().clamp_min(1e-12)
    variance = (moment.diagonal() - mean.square()).clamp_min(0)
    return {
        "loss": loss,
        "loss_minus_ln_k": loss - math.log(k),
        # exp of the mean entropy of a code: K for uniform codes, 1 for hard ones
        "target_perplexity": (target_entropy / coded).exp(),
        "prediction_entropy": prediction_entropy / views,
        # exp of the entropy of the mean prediction: how many prototypes share the samples
        "effective_prototypes": _entropy(use).exp(),
        "dead_prototypes": (use < DEAD_SHARE / k).sum().float(),
        # times sqrt(F): 1 for features spread over the sphere, 0 for one point
        "feature_std": variance.sqrt().mean() * math.sqrt(f),
        # exp of the entropy of the spectrum of E[z z^T], uncentred so that one point gives exactly 1
        "effective_rank": _entropy(spectrum).exp().float(),
    }


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-38).log()).sum()


def collapse_signs(values: Mapping[str, float], prototypes: int) -> list[str]:
    """Which diagnostics of one modality say that features have collapsed; empty for a healthy run."""
    signs = []
    if values["feature_std"] < 0.05:
        signs.append("feature_std: all features are one point")
    if values["effective_rank"] < 1.5:
        signs.append("effective_rank: all features lie on one line")
    if values["target_perplexity"] > 0.95 * prototypes:
        signs.append("target_perplexity: codes are uniform")
    return signs
