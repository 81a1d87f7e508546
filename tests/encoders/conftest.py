"""A small dataset of three modalities and a run on it that is not finished."""

from pathlib import Path

import pytest

from tests.batches import make
from tests.trainer.fake import FakeBatches, tiny
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.prepare import dataset_fingerprint


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoders")
    return make.dataset(folder / "data", folder / "scratch")


def config(dataset: str, **changes) -> TrainConfig:
    intensity = {"ct": {"mode": "fixed", "center": 40, "width": 400}}
    settings = {
        "data__dataset": dataset,
        "data__modalities": list(make.MODALITIES),
        "data__batch_size": 6,
        "data__intensity": intensity,
        "swav__queue_length": 0,
        "max_steps": 9,
    }
    return tiny(**settings | changes)


def trained(config: TrainConfig, run: Path, stop: bool = False) -> Path:
    """A run folder; stop: ended early, with checkpoints of steps 3 and 6."""
    fingerprint, batches, asked = dataset_fingerprint(config.data.dataset), FakeBatches(config), [0]

    def next_batch(step: int) -> Batch:
        asked.append(step)
        return batches(step)

    def at_six() -> bool:
        return stop and asked[-1] == 5

    train(config, next_batch, run, dataset_fingerprint=fingerprint, should_stop=at_six)
    return run


@pytest.fixture(scope="session")
def run(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"log_every_steps": 3}
    return trained(config(dataset, **changes), tmp_path_factory.mktemp("runs") / "run", stop=True)
