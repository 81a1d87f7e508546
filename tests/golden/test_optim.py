"""Golden tests G8 and G10: LARC against its formula in float64; schedules at their boundaries."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from trainer.config import OptimConfig, TrainConfig
from trainer.optim import Larc, build_optimizer, learning_rate
from trainer.step import train_step
from trainer.swav.model import MultiModalSwav
from trainer.swav.queue import build_queue

RATE, MOMENTUM, DECAY, TRUST, EPS = 0.3, 0.9, 0.01, 0.001, 1e-8


def larc_in_float64(p: np.ndarray, gradients: list[np.ndarray | None]) -> np.ndarray:
    p, buffer = p.astype(np.float64), np.zeros(p.shape)
    for g in gradients:
        if g is None:
            continue
        g = g.astype(np.float64)
        p_norm, g_norm = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
        if p_norm != 0 and g_norm != 0:
            g = TRUST * p_norm / (g_norm + p_norm * DECAY + EPS) * (g + DECAY * p)
        buffer = MOMENTUM * buffer + g
        p = p - RATE * buffer
    return p


def test_g8_larc_equals_its_formula_for_three_steps():
    rng = np.random.default_rng(0)
    start = {"weight": rng.normal(size=(5, 4)), "zero bias": np.zeros(5), "no gradient": rng.normal(size=7)}
    start |= {
        "frozen": rng.normal(size=(3, 2)),
        "late": rng.normal(size=3),
        "tiny": rng.normal(size=4) * 1e-20,
    }
    gradients: dict[str, list[np.ndarray | None]] = {
        n: [rng.normal(size=v.shape) for _ in range(3)] for n, v in start.items()
    }
    gradients["no gradient"] = [np.zeros(7)] * 3
    gradients["frozen"] = [None] * 3
    gradients["late"][:2] = [None, None]
    params = {n: nn.Parameter(torch.tensor(v, dtype=torch.float32)) for n, v in start.items()}
    optimizer = Larc(params.values(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, trust=TRUST, eps=EPS)
    for step in range(3):
        for name, p in params.items():
            g = gradients[name][step]
            p.grad = None if g is None else torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    for name, p in params.items():
        expected = larc_in_float64(start[name].astype(np.float32), gradients[name])
        assert np.abs(p.detach().numpy() - expected).max() <= 1e-6, name
    assert torch.equal(params["frozen"].detach(), torch.tensor(start["frozen"], dtype=torch.float32))
    assert torch.equal(
        params["no gradient"].detach(), torch.tensor(start["no gradient"], dtype=torch.float32)
    )
    assert params["frozen"] not in optimizer.state


def test_larc_state_survives_a_save():
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    gradients = [torch.randn(4, 3) for _ in range(4)]
    runs = []
    for interrupted in (False, True):
        p = nn.Parameter(start.clone())
        optimizer = Larc([p], lr=RATE)
        for i, g in enumerate(gradients):
            if interrupted and i == 2:
                state = optimizer.state_dict()
                p = nn.Parameter(p.detach().clone())
                optimizer = Larc([p], lr=RATE)
                optimizer.load_state_dict(state)
            p.grad = g
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


def test_g10_cosine_at_first_middle_and_last_step():
    config = TrainConfig(max_steps=1000, optim=OptimConfig(learning_rate=0.6, final_learning_rate=0.0006))
    assert learning_rate(0, config) == 0.6
    assert learning_rate(500, config) == pytest.approx((0.6 + 0.0006) / 2)
    assert learning_rate(999, config) == pytest.approx(
        0.0006 + 0.2997 * (1 + math.cos(math.pi * 0.999)), abs=1e-12
    )
    assert learning_rate(1000, config) == pytest.approx(0.0006)


def test_warm_up_is_linear_and_meets_the_cosine():
    config = TrainConfig(
        max_steps=110, optim=OptimConfig(learning_rate=1.0, final_learning_rate=0, warmup_steps=10)
    )
    assert [learning_rate(s, config) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, config) == pytest.approx(0.5)


def _small(freeze: int, queue_start: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "max_steps": 10,
            "data": {"batch_size": 8, "modalities": ["xr", "ct"]},
            "views": {"crops": [{"count": 2, "size": 16}]},
            "model": {"backbone": "resnet-tiny", "hidden_dim": 8, "feature_dim": 8},
            "swav": {
                "prototypes": 6,
                "queue_length": 16,
                "queue_start_step": queue_start,
                "freeze_prototypes_steps": freeze,
            },
            "optim": {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
        }
    )


def test_g10_prototypes_are_frozen_for_exactly_n_steps_and_the_queue_fills_from_its_start():
    torch.manual_seed(0)
    config = _small(freeze=2, queue_start=3)
    model, queue = MultiModalSwav(config.model, config.swav, ("xr", "ct")), build_queue(config)
    optimizer = build_optimizer(model, config.optim)
    assert queue is not None
    moved, filled, full = [], [], []
    for step in range(6):
        before = model.prototypes["ct"].weight.detach().clone()
        train_step(model, optimizer, queue, [torch.rand(2, 8, 1, 16, 16)], step, config)
        model.prototypes.normalize()
        moved.append(not torch.allclose(model.prototypes["ct"].weight, before, atol=1e-6))
        filled.append(queue.filled)
        full.append(queue.full)
    assert moved == [False, False, True, True, True, True]
    assert filled == [0, 0, 0, 4, 8, 12]  # entries per modality and assigned crop
    assert full == [False, False, False, False, True, True]
