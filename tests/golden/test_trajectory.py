"""Golden test G3: 20 steps of SwAV, rebuilt from the text of the method with this project's train_step."""

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from trainer.config import TrainConfig
from trainer.models.heads import projection_head
from trainer.optim import build_optimizer
from trainer.step import train_step
from trainer.swav.model import MultiModalSwav
from trainer.swav.queue import build_queue

GOLDEN = json.loads((Path(__file__).parent / "swav_trajectory.json").read_text())
SETTINGS = [name for name in GOLDEN if name != "_meta"]
STEPS = 20


def det(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    values = np.random.RandomState(crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32))


class Backbone(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(adaptive_avg_pool2d(x, 4).flatten(1)).relu()


def config_of(epsilon: float, base_rate: float) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "max_steps": STEPS,
            "data": {"batch_size": 8, "modalities": ["xr"]},
            "views": {"crops": [{"count": 2, "size": 32}, {"count": 3, "size": 16}]},
            "model": {"backbone": "resnet-tiny", "hidden_dim": 24, "feature_dim": 16},
            "swav": {
                "prototypes": 20,
                "epsilon": epsilon,
                "queue_length": 24,
                "queue_start_step": 8,
                "freeze_prototypes_steps": 6,
            },
            "optim": {"learning_rate": base_rate},
        }
    )


def golden_model(config: TrainConfig) -> MultiModalSwav:
    model = MultiModalSwav(config.model, config.swav, config.data.modalities)
    model.backbone, model.projection_head = Backbone(16, 32), projection_head(32, 24, 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                shape = tuple(parameter.shape)
                parameter.copy_(det(golden_name(name), shape, shape[1] ** -0.5))
            else:
                parameter.fill_(1)
    return model.train()


def golden_name(name: str) -> str:
    return name.replace("prototypes.xr.", "prototypes.")


def crop(step: int, index: int) -> Tensor:
    """Crop `index` of step `step`: [8, 1, n, n]."""
    n = 32 if index < 2 else 16
    g = np.linspace(0, 1, n)
    y, x = np.meshgrid(g, g, indexing="ij")
    waves = [
        np.sin(2 * np.pi * ((1 + k % 3) * x + (1 + k % 5) * y) + 0.7 * (k % 7))
        for k in range(8 * step, 8 * step + 8)
    ]
    noise = np.random.RandomState(1000 * step + index).standard_normal((8, 1, n, n))
    return torch.from_numpy((np.stack(waves)[:, None] + 0.3 * noise).astype(np.float32))


@pytest.mark.parametrize("setting", SETTINGS)
def test_g3_losses_and_final_state_equal_the_reference(setting):
    epsilon, base_rate = (float(part) for part in setting.removeprefix("eps").split("_lr"))
    config, golden = config_of(epsilon, base_rate), GOLDEN[setting]
    model, queue = golden_model(config), build_queue(config)
    optimizer = build_optimizer(model, config.optim)
    losses = []
    for step in range(STEPS):
        crops = [torch.stack([crop(step, v) for v in group]) for group in ((0, 1), (2, 3, 4))]
        losses.append(float(train_step(model, optimizer, queue, crops, step, config)["loss"]))

    deviation = np.abs(np.array(losses) - np.array(golden["losses"])).max()
    assert deviation <= 1e-5
    state = {golden_name(name): value for name, value in model.state_dict().items()}
    for name, norm in golden["param_l2"].items():
        assert abs(state[name].norm().item() - norm) <= 1e-4, name
    row = state["prototypes.weight"][0]
    assert (row - torch.tensor(golden["prototypes_row0"])).abs().max() <= 1e-4
    assert queue is not None
    assert queue.full
    for crop_features, total, norm in zip(
        queue.features[0], golden["queue_sum"], golden["queue_l2"], strict=True
    ):
        assert abs(crop_features.sum().item() - total) <= 1e-3
        assert abs(crop_features.norm().item() - norm) <= 1e-4
