"""Batch norms over several ranks: what one process computes on the concatenated batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.errors import UserError
from tests.dist import run_ranks
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import checkpoint
from trainer.build import build_model
from trainer.compute import prepare_network
from trainer.config import TrainConfig
from trainer.loop import in_parallel, train
from trainer.models.syncbn import NODE_VARIABLES, SyncedBatchNorm, node_ranks, synchronise
from trainer.optim import build_optimizer
from trainer.precision import Precision
from trainer.step import train_step

CPU = torch.device("cpu")


def norms_and_input() -> tuple[nn.Module, Tensor]:
    """Of all ranks: [n, C, S, S], with a mean that is large beside the deviation."""
    generator = torch.Generator().manual_seed(0)
    return nn.BatchNorm2d(5), 40 + torch.randn(12, 5, 3, 3, generator=generator)


def _one_layer(rank: int, world: int, uneven: bool) -> tuple[Tensor, ...]:
    norm, x = norms_and_input()
    torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    layer = nn.Sequential(norm)
    if world > 1:
        synchronise(layer, None)
    edges = [0, 3, 12] if uneven else [12 * i // world for i in range(world + 1)]
    part = x[edges[rank] : edges[rank + 1]].clone().requires_grad_()
    y = layer(part)
    (y.pow(3) * torch.arange(y[0].numel()).view_as(y[0])).sum().backward()
    norm = layer[0]
    return y.detach(), part.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


@pytest.mark.parametrize(("world", "uneven"), [(2, False), (2, True), (3, False)])
def test_a_layer_computes_as_batch_norm_of_torch_on_all_samples(world, uneven):
    ranks = run_ranks(_one_layer, world, uneven)
    y, dx, *of_parameters, mean, var = _one_layer(0, 1, False)
    assert torch.allclose(torch.cat([r[0] for r in ranks]), y, atol=1e-4)
    assert torch.allclose(torch.cat([r[1] for r in ranks]), dx, rtol=1e-4, atol=1e-3 * float(dx.abs().max()))
    for i, expected in enumerate(of_parameters, 2):
        assert torch.allclose(sum(r[i] for r in ranks), expected, rtol=1e-3)
    for rank in ranks:
        assert torch.allclose(rank[4], mean, rtol=1e-6) and torch.allclose(rank[5], var, rtol=1e-5)


def config(**changes) -> TrainConfig:
    small = {"data__batch_size": 12, "swav__queue_length": 24, "optim__optimizer": "larc-sgd"}
    return tiny(**{**small, **changes})


def _steps(rank: int, world: int, changes: dict, dtype: torch.dtype | None = None) -> tuple:
    """Losses over all ranks, and what the network is after them. Two crop sizes: two forwards a step."""
    crops = [{"count": 2, "size": 16}, {"count": 2, "size": 12}]
    settings = config(model__sync_batchnorm="global", log_every_steps=1, views__crops=crops, **changes)
    torch.manual_seed(0)
    network = build_model(settings)
    prepare_network(network, settings.model, CPU, world)
    assert isinstance(network.projection_head[1], SyncedBatchNorm) is (world > 1)
    model = in_parallel(network, CPU) if world > 1 else network
    optimizer, losses = build_optimizer(network, settings.optim), []
    batches = FakeBatches(settings, rank, world)
    for step in range(4):
        crops = [torch.from_numpy(c) for c in batches(step).crops]
        how = Precision(dtype)
        losses.append(float(train_step(model, optimizer, None, crops, step, settings, precision=how)["loss"]))
    return losses, network.state_dict()


def _three_ways(rank: int, world: int) -> list[tuple]:
    """Plain, with activations computed once more (and their collectives), in bf16 with micro-batches."""
    recomputed = {"model__activation_checkpointing": True}
    parts = {"optim__accumulation": 2, "data__batch_size": 16, "swav__queue_length": 16}
    return [_steps(rank, world, *how) for how in (({},), (recomputed,), (parts, torch.bfloat16))]


def test_two_ranks_with_global_statistics_train_as_one_process_does_on_the_whole_batch():
    ranks, (losses, state) = run_ranks(_three_ways, 2), _steps(0, 1, {})
    for plain, recomputed, half in ranks:
        for rank_losses, rank_state in (plain, recomputed):
            assert rank_losses == pytest.approx(losses, rel=1e-5)
            assert list(rank_state) == list(state)
            for name, value in state.items():
                assert (rank_state[name] - value).abs().max() <= 1e-5, name
        assert all(torch.tensor(half[0]).isfinite())
        assert all(v.isfinite().all() and v.dtype != torch.bfloat16 for v in half[1].values())
    assert [how[0] for how in ranks[0]] == [how[0] for how in ranks[1]]


def _nodes(rank: int, world: int) -> tuple[Tensor, list[int]]:
    """Four ranks on two nodes."""
    os.environ.update(zip(NODE_VARIABLES, (str(rank % 2), "2"), strict=True))
    network = build_model(config())
    prepare_network(network, config(model__sync_batchnorm="node").model, CPU, world)
    norm = network.projection_head[1]
    norm(torch.full((3, norm.num_features), float(rank)) + torch.arange(3.0)[:, None])
    return norm.running_mean, dist.get_process_group_ranks(norm.group)


def test_statistics_of_a_node_are_those_of_its_ranks():
    for rank, (mean, ranks) in enumerate(run_ranks(_nodes, 4)):
        first = rank // 2 * 2
        assert ranks == [first, first + 1]
        assert torch.allclose(mean, torch.full_like(mean, 0.1 * (1 + first + 0.5)))


def test_nodes_of_different_sizes_are_found_and_what_cannot_be_known_is_refused():
    assert node_ranks([(0, 2), (1, 2), (0, 1), (0, 3), (1, 3), (2, 3)]) == [[0, 1], [2], [3, 4, 5]]
    for unclear in ([(-1, -1)], [(0, 2), (0, 2)], [(0, 2)], [(0, 2), (1, 2), (1, 2), (0, 2)]):
        with pytest.raises(UserError, match="start them with torchrun or Ray"):
            node_ranks(unclear)


def _run(rank: int, world: int, run_dir: str) -> list[float]:
    settings = config(model__sync_batchnorm="global", max_steps=3)
    batches = FakeBatches(settings, rank, world)
    result = train(settings, batches, Path(run_dir), rank=rank, world=world, dataset_fingerprint=FINGERPRINT)
    return result.losses


def test_a_run_on_two_cpu_ranks_synchronises_and_on_one_has_the_same_losses(tmp_path):
    two = run_ranks(_run, 2, str(tmp_path / "two"))
    assert two[0] == two[1] == pytest.approx(_run(0, 1, str(tmp_path / "one")), rel=1e-5)
    names = [list(checkpoint.load(tmp_path / n, 3).part("model")) for n in ("one", "two")]
    assert sorted(names[0]) == sorted(names[1])


def _kernels(rank: int, world: int, device: str) -> tuple[Tensor, ...]:
    norm, x = norms_and_input()
    layer = nn.Sequential(norm)
    synchronise(layer, None)
    layer.to(device)
    x = x.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    found = y, x.grad, layer[0].weight.grad, layer[0].bias.grad, layer[0].running_mean, layer[0].running_var
    return tuple(t.detach().cpu() for t in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: this machine has none")
def test_the_fused_kernels_of_a_gpu_compute_as_the_plain_formulas_do():
    on_gpu, on_cpu = (_kernels(0, 1, device) for device in ("cuda", "cpu"))
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
