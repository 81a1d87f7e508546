"""A tiny run without a dataset: batches that are functions of the step, for every world size the same."""

import numpy as np

from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.labels import LabelSet

FINGERPRINT = "madeup"


def changed(tree: dict, changes: dict) -> TrainConfig:
    """A tree of settings with changes `a__b=value`."""
    for name, value in changes.items():
        node = tree
        *parents, leaf = name.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return TrainConfig.model_validate(tree)


def tiny(**changes) -> TrainConfig:
    tree = {
        "max_steps": 12,
        "log_every_steps": 4,
        "data": {"modalities": ["ct", "xr"], "batch_size": 8},
        "views": {
            "crops": [{"count": 2, "size": 16}, {"count": 2, "size": 8}],
            "energy_probability": 0,
        },
        "model": {"backbone": "resnet-tiny", "hidden_dim": 16, "feature_dim": 8},
        "swav": {"prototypes": 8, "queue_length": 16, "freeze_prototypes_steps": 3, "queue_start_step": 2},
        "optim": {"optimizer": "adamw", "learning_rate": 0.002},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }
    return changed(tree, changes)


class FakeBatches:
    """step -> Batch: this rank's contiguous part of each modality's images of the step."""

    def __init__(self, config: TrainConfig, rank: int = 0, world: int = 1, bands=None) -> None:
        self.config, self.rank, self.world = config, rank, world

    def __call__(self, step: int) -> Batch:
        data = self.config.data
        share = data.per_modality // self.world
        own = range(self.rank * share, (self.rank + 1) * share)
        draws = [(m, step * data.per_modality + i) for m in range(len(data.modalities)) for i in own]
        crops = tuple(
            np.stack([image(m, draw, group.size, group.count) for m, draw in draws], axis=1)
            for group in self.config.views.crops
        )
        keys = tuple(f"{data.modalities[m]}{draw}" for m, draw in draws)
        labels = {one.name: fake_labels(one.kind, draws) for one in self.config.supervision.labels}
        return Batch(step, crops, data.modalities, keys, (0,) * len(keys), {"read": 0.0}, labels=labels)


def fake_sets(config: TrainConfig) -> tuple[LabelSet, ...]:
    """What the run folder of a run with labels is held to."""
    return tuple(LabelSet(one.name, one.kind, ("a", "b", "c"), "d") for one in config.supervision.labels)


def fake_labels(kind: str, draws: list[tuple[int, int]]) -> np.ndarray:
    """Of each (modality, draw): a function of the two; a quarter has none, some entries are unknown."""
    random = [np.random.default_rng((7, *draw)) for draw in draws]
    if kind == "classes":
        return np.array([max(r.integers(-1, 3), r.integers(-1, 1)) for r in random], np.int64)
    return (
        np.stack([r.integers(-1, 2, 3) * (r.random() > 0.25) - (r.random() > 0.9) for r in random])
        .clip(-1, 1)
        .astype(np.int8)
    )


def image(modality: int, draw: int, size: int, count: int) -> np.ndarray:
    """Crops of one sample: a grating of its own, with noise."""
    random = np.random.default_rng((modality, draw, size))
    axis = np.linspace(0, 1, size)
    wave = np.sin(6.28 * (1 + draw % 4) * (axis[:, None] + (1 + modality) * axis[None, :]))
    noisy = 128 + 60 * wave + random.normal(0, 20, (count, size, size))
    return noisy.clip(0, 255).astype(np.uint8)
