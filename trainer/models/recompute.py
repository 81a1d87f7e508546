"""Activation checkpointing (Chen et al. 2016): the activations inside of a block are not kept for the
backward but computed once more, so a network takes less memory and one more forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards.errors import UserError


def recompute_activations(backbone: nn.Module) -> None:
    """In place; names of parameters and what a forward gives stay. Raises UserError: see find_blocks."""
    for block in find_blocks(backbone):
        block.forward = partial(_run, block, block.forward)


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """Members of the outermost sequences of a network that hold several layers with parameters: residual
    blocks, transformer layers, stages. Raises UserError where there are none."""
    found = _blocks(network)
    if not found:
        raise UserError(
            f"model.activation_checkpointing=true finds no blocks in {type(network).__name__} (members of an "
            "nn.Sequential or nn.ModuleList): set it to false, or choose another backbone"
        )
    return found


def _blocks(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [member for member in module if _layers(member) > 1]
    return [block for child in module.children() for block in _blocks(child)]


def _layers(module: nn.Module) -> int:
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _run(block: nn.Module, forward: Any, *args: Any, **options: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    contexts = partial(_contexts, list(block.buffers()))
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **options)


def _contexts(buffers: Sequence[Tensor]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the forward, and of computing it once more."""
    return nullcontext(), _unchanged(buffers)


@contextmanager
def _unchanged(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Batch norms count a batch and move their running statistics in every forward: not in the second one,
    which ends early, where nothing more is needed, so it cannot be taken back but by a copy."""
    with torch.no_grad():
        before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
