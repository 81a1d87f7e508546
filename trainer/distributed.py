"""Ranks that agree: rank 0 decides and tells the others, as JSON (torch's object collectives are pickles)."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import UserError


class ReportedError(UserError):
    """A mistake that rank 0 reports: the other ranks stop without another line."""


class RankZeroError(RuntimeError):
    """Rank 0 failed, through no setting of the user's, and raises what it met."""


def from_rank_zero(
    decide: Callable[[], dict[str, Any]], *, rank: int, world: int, device: torch.device
) -> dict[str, Any]:
    """Run `decide` on rank 0 alone and give its JSON-like answer to every rank.

    What a parallel file system shows may differ from rank to rank for a moment, so only one of them looks. A
    UserError of rank 0 is raised on every rank (as ReportedError on the others), and so is any other
    exception (as RankZeroError): nobody waits for an answer that does not come.
    """
    if world == 1:
        return decide()
    failure: Exception | None = None
    payload = b""
    if rank == 0:
        try:
            payload = json.dumps({"answer": decide()}).encode()
        except UserError as error:
            failure = error
            payload = json.dumps({"error": str(error)}).encode()
        except Exception as error:  # noqa: BLE001 - raised again below, once the others know
            failure = error
            payload = json.dumps({"failed": type(error).__name__}).encode()
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(size, src=0)
    buffer = torch.zeros(int(size.item()), dtype=torch.uint8, device=device)
    if rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(buffer, src=0)
    if failure is not None:
        raise failure
    message = json.loads(bytes(buffer.cpu().tolist()))
    if "error" in message:
        raise ReportedError(message["error"])
    if "failed" in message:
        raise RankZeroError(f"rank 0 failed ({message['failed']})")
    return message["answer"]


def tensors_from_rank_zero(
    tensors: Mapping[str, Tensor], *, rank: int, world: int, device: torch.device
) -> dict[str, Tensor]:
    """The tensors that rank 0 has, on the CPU of every rank, to the last bit; what others give is ignored."""
    if world == 1:
        return dict(tensors)

    def describe() -> dict[str, Any]:
        kinds = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
        return {name: [kinds[name], list(value.shape)] for name, value in tensors.items()}

    found: dict[str, Tensor] = {}
    for name, (kind, shape) in from_rank_zero(describe, rank=rank, world=world, device=device).items():
        value = tensors[name] if rank == 0 else torch.empty(shape, dtype=getattr(torch, kind))
        plain = value.contiguous().reshape(-1).view(torch.uint8).to(device)
        dist.broadcast(plain, src=0)
        found[name] = plain.cpu().view(value.dtype).reshape(value.shape)
    return found


def mean_and_any(
    values: list[float], flag: bool, *, world: int, device: torch.device
) -> tuple[list[float], bool]:
    """Mean of each value over the ranks, and whether the flag is set on any: one small all-reduce.

    A value that is not finite on one rank is not finite in the mean.
    """
    if world == 1:
        return values, flag
    packed = torch.tensor([float(flag), *values], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    total, *sums = packed.tolist()
    return [value / world for value in sums], total > 0


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, world) from torchrun's environment, with its process group open; (0, 1) without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method="env://")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
