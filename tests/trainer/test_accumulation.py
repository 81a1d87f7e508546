"""Several micro-batches with one Sinkhorn over them all give the gradients of the whole batch."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from shards.errors import UserError
from tests.dist import run_ranks
from tests.trainer.fake import FINGERPRINT, FakeBatches, fake_sets, tiny
from tests.trainer.test_supervised import SETS, Small
from trainer import journal
from trainer.build import build_model
from trainer.config import TrainConfig, check_world
from trainer.loop import train
from trainer.optim import build_optimizer
from trainer.step import as_groups, train_step
from trainer.swav.queue import build_queue


def config(parts: int, **changes: Any) -> TrainConfig:
    return tiny(
        optim__accumulation=parts,
        data__batch_size=24,
        swav__queue_length=24,
        swav__freeze_prototypes_steps=0,
        log_every_steps=1,
        supervision={"labels": SETS, "denominator": "labelled"},
        **changes,
    )


def step_of(
    settings: TrainConfig, rank: int = 0, world: int = 1, alone: bool = False
) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:
    """Gradients, metrics and queue after one step with a full queue, without batch norm."""
    torch.manual_seed(0)
    core = build_model(settings, fake_sets(settings))
    core.backbone, core.projection_head = Small(), nn.Linear(16, 8)
    core.label_heads = nn.ModuleDict({name: nn.Linear(16, 3) for name in core.label_heads})
    queue = build_queue(settings)
    assert queue is not None
    queue.features.copy_(normalize(torch.randn(queue.features.shape), dim=-1))
    queue.filled = queue.length
    model = DistributedDataParallel(core, find_unused_parameters=True) if world > 1 and not alone else core
    batch = FakeBatches(settings, rank, world)(2)
    crops = [torch.from_numpy(c).float() / 255 for c in batch.crops]
    labels = {name: torch.from_numpy(values) for name, values in batch.labels.items()}
    optimizer = build_optimizer(model, settings.optim)
    metrics = train_step(model, optimizer, queue, crops, 2, settings, labels=labels)
    gradients = {name: p.grad for name, p in core.named_parameters() if p.grad is not None}
    return (
        gradients,
        {name: float(value) for name, value in metrics.items() if not name.endswith("/use")},
        queue.features,
    )


def _rank(rank: int, world: int, parts: int) -> Any:
    return step_of(config(parts), rank, world)


def check_equal(found: Any, expected: Any, queue: bool = True) -> None:
    for name, value in expected[0].items():
        assert (found[0][name] - value).abs().max() <= 1e-6, name
    assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-5)
    if queue:
        assert (found[2] - expected[2]).abs().max() <= 1e-6


@pytest.mark.parametrize("groups", ["per-modality", "shared"])
def test_gradients_metrics_and_queue_are_those_of_the_whole_batch(groups):
    whole = step_of(config(1, swav__groups=groups))
    for parts in (2, 3):
        check_equal(step_of(config(parts, swav__groups=groups)), whole, queue=groups == "per-modality")


def test_ranks_with_micro_batches_equal_one_process():
    whole = step_of(config(1))
    for found in run_ranks(_rank, 2, 3):
        check_equal(found, whole)


def test_a_sinkhorn_for_each_micro_batch_would_be_another_method():
    """The control of the tests above: the mean gradient of three steps of a third of the images each."""
    whole, _, _ = step_of(config(1))
    thirds = []
    for rank in range(3):  # a rank's part of the batch, without the scores of the others
        gradients, _, _ = step_of(config(1), rank, 3, alone=True)
        thirds.append(gradients)
    name = "projection_head.weight"
    naive = torch.stack([gradients[name] for gradients in thirds]).mean(0)
    assert (naive - whole[name]).norm() > 0.05 * whole[name].norm()


def test_batch_norm_averages_each_micro_batch_once():
    settings = tiny(optim__accumulation=2, swav__queue_length=0)
    torch.manual_seed(0)
    model = build_model(settings).train()
    plain = deepcopy(model)
    crops = [torch.from_numpy(c).float() / 255 for c in FakeBatches(settings)(0).crops]
    groups = as_groups(crops, settings)
    with torch.no_grad():
        for half in (slice(0, 2), slice(2, 4)):  # of the four images of each of two modalities
            plain([torch.cat([g[:, half], g[:, 4:][:, half]], dim=1) for g in groups])
    train_step(model, build_optimizer(model, settings.optim), None, crops, 0, settings)
    expected = {name: value for name, value in plain.named_buffers() if "running" in name or "num" in name}
    assert len(expected) > 20
    for name, value in model.named_buffers():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_a_run_with_micro_batches_goes_on_exactly(tmp_path: Path):
    settings = tiny(optim__accumulation=2)

    def run(name: str, stop_at: int = 1000) -> list[float]:
        asked = iter(range(1, 1000))
        train(
            settings,
            FakeBatches(settings),
            tmp_path / name,
            dataset_fingerprint=FINGERPRINT,
            should_stop=lambda: next(asked) >= stop_at,
        )
        return [row["loss"] for row in journal.read(journal.journal_path(tmp_path / name))]

    straight = run("straight")
    assert run("stopped", 5) == straight[:5]
    assert run("stopped") == straight


def test_parts_that_do_not_divide_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="accumulation=3 does not divide the 4 images of each modality"):
        tiny(optim__accumulation=3)
    with pytest.raises(UserError, match="multiple of 16"):
        check_world(tiny(optim__accumulation=4), 2)
    with pytest.raises(ValueError, match="micro-batch would have fewer negatives"):
        tiny(optim__accumulation=2, method="simclr", swav={}, views__crops=[{"count": 2, "size": 16}])
