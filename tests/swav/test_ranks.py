"""Golden test G5: several gloo processes compute what one process computes on the concatenated batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize
from torch.nn.parallel import DistributedDataParallel

from tests.dist import run_ranks
from trainer.config import TrainConfig
from trainer.optim import build_optimizer
from trainer.step import train_step
from trainer.swav import collectives
from trainer.swav.model import MultiModalSwav
from trainer.swav.queue import FeatureQueue, build_queue
from trainer.swav.sinkhorn import sinkhorn, sinkhorn_each

MODALITIES = ("xr", "ct", "mr", "us")


def _scores(samples: int, prototypes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = normalize(torch.randn(samples, 32, generator=generator), dim=1)
    return z @ normalize(torch.randn(prototypes, 32, generator=generator), dim=1).T


def _problems() -> list[Tensor]:
    """A stacked problem of each modality, of different sizes."""
    return [_scores(n, 40, seed=n) for n in (48, 24, 36, 12)]


def _share(problem: int, rank: int, world: int) -> slice:
    """Rows of a problem that a rank holds: the last rank holds none of problem 1."""
    size = len(_problems()[problem])
    holders = world - 1 if problem == 1 else world
    if rank >= holders:
        return slice(0, 0)
    return slice(rank * size // holders, (rank + 1) * size // holders)


def _codes_of_rank(rank: int, world: int, epsilon: float) -> tuple[list[Tensor], list[Tensor]]:
    shares = [s[_share(i, rank, world)] for i, s in enumerate(_problems())]
    return sinkhorn_each(shares, epsilon), [sinkhorn(s, epsilon) for s in shares]


@pytest.mark.parametrize(("world", "epsilon"), [(2, 0.03), (3, 0.03), (4, 0.03), (2, 0.01)])
def test_g5_codes_equal_one_process_even_for_a_rank_without_a_modality(world, epsilon):
    ranks = run_ranks(_codes_of_rank, world, epsilon)
    for i, scores in enumerate(_problems()):
        expected = sinkhorn(scores, epsilon)
        for form in (0, 1):  # stacked and padded; each on its own
            found = torch.cat([rank[form][i] for rank in ranks])
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-6


def _groups_of_rank(rank: int, world: int) -> Tensor:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return sinkhorn(_scores(40, 20, seed=rank // 2)[20 * (rank % 2) :][:20], 0.03, group=groups[rank // 2])


def test_each_process_group_solves_its_own_problem():
    ranks = run_ranks(_groups_of_rank, 4)
    for pair in (0, 1):
        found = torch.cat(ranks[2 * pair : 2 * pair + 2])
        assert (found - sinkhorn(_scores(40, 20, seed=pair), 0.03)).abs().max() <= 1e-6


class Pooled(nn.Linear):
    """A backbone without batch norm, whose statistics would be each rank's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(adaptive_avg_pool2d(x, 3).flatten(1)).tanh()


def _config(optimizer: str, queue_length: int, groups: str = "per-modality") -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "max_steps": 8,
            "log_every_steps": 1,
            "data": {"batch_size": 48, "modalities": MODALITIES},
            "views": {"crops": [{"count": 2, "size": 8}, {"count": 3, "size": 6}]},
            "model": {"backbone": "resnet-tiny", "hidden_dim": 16, "feature_dim": 12},
            "swav": {
                "groups": groups,
                "prototypes": 20,
                "queue_length": queue_length,
                "queue_start_step": 1,
                "freeze_prototypes_steps": 2,
            },
            "optim": {"optimizer": optimizer, "learning_rate": 0.1 if optimizer == "larc-sgd" else 0.01},
        }
    )


def _model(config: TrainConfig) -> MultiModalSwav:
    torch.manual_seed(0)
    model = MultiModalSwav(config.model, config.swav, config.data.modalities)
    model.backbone = Pooled(9, 16)
    model.projection_head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12))
    return model


def _crops(step: int) -> list[Tensor]:
    """[count, M, B/M, 1, S, S] per group, the global batch."""
    generator = torch.Generator().manual_seed(step)
    return [torch.rand(count, 4, 12, 1, size, size, generator=generator) for count, size in ((2, 8), (3, 6))]


def _train(
    config: TrainConfig, rank: int, world: int, uneven: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any], FeatureQueue | None]:
    core = _model(config)
    model: nn.Module = DistributedDataParallel(core) if world > 1 else core
    optimizer, queue = build_optimizer(model, config.optim), build_queue(config)
    metrics: dict[str, Any] = {}
    for step in range(8):
        if uneven and world > 1:  # four ranks of one modality each
            crops = [c[:, rank] for c in _crops(step)]
            sizes = [12 if m == rank else 0 for m in range(4)]
        else:
            b = 12 // world
            crops = [c[:, :, rank * b : (rank + 1) * b].flatten(1, 2) for c in _crops(step)]
            sizes = None
        metrics = train_step(model, optimizer, queue, crops, step, config, sizes=sizes)
    return core.state_dict(), {k: float(v) for k, v in metrics.items() if not k.endswith("/use")}, queue


def _train_rank(
    rank: int, world: int, optimizer: str, queue_length: int, uneven: bool, groups: str = "per-modality"
) -> Any:
    state, metrics, queue = _train(_config(optimizer, queue_length, groups), rank, world, uneven)
    return state, metrics, None if queue is None else queue.state_dict()


@pytest.mark.parametrize(
    ("world", "optimizer", "queue_length", "uneven", "groups"),
    [
        (2, "larc-sgd", 96, False, "per-modality"),
        (3, "adamw", 144, False, "per-modality"),
        (4, "larc-sgd", 96, False, "per-modality"),
        (4, "larc-sgd", 0, True, "per-modality"),
        (2, "larc-sgd", 96, False, "shared"),
    ],
)
def test_g5_training_equals_one_process(world, optimizer, queue_length, uneven, groups):
    ranks = run_ranks(_train_rank, world, optimizer, queue_length, uneven, groups)
    state, metrics, queue = _train(_config(optimizer, queue_length, groups), 0, 1)
    for rank_state, rank_metrics, rank_queue in ranks:
        for name, value in state.items():
            assert (rank_state[name] - value).abs().max() <= (1e-6 if optimizer == "larc-sgd" else 1e-5), name
        assert rank_metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            assert rank_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        if queue is not None:
            assert int(rank_queue["filled"]) == queue.filled == 7 * (48 if groups == "shared" else 12)
            assert torch.equal(rank_queue["features"], ranks[0][2]["features"])
            if groups == "per-modality":  # one group of all modalities holds them in the order of the ranks
                assert (rank_queue["features"] - queue.features).abs().max() <= 1e-5


def _count_collectives(rank: int, world: int) -> list[str]:
    config = _config("larc-sgd", 0).model_copy(update={"log_every_steps": 1000})
    core = _model(config)
    called: list[str] = []
    for name in ("all_reduce", "all_gather"):
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            called.append(_name)
            return _original(*args, **kwargs)

        setattr(collectives.dist, name, counted)
    b = 12 // world
    crops = [c[:, :, rank * b : (rank + 1) * b].flatten(1, 2) for c in _crops(1)]
    train_step(core, build_optimizer(core, config.optim), None, crops, 1, config)
    return called


def test_a_step_of_four_modalities_takes_three_collectives_for_all_its_codes():
    assert run_ranks(_count_collectives, 2) == [["all_reduce"] * 3] * 2


def test_a_rank_that_fails_is_reported_with_its_traceback():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_ranks(_fail_on_rank_one, 2)


def _fail_on_rank_one(rank: int, world: int) -> float:
    return 1 / (1 - rank)
