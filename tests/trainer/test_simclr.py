"""SimCLR under the same loop: its loss against the paper's formula, over ranks, and through a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from shards.errors import UserError
from tests.dist import run_ranks
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import journal
from trainer.__main__ import progress_line
from trainer.baselines.simclr import nt_xent
from trainer.build import build_model
from trainer.config import TrainConfig, few_samples_warning, load_config
from trainer.export import load_encoder
from trainer.loop import train
from trainer.optim import build_optimizer
from trainer.step import train_step

FORTY = "views.crops=[{count: 2, size: 40, share: [0.5, 1.0]}]"


def simclr(**changes: Any) -> TrainConfig:
    return tiny(method="simclr", swav={}, views__crops=[{"count": 2, "size": 16}], **changes)


def test_the_loss_is_the_formula_of_the_paper():
    generator = np.random.default_rng(0)
    z = generator.standard_normal((2, 5, 8))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    flat, expected = z.reshape(10, 8), np.zeros(5)
    for i in range(10):
        similar = np.exp(flat @ flat[i] / 0.3)
        expected[i % 5] -= np.log(similar[(i + 5) % 10] / (similar.sum() - similar[i])) / 2
    found = nt_xent(torch.from_numpy(z), 0.3)
    assert np.abs(found.numpy() - expected).max() <= 1e-6


def _step(rank: int, world: int) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients and metrics of a rank's part of one step: no batch norm, whose statistics are local."""
    config = simclr(data__batch_size=12, log_every_steps=1)
    torch.manual_seed(0)
    core = build_model(config)
    core.backbone = nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.Tanh())
    core.projection_head = nn.Linear(16, 8)
    model = DistributedDataParallel(core) if world > 1 else core
    optimizer = build_optimizer(model, config.optim)
    crops = [torch.from_numpy(c).float() / 255 for c in FakeBatches(config, rank, world)(0).crops]
    metrics = train_step(model, optimizer, None, crops, 0, config)
    gradients = {name: p.grad for name, p in core.named_parameters()}
    return (
        float(metrics["loss"]),
        gradients,
        {name: float(value) for name, value in metrics.items() if not name.endswith("/use")},
    )


def test_negatives_over_ranks_give_the_loss_and_gradients_of_one_process():
    _, gradients, metrics = _step(0, 1)
    for _, of_rank, told in run_ranks(_step, 2):
        for name, value in gradients.items():
            assert (of_rank[name] - value).abs().max() <= 1e-6, name
        assert told.keys() == metrics.keys()
        for name, value in metrics.items():
            assert told[name] == pytest.approx(value, abs=1e-6), name
    assert {"m/ct/loss", "m/xr/loss", "loss_minus_chance"} <= metrics.keys()
    assert {"m/ct/feature_std", "m/xr/effective_rank"} <= metrics.keys()


def test_images_that_all_look_alike_have_the_loss_of_chance():
    z = normalize(torch.ones(2, 6, 4), dim=2)
    assert nt_xent(z, 0.1).numpy() == pytest.approx(np.log(11))


def test_a_simclr_run_goes_on_exactly_and_gives_an_encoder(tmp_path: Path):
    config, seen = simclr(), []

    def run(name: str, stop_at: int | None = None) -> list[float]:
        asked = iter(range(1, 100))
        train(
            config,
            FakeBatches(config),
            tmp_path / name,
            dataset_fingerprint=FINGERPRINT,
            on_metrics=seen.append,
            should_stop=None if stop_at is None else lambda: next(asked) >= stop_at,
        )
        return [row["loss"] for row in journal.read(journal.journal_path(tmp_path / name))]

    straight = run("straight")
    assert "minus chance" in progress_line(seen[0], config.max_steps)
    assert run("stopped", 5) == straight[:5]
    assert run("stopped") == straight
    encoder, info = load_encoder(tmp_path / "straight" / "encoder.safetensors")
    assert encoder(torch.rand(1, 1, 16, 16)).shape == (1, encoder.feature_dim)
    assert info.backbone == "resnet-tiny"


def test_settings_of_the_other_method_are_refused_with_the_fix():
    with pytest.raises(
        Exception, match=r"swav\.prototypes=24 does nothing with method=simclr.*--set swav=\{\}"
    ):
        load_config("demo", ["method=simclr"])
    with pytest.raises(UserError, match=r"two crops of one size.*size: 40"):
        load_config("demo", ["method=simclr", "swav={}"])
    config = load_config("demo", ["method=simclr", "swav={}", FORTY])
    assert config.groups == config.data.modalities and few_samples_warning(config) is None
    with pytest.raises(ValidationError, match=r"simclr\.temperature=0\.5 does nothing with method=swav"):
        tiny(simclr={"temperature": 0.5})
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
