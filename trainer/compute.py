"""How a run is computed, and not what: kernels, threads, layout, garbage collection, the way to the device.

What changes a process is put back when the run ends.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.embedder import Embedder
from trainer.models.recompute import recompute_activations
from trainer.models.resnet import ResNet
from trainer.models.syncbn import node_group, synchronise


def prepare_network(model: Embedder, config: ModelConfig, device: torch.device, world: int) -> None:
    """Move the network to the device and arrange its training, in place: names of tensors stay as they are.

    With sync_batchnorm=node a collective of all ranks. Raises UserError for a backbone that does not
    allow it.
    """
    model.to(device).train()
    if not any(p.ndim == 5 for p in model.parameters()):  # a network for volumes
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.sync_batchnorm != "off" and world > 1:
        synchronise(model, node_group(device) if config.sync_batchnorm == "node" else None)
    if config.activation_checkpointing:
        recompute_activations(model.backbone)
    if config.compile == "stages":
        compile_stages(model.backbone)


def compile_stages(backbone: nn.Module) -> None:
    """torch.compile each stage of our ResNets, and another network as a whole, in place: Module.compile keeps
    the names of tensors. A graph for each crop size, compiled in its first step."""
    stages = [backbone]
    if isinstance(backbone, ResNet):
        stages = [backbone.get_submodule(name) for name in backbone.stages]
    for stage in stages:
        stage.compile(dynamic=False)


@contextmanager
def fixed_compute(device: torch.device, threads: int) -> Iterator[None]:
    """On a CPU: so many threads and deterministic kernels only, because both decide the last bits. On a GPU:
    the fastest convolution kernel for each of the few shapes."""
    if device.type == "cuda":
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
        return
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    debugging: Any = torch.utils.deterministic
    fills = debugging.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    debugging.fill_uninitialized_memory = False  # costs time and changes no result of ours
    try:
        with warnings.catch_warnings():
            # DDP: 1x1 kernels have several layouts that are all contiguous; nothing to be done about it.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
        debugging.fill_uninitialized_memory = fills


@contextmanager
def scheduled_collection(every_steps: int) -> Iterator[Callable[[int], None]]:
    """Garbage is collected every so many steps, where the body calls what is yielded with the number of steps
    done: on all ranks at the same step, since a rank that pauses alone makes all others wait.

    What is there at the start (modules, the network) is not looked at again.
    """

    def collect(steps_done: int) -> None:
        if steps_done % every_steps == 0:
            gc.collect()

    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.disable()
    if not frozen:
        gc.freeze()
    try:
        yield collect
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def host_arrays(device: torch.device) -> Callable[[tuple[int, ...]], NDArray[np.uint8]]:
    """What allocates uint8 arrays for batches on their way to `device`: for a GPU in pinned memory, which it
    copies from on its own. `upload` knows them.

    No buffers of ours: torch keeps a pinned block until nobody holds its array and the copies out of it are
    done, and then hands it out again. Pinning takes milliseconds, but a few blocks take turns for ever.
    """

    def pinned(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        if device.type != "cuda":
            return torch.empty(shape, dtype=torch.uint8).numpy()
        with torch.cuda.device(device):  # a thread begins on GPU 0, where it would open a context
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()

    return pinned


def step_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when the device has done what it was given: a GPU computes while the host is ahead of it."""

    def settled() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return settled if device.type == "cuda" else time.perf_counter


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A batch's array on the device. A GPU copies it while the host goes on; an array that is not pinned
    (labels, batches made in this process) is copied to a pinned one before."""
    # Of host_arrays: the tensor itself, by whose storage torch knows which block the copy holds.
    pinned = array.base if isinstance(array.base, Tensor) and array.base.shape == array.shape else None
    if device.type != "cuda":
        return pinned if pinned is not None else torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if pinned is None:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        pinned = torch.empty(array.shape, dtype=dtype, pin_memory=True)
        np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)
