"""Golden tests G1, G2, G4, G6, G7, G15 of the method."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.alarms import signs
from trainer.config import load_config
from trainer.swav.diagnostics import modality_diagnostics
from trainer.swav.loss import swapped_prediction
from trainer.swav.sinkhorn import _linear, _log_domain, sinkhorn, sinkhorn_each

S = torch.tensor([[0.9, 0.1, -0.3], [0.8, 0.2, 0.1], [0.7, -0.5, 0.4], [-0.2, 0.6, 0.5]])
CROP_1 = torch.tensor([[0.8, 0, -0.2], [0.6, 0.3, 0], [0.5, -0.4, 0.5], [-0.1, 0.7, 0.3]])
CROP_2 = torch.tensor([[0.7, 0.2, -0.1], [0.9, 0.1, 0.2], [0.6, -0.3, 0.3], [-0.3, 0.5, 0.6]])
G1 = {
    0.05: [
        [0.999433, 0.000566, 0],
        [0.963581, 0.029816, 0.006603],
        [0.046668, 0, 0.953332],
        [0, 0.818685, 0.181315],
    ],
    0.03: [
        [0.999999, 0.000001, 0],
        [0.999386, 0.000509, 0.000105],
        [0.015233, 0, 0.984767],
        [0, 0.829521, 0.170479],
    ],
}


def unit_scores(samples: int, prototypes: int, features: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = normalize(torch.randn(samples, features, generator=generator), dim=1)
    c = normalize(torch.randn(prototypes, features, generator=generator), dim=1)
    return z @ c.T


@pytest.mark.parametrize("epsilon", [0.05, 0.03])
@pytest.mark.parametrize("solve", [_linear, _log_domain])
def test_g1_codes_equal_the_published_numbers(epsilon, solve):
    codes = solve(S.unsqueeze(0), epsilon, 3, None, None)[0]
    assert (codes - torch.tensor(G1[epsilon])).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("epsilon", "loss", "norm"), [(0.05, 0.9209352, 2.2122600), (0.03, 0.8384664, 2.2493143)]
)
def test_g2_loss_and_gradient_equal_the_published_numbers(epsilon, loss, norm):
    scores = torch.stack([S, CROP_1, CROP_2]).requires_grad_()
    codes = torch.stack([sinkhorn(S, epsilon), sinkhorn(CROP_1, epsilon)])
    found = swapped_prediction(scores, codes, (0, 1), 0.1)
    found.backward()
    gradient = scores.grad.flatten(0, 1)
    assert abs(found.item() - loss) <= 1e-6
    assert abs(gradient.norm().item() - norm) <= 1e-6
    if epsilon == 0.05:
        expected = torch.tensor([[-0.000210, 0.000208, 0.000002], [-0.008421, 0.008007, 0.000414]])
        assert (gradient[[0, 8]] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("epsilon", [0.025, 0.03, 0.05])
def test_g4_log_domain_equals_linear(epsilon):
    scores = unit_scores(1024, 3000).unsqueeze(0)
    linear, log = (solve(scores, epsilon, 3, None, None) for solve in (_linear, _log_domain))
    assert (linear - log).abs().max() <= 3e-7


@pytest.mark.parametrize("epsilon", [0.001, 0.005, 0.0229, 0.023])
@pytest.mark.parametrize("aligned", [False, True])
def test_g4_codes_are_finite_at_any_epsilon(epsilon, aligned):
    scores = torch.cat([unit_scores(64, 300), torch.ones(64, 300) if aligned else -torch.ones(64, 300)])
    codes = sinkhorn(scores, epsilon)
    assert codes.isfinite().all()
    assert (codes.sum(1) - 1).abs().max() <= 1e-5


def test_half_precision_scores_are_solved_in_float32():
    codes = sinkhorn(unit_scores(64, 300).half(), 0.03)
    assert codes.dtype == torch.float32
    assert codes.isfinite().all()


def test_g6_rows_sum_to_one_and_columns_are_nearly_equal():
    codes = sinkhorn(unit_scores(1024, 3000, features=256), 0.03)
    assert (codes.sum(1) - 1).abs().max() <= 1e-5
    mass = codes.sum(0) / 1024 * 3000
    assert mass.min() >= 0.92
    assert mass.max() <= 1.01


@pytest.mark.parametrize("epsilon", [0.015, 0.03])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_codes_equal_the_textbook_form_in_float64(epsilon, iterations):
    """Q = exp(S / epsilon), divided by its sum, then columns to 1/K and rows to 1/B in turn, times B."""
    scores = unit_scores(200, 90)
    q = (scores.double() / epsilon).exp()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True) * 90
        q /= q.sum(1, keepdim=True) * 200
    assert (sinkhorn(scores, epsilon, iterations) - q * 200).abs().max() <= 1e-6


@pytest.mark.parametrize("epsilon", [0.01, 0.03])
def test_g6_codes_follow_permutations_and_ignore_a_constant(epsilon):
    scores = unit_scores(128, 60)
    codes = sinkhorn(scores, epsilon)
    rows, columns = torch.randperm(128), torch.randperm(60)
    assert torch.allclose(sinkhorn(scores[rows][:, columns], epsilon), codes[rows][:, columns], atol=1e-5)
    assert torch.allclose(sinkhorn(scores - 0.3, epsilon), codes, atol=2e-5)


@pytest.mark.parametrize("stacked_below", [1, 1 << 20])
def test_problems_of_any_sizes_together_equal_separate_ones(monkeypatch, stacked_below):
    monkeypatch.setattr("trainer.swav.sinkhorn.STACKED_BELOW", stacked_below)
    problems = [unit_scores(n, 40, seed=n) for n in (32, 7, 0, 19)]
    for epsilon in (0.03, 0.01):
        found = sinkhorn_each(problems, epsilon)
        for q, scores in zip(found, problems, strict=True):
            assert q.shape == scores.shape
            assert torch.allclose(q, sinkhorn(scores, epsilon), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.005, 0.03])
def test_g7_identical_features_give_uniform_codes_and_a_loss_of_ln_k(epsilon):
    k, views, batch = 3000, 8, 64
    z = normalize(torch.ones(batch, 128), dim=1)
    prototypes = normalize(torch.randn(k, 128, generator=torch.Generator().manual_seed(1)), dim=1)
    codes = sinkhorn(z @ prototypes.T, epsilon)
    assert (codes * k - 1).abs().max() <= 1e-3
    # prototypes at one distance from that point are what a collapsed run ends with: the least loss of such
    # codes
    level = torch.full((views, batch, k), 0.4)
    loss = swapped_prediction(level, codes.expand(2, batch, k), (0, 1), 0.1)
    assert abs(loss.item() - math.log(k)) <= 1e-4
    assert round(loss.item(), 3) == 8.006


def _diagnose(features: Tensor, prototypes: Tensor) -> dict[str, float]:
    scores = features @ prototypes.T
    codes = torch.stack([sinkhorn(scores[a], 0.03) for a in (0, 1)])
    loss = swapped_prediction(scores, codes, (0, 1), 0.1)
    return {
        name: value.item()
        for name, value in modality_diagnostics([loss], [features], [scores], [codes], 0.1)[0].items()
        if name != "use"
    }


def _signs(values: dict[str, float]) -> set[str]:
    found = signs(values, 10_000, load_config("demo", ["swav.prototypes=64"]))
    return {sign for sign, advice in found.items() if advice is not None}


def test_g7_diagnostics_fire_on_collapse_only():
    generator = torch.Generator().manual_seed(0)
    prototypes = normalize(torch.randn(64, 32, generator=generator), dim=1)
    one_point = normalize(torch.randn(32, generator=generator), dim=0).expand(4, 100, 32)
    collapsed = _diagnose(one_point, prototypes)
    assert _signs(collapsed) == {"one_point", "uniform_codes", "loss_at_chance"}
    assert collapsed["loss_minus_ln_k"] >= 0
    assert collapsed["target_perplexity"] == pytest.approx(64, rel=1e-3)
    assert collapsed["effective_rank"] == pytest.approx(1, abs=1e-3)

    image = torch.randn(100, 32, generator=generator)
    healthy = _diagnose(
        normalize(image + 0.1 * torch.randn(4, 100, 32, generator=generator), dim=2), prototypes
    )
    assert _signs(healthy) == set()
    assert healthy["loss_minus_ln_k"] < -1
    assert healthy["feature_std"] > 0.9
    assert healthy["effective_rank"] > 25
    assert healthy["effective_prototypes"] > 50
    assert healthy["dead_prototypes"] == 0


def test_dead_prototypes_are_counted():
    prototypes = normalize(torch.eye(32)[:8], dim=1)
    features = prototypes[:2].repeat(50, 1).expand(4, 100, 32)  # six of eight prototypes are never near
    values = _diagnose(features, prototypes)
    assert values["dead_prototypes"] == 6
    assert values["effective_prototypes"] == pytest.approx(2, abs=0.1)


def test_g15_a_minority_keeps_prototypes_only_with_a_sinkhorn_of_its_own():
    """The paper's motivation: 90 images of one modality and 10 of another share 50 prototypes, or have
    their own.
    """
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(2, 32, generator=generator), dim=1)
    z = [
        normalize(centres[m] + 0.15 * torch.randn(n, 32, generator=generator), dim=1)
        for m, n in ((0, 900), (1, 100))
    ]
    prototypes = normalize(torch.randn(50, 32, generator=generator) * 0.2 + centres.mean(0), dim=1)

    def used(codes: Tensor) -> float:
        share = codes.mean(0)
        return (-(share * share.clamp_min(1e-12).log()).sum()).exp().item()

    together = sinkhorn(torch.cat(z) @ prototypes.T, 0.03)
    alone = sinkhorn(z[1] @ prototypes.T, 0.03)
    assert used(alone) > 45
    assert used(together[900:]) < 0.5 * used(alone)
