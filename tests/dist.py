"""Runs a test function on n gloo ranks of this machine."""

import io
import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_SECONDS = 120
# What takes seconds to import, and ranks would import each for itself; torch._dynamo: any optimizer does it.
_IMPORTED_ONCE = ["torch", "torch.distributed", "torch._dynamo", "trainer.loop", "tests.trainer.fake"]


def _context() -> Any:
    context = mp.get_context("forkserver")  # no rank inherits this process' threads
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


def exit_code(function: Callable[..., Any], *args: Any) -> int | None:
    """Of a process that runs `function(*args)`: minus the signal that ended it, None if it did not end."""
    process = _context().Process(target=function, args=args, daemon=True)
    process.start()
    process.join(_TIMEOUT_SECONDS)
    code: int | None = process.exitcode
    process.kill()
    return code


def run_ranks(function: Callable[..., Any], n: int, *args: Any) -> list[Any]:
    """`function(rank, world, *args)` on n processes that share a gloo group; their results in rank order.

    function must be importable (defined at the top of a module). Results may hold tensors. Raises
    AssertionError with a rank's traceback if it fails, and ends the other ranks.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(n):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(function, rank, n, f"{folder}/store", sender, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=_TIMEOUT_SECONDS)
        assert ready, f"ranks {sorted(waiting.values())} did not answer in {_TIMEOUT_SECONDS} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            failure, payload = pipe.recv()
            assert failure is None, f"rank {rank} failed:\n{failure}"
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    function: Callable[..., Any], rank: int, world: int, store: str, sender: Connection, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # more would hang: threads of the process that was forked are gone
    failure, payload = None, b""
    try:
        dist.init_process_group(
            "gloo",
            init_method=Path(store).as_uri(),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_TIMEOUT_SECONDS),
        )
        buffer = io.BytesIO()
        torch.save(function(rank, world, *args), buffer)
        payload = buffer.getvalue()
    except Exception:  # noqa: BLE001 - whatever a rank raises is the test's failure, told by the parent
        failure = traceback.format_exc()
    sender.send((failure, payload))
    sender.close()
    if failure is None:
        dist.destroy_process_group()
