"""The part of `medswav bench read` about places: requests to an object store, and shards at a time."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from orchestration.bench import Figure, figure, take_turns
from shards.cache import NodeCache
from shards.errors import UserError
from shards.objects import open_store
from shards.reads import GAP_BYTES, LARGEST_BYTES, BatchReader, Place, coalesce
from shards.store import Store

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BLOCK, BATCH, THREADS = 16, 8, 4
# The locality: the CT slices of the paper in shards of a usual unit, one node of eight.
IMAGES, PER_SHARD, PER_MODALITY, NODES, STEPS = 75_604_550, 240, 64, 8, 1024


def figures(root: Path, places: Sequence[Place], seconds: float) -> Iterator[Figure]:
    """Samples/s from moto's S3 server in a process of its own: blocks through a node cache against one
    request a sample, as many at a time."""
    with _server() as url, _environment(url):
        target = open_store("s3://bench/dataset")
        for name in Store(root).list():
            target.put(name, Store(root).read(name))
        requests = dict.fromkeys(("ours", "theirs"), 0)

        def read(side: str, wanted: Sequence[Place], cache: NodeCache | None) -> None:
            reader, requests[side] = BatchReader("s3://bench/dataset", THREADS, cache=cache), 0
            for first in range(0, len(wanted), BATCH):
                batch = wanted[first : first + BATCH]
                reads = reader.start(batch)
                for number in range(len(batch)):
                    reads.take(number)
                requests[side] += reads.counts.requests
            reader.close()

        def ours() -> float:
            with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:  # nothing is cached yet
                began = time.perf_counter()
                read("ours", [_with_block(places, n) for n in order], NodeCache(Path(folder), 4 << 30))
                return time.perf_counter() - began

        # Samples of a group come mixed: neighbours of a block are several batches apart.
        order = sorted(range(len(places)), key=lambda n: (n % BLOCK, n))
        alone = [replace(places[n], block=(places[n].offset, places[n].end)) for n in order]
        sides = {"ours": ours, "theirs": lambda: read("theirs", alone, None)}
        took, turns = take_turns(sides, seconds)
        yield figure(
            "read_object_store",
            len(places) / took["ours"],
            "samples/s",
            len(places) / took["theirs"],
            f"one request a sample, {THREADS} at a time",
            turns,
            f"moto's S3 server on this machine, blocks of {BLOCK} through an empty node cache; "
            f"{requests['ours']} requests against {requests['theirs']} for {len(places)} samples",
        )


def _with_block(places: Sequence[Place], number: int) -> Place:
    first = number - number % BLOCK
    near = places[first : first + BLOCK]
    spans = coalesce(near, GAP_BYTES, LARGEST_BYTES)
    (span,) = (span for span in spans if number - first in span.members)
    return replace(places[number], block=(span.start, span.end))


def locality() -> Iterator[Figure]:
    """How many shards a node reads at a time, and requests a step with a node cache, by the order alone."""
    from trainer.batches import plan_batch
    from trainer.config import DataConfig, OrderConfig

    by_blocks = DataConfig(modalities=("ct",), batch_size=PER_MODALITY)
    by_key = by_blocks.model_copy(update={"order": OrderConfig(layout="keys")})
    shards, blocks, samples = {}, {}, 0
    for name, data in (("blocks", by_blocks), ("keys", by_key)):
        drawn: list[int] = []
        for step in range(STEPS):
            drawn += plan_batch(step, {"ct": IMAGES}, data, 0, 0, NODES)["ct"][0].tolist()
        shards[name] = len({index // PER_SHARD for index in drawn})
        blocks[name] = len({index // data.order.block_samples for index in drawn})
        samples = len(drawn)
    about = (
        f"{IMAGES:,} images, {PER_SHARD} a shard, {PER_MODALITY} of a modality in a batch, one node of "
        f"{NODES}, {STEPS:,} steps; no timing"
    )
    versus = "single samples, shuffled as a whole (data.order.layout=keys)"
    yield figure("read_shards_at_a_time", shards["blocks"], "shards", shards["keys"], versus, 1, about)
    yield figure(
        "read_requests_a_step",
        blocks["blocks"] / STEPS,
        "requests",
        samples / STEPS,
        "the same order, one request a sample",
        1,
        f"a block is read once into the node cache; {about}",
    )


@contextmanager
def _server() -> Iterator[str]:
    """moto's S3 server with the bucket `bench`, in a process of its own. Raises UserError without moto."""
    try:
        import boto3
        import moto.server  # noqa: F401
    except ImportError:
        raise UserError("bench read needs moto and s3fs: `pip install 'medswav[bench]'`") from None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, port)
        keys = {"aws_access_key_id": "bench", "aws_secret_access_key": "bench"}
        boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket="bench")
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise UserError("moto's server did not start: try `python -m moto.server`")


@contextmanager
def _environment(url: str) -> Iterator[None]:
    """S3 clients of this process talk to the server at `url` meanwhile."""
    before = dict(os.environ)
    os.environ.pop("AWS_PROFILE", None)
    os.environ.update(_ENVIRONMENT | {"AWS_ENDPOINT_URL": url})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
