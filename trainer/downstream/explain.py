"""What a task takes: parameters, FLOPs and memory of a training step, counted on a step that is really taken.

The step is of a few samples; what grows with the batch is scaled up to the batch of the settings.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from trainer.downstream.task import Task

_SAMPLES = 2  # of the step: what a batch norm needs
_COPIES = 4  # of a trained parameter: itself, its gradient, two moments of AdamW


@dataclass(frozen=True)
class Cost:
    """parameters: of the network; trained: of those. flops: of one step, forward and backward, a multiply
    and an add counted as two. activation_bytes: what the backward pass needs of a batch;
    memory_bytes: with parameters, gradients, moments and inputs; what libraries need for themselves comes on
    top. loss: of the step on `input_shape` [n, ...]."""

    parameters: int
    trained: int
    batch_size: int
    input_shape: tuple[int, ...]
    flops: float
    activation_bytes: int
    memory_bytes: int
    loss: float


def step_cost(task: Task, batch_size: int, device: torch.device | str = "cpu") -> Cost:
    """Takes one step of a fresh network on the first samples of train."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = task.network().to(device).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = AdamW(trained)
    count = min(_SAMPLES, len(task.train))
    batch = [task.train.sample(i, np.random.default_rng((0, i))) for i in range(count)]
    inputs = torch.from_numpy(np.stack([sample.input for sample in batch])).to(device)
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = task.loss(network, inputs, [sample.target for sample in batch])
        loss.backward()
    optimizer.step()
    activations = sum(held.values()) * batch_size // count
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    learned = sum(p.numel() * p.element_size() for p in trained)
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        trained=sum(p.numel() for p in trained),
        batch_size=batch_size,
        input_shape=tuple(inputs.shape[1:]),
        flops=counter.get_total_flops() * batch_size / count,
        activation_bytes=activations,
        memory_bytes=weights + (_COPIES - 1) * learned + activations + inputs.nbytes * batch_size // count,
        loss=float(loss.detach()),
    )
