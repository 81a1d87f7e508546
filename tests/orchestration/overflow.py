"""The driver of test_ray_overflow.py: a feed on a cluster, and a second node that it starts and kills.

python -m tests.orchestration.overflow ADDRESS actor|node FOLDER
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from orchestration.cluster import connected
from orchestration.feed import Feed, Feeders
from tests.orchestration import jobs
from tests.orchestration.conftest import free_ports
from trainer.batches import Batch


def large(offset: int) -> Callable[[int], Batch]:
    """Batches that tell their step, and go through the object stores of both nodes."""

    def make(step: int) -> Batch:
        crops = np.full((2, 3, 256, 256), (step + offset) % 251, np.uint8)
        return Batch(step, (crops,), ("ct",), ("a", "b", "c"), (0, 0, 0), {})

    return make


def read(feed: Feed, steps: Iterator[int], number: int) -> None:
    """So many batches, each of which has to be the right one."""
    for step in (next(steps) for _ in range(number)):
        batch = feed(step)
        assert batch.step == step and (batch.crops[0] == step % 251).all()


def read_until(
    feed: Feed, steps: Iterator[int], elsewhere: int, node: subprocess.Popen | None = None
) -> None:
    """Batches, with pauses, until so many actors of the other node are at work."""

    def reached() -> bool:
        read(feed, steps, 1)
        return feed.overflowing == elsewhere

    jobs.poll(f"{elsewhere} actors elsewhere", reached, node)


def kill_an_actor(feed: Feed, steps: Iterator[int], node: subprocess.Popen) -> None:
    (actor,) = jobs.workers(node.pid, "ray::Augmenter")
    read(feed, steps, 10)
    jobs.kill(actor)
    read_until(feed, steps, 0, node)
    read_until(feed, steps, 1, node)  # another one in its place


def kill_the_node(feed: Feed, steps: Iterator[int], node: subprocess.Popen) -> None:
    for descendant in jobs.descendants(node.pid):
        jobs.kill(descendant)
    node.kill()
    read_until(feed, steps, 0)
    read(feed, steps, 50)


def main(address: str, victim: str, folder: Path) -> None:
    with connected(address), Feed(large, (0,), Feeders(1, 1, overflow=1), stop=10**6) as feed:
        steps = count()
        read(feed, steps, 3)  # before the other node is there
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        names += ("metrics-export-port", "runtime-env-agent-port")
        ports = [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
        given = [str(jobs.BIN / "ray"), "start", "--block", f"--address={address}", "--num-cpus=1"]
        given += ["--node-ip-address=127.0.0.1", f"--object-store-memory={100 * 2**20}", *ports]
        with jobs.child([*given, "--disable-usage-stats"], folder / "node.log", dict(os.environ)) as node:
            read_until(feed, steps, 1, node)  # it joins when it runs
            {"actor": kill_an_actor, "node": kill_the_node}[victim](feed, steps, node)
        print(f"{next(steps)} batches were right")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
