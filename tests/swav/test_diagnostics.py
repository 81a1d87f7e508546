"""The diagnostics against plain NumPy, in one process and over ranks; use of prototypes; age of the queue."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.dist import run_ranks
from tests.trainer.fake import tiny
from trainer.swav.diagnostics import PrototypeUse, modality_diagnostics, queue_diagnostics
from trainer.swav.queue import FeatureQueue

K, F, VIEWS, TEMPERATURE = 12, 6, 3, 0.1
SIZES = ((4, 6), (5, 1))  # images of the two modalities on the two ranks


def parts(modality: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """loss, features [V, b, F], scores [V, b, K] and codes [2, b, K] of each rank."""
    generator = torch.Generator().manual_seed(modality)
    prototypes = normalize(torch.randn(K, F, generator=generator), dim=1)
    prototypes[:4] = -1 / math.sqrt(F)  # far from all features: dead
    found = []
    for size in SIZES[modality]:
        z = normalize(1 + torch.randn(VIEWS, size, F, generator=generator), dim=2)
        q = torch.softmax(6 * torch.randn(2, size, K, generator=generator), dim=2)
        found.append((torch.rand((), generator=generator), z, z @ prototypes.T, q))
    return found


def by_hand(modality: int) -> dict[str, float | np.ndarray]:
    """In float64, of all ranks' rows at once, each quantity from its definition."""
    ranks = parts(modality)
    losses = np.repeat([float(loss) for loss, *_ in ranks], SIZES[modality])
    z, s, q = (
        np.concatenate([rank[i].double().numpy().reshape(-1, n) for rank in ranks])
        for i, n in ((1, F), (2, K), (3, K))
    )
    p = np.exp(s / TEMPERATURE)
    p /= p.sum(axis=1, keepdims=True)
    use = p.mean(axis=0)
    singular = np.linalg.svd(z, compute_uv=False) ** 2
    target = float(np.mean([-(row * np.log(row)).sum() for row in q]))
    return {
        "loss": losses.mean(),
        "loss_minus_ln_k": losses.mean() - np.log(K),
        "target_entropy": target,
        "target_perplexity": np.exp(target),
        "prediction_entropy": np.mean([-(row * np.log(row)).sum() for row in p]),
        "effective_prototypes": np.exp(-(use * np.log(use)).sum()),
        "dead_prototypes": np.count_nonzero(use < 0.1 / K),
        "dead_share": np.count_nonzero(use < 0.1 / K) / K,
        "feature_std": z.std(axis=0).mean() * np.sqrt(F),
        "effective_rank": np.exp(-(w := singular / singular.sum()) @ np.log(w)),
        "use": use,
    }


def _of_rank(rank: int, world: int) -> list[dict[str, Tensor]]:
    loss, z, s, q = zip(*(parts(modality)[rank] for modality in (0, 1)), strict=True)
    return modality_diagnostics(list(loss), list(z), list(s), list(q), TEMPERATURE)


@pytest.mark.parametrize("world", [1, 2])
def test_every_diagnostic_is_its_definition_over_all_samples(world):
    if world == 2:
        ranks = run_ranks(_of_rank, 2)
        assert all(torch.equal(a[k], b[k]) for a, b in zip(*ranks, strict=True) for k in a)
        found = ranks[0]
    else:
        loss, z, s, q = [], [], [], []
        for modality in (0, 1):
            own = parts(modality)
            sizes = SIZES[modality]
            loss.append(sum(n * rank[0] for n, rank in zip(sizes, own, strict=True)) / sum(sizes))
            for whole, i in ((z, 1), (s, 2), (q, 3)):
                whole.append(torch.cat([rank[i] for rank in own], dim=1))
        found = modality_diagnostics(loss, z, s, q, TEMPERATURE)
    for modality in (0, 1):
        expected = by_hand(modality)
        assert found[modality].keys() == expected.keys()
        assert 4 <= expected["dead_prototypes"] < K
        for name, value in expected.items():
            assert found[modality][name].numpy() == pytest.approx(value, rel=2e-5), name


def test_a_prototype_is_dead_when_no_step_of_late_used_it_and_not_when_one_batch_missed_it():
    use = PrototypeUse()
    halves = [torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.5, 0.5])]
    once, always = [], []
    for step in range(12):
        metrics = {"loss": 1.0, "m/ct/use": halves[step % 2], "m/mr/use": halves[0]}
        found = use.replace(metrics, views=8)  # the mean is over 10 * 4 views: five steps
        assert "m/ct/use" not in found and found["loss"] == 1.0
        once.append(float(found["m/ct/dead_share"]))
        always.append((float(found["m/mr/dead_prototypes"]), float(found["m/mr/effective_prototypes"])))
    assert once == [0.5] + [0.0] * 11
    assert always == [(2.0, 2.0)] * 12
    for _ in range(20):  # and is dead again once it is long ago
        found = use.replace({"m/ct/use": halves[0]}, views=8)
    assert float(found["m/ct/dead_share"]) == 0.5


def test_the_use_of_prototypes_goes_on_after_a_resume():
    straight, stopped, resumed = PrototypeUse(), PrototypeUse(), PrototypeUse()
    uses = [torch.softmax(torch.randn(9), 0) for _ in range(8)]
    for use in uses[:4]:
        straight.replace({"m/ct/use": use}, 16)
        stopped.replace({"m/ct/use": use}, 16)
    resumed.load_state_dict({name: t.clone() for name, t in stopped.state_dict().items()}, "cpu")
    for use in uses[4:]:
        assert straight.replace({"m/ct/use": use}, 16) == resumed.replace({"m/ct/use": use}, 16)


def test_the_age_of_the_queue_is_that_of_its_entries():
    config = tiny(swav__queue_length=24)  # 12 of each modality, 4 of them a step
    queue = FeatureQueue(12, 2, 2, 8)
    assert queue_diagnostics(queue, 4) == queue_diagnostics(None, 4) == {}
    enqueued: list[int] = []  # the step of each entry, oldest first
    for step in range(5):
        queue.enqueue(torch.ones(2, 2, config.data.per_modality, 8))
        enqueued = [*enqueued, *[step] * 4][-12:]
        ages = step + 1 - np.array(enqueued)
        assert queue_diagnostics(queue, 4) == {
            "queue_fill": len(enqueued) / 12,
            "queue_oldest_steps": ages.max(),
            "queue_age_steps": ages.mean(),
        }
