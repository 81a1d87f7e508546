"""`medswav bench read`: random reads by catalogue against other loaders of the same samples, and locality.

The stream of webdataset has the easier task: it reads the same shards front to back and cannot give a chosen
sample. litdata reads its own chunks, written from the same bytes, in its shuffled order. Everything comes
from the page cache; one thread's work is measured in CPU time, because the machine may have other work.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestration import bench_store
from orchestration.bench import Figure, figure, take_turns
from orchestration.bench_images import write_dataset
from shards import catalog
from shards.codec import get_codec
from shards.errors import UserError
from shards.order import permute
from shards.reads import BatchReader, Place
from shards.tar import ShardReader

SAMPLES, SIDE, BATCH = 96, 512, 32
VERSUS = "webdataset.WebDataset over the same shards, in file order"
LITDATA = "litdata.StreamingDataset over the same bytes in its own chunks, shuffled, undecoded"
GOAL = 30_000  # indexed samples/s
_EXTRA = "install it (`pip install 'medswav[bench]'`)"


def measure(seconds: float, samples: int = SAMPLES, side: int = SIDE) -> Iterator[Figure]:
    """Samples/s of one core from the page cache: undecoded, decoded, decoded at 1/2 and 1/4 size; checked
    batches; reads of a simulated object store; and how near each other the reads of the order are."""
    try:
        import webdataset
    except ImportError:
        raise UserError(f"bench read measures against webdataset: {_EXTRA}") from None
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:
        root = Path(folder) / "dataset"
        write_dataset(root, Path(folder) / "scratch", samples, side)
        shards = sorted(str(p) for p in root.glob("shards/ct/*.tar"))

        def stream(decode: Callable[[bytes], Any]) -> None:
            for item in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
                decode(item["j2c"])

        places = _places(root)
        yield from _figures(root, places, side, seconds * 0.7, stream, _litdata(Path(folder), root, places))
        yield from bench_store.figures(root, places, seconds * 0.3)
    yield from bench_store.locality()


def _places(root: Path) -> list[Place]:
    """All samples as they lie in the shards."""
    table = catalog.load(root, "ct").sort_by([("shard", "ascending"), ("offset", "ascending")])
    columns = [table[name].to_pylist() for name in ("shard", "offset", "size", "crc32")]
    return [Place("ct", *row) for row in zip(*columns, strict=True)]


def _litdata(folder: Path, root: Path, places: Sequence[Place]) -> Callable[[], None]:
    """A pass over the same samples by litdata, in a shuffled order. Raises UserError where there is none."""
    try:
        from litdata import StreamingDataset
        from litdata.streaming.writer import BinaryWriter
    except ImportError:
        raise UserError(f"bench read measures against litdata: {_EXTRA}") from None
    reader, chunks = ShardReader(root), folder / "litdata"
    chunks.mkdir()
    writer = BinaryWriter(str(chunks), chunk_bytes="64MB")
    for number, p in enumerate(places):
        writer[number] = reader.read(p.modality, p.shard, p.offset, p.size)
    writer.done()
    writer.merge(1)
    dataset = StreamingDataset(str(chunks), shuffle=True)

    def one_pass() -> None:
        found = sum(len(data) > 0 for data in dataset)
        if found != len(places):
            raise RuntimeError(f"litdata gave {found} of {len(places)} samples")

    return one_pass


def _figures(
    root: Path,
    places: list[Place],
    side: int,
    seconds: float,
    stream: Callable[[Callable[[bytes], Any]], None],
    litdata: Callable[[], None],
) -> Iterator[Figure]:
    samples = len(places)
    order = permute(np.arange(samples), samples, 1).tolist()
    shards, codec = ShardReader(root), get_codec("htj2k")

    def indexed(decode: Callable[[bytes], Any]) -> None:
        for index in order:
            p = places[index]
            decode(shards.read(p.modality, p.shard, p.offset, p.size))

    def checked(threads: int) -> None:
        reader = BatchReader(str(root), threads)
        for first in range(0, samples, BATCH):
            batch = [places[index] for index in order[first : first + BATCH]]
            reads = reader.start(batch)
            for number in range(len(batch)):
                reads.take(number)
        reader.close()

    cases: tuple[tuple[str, Callable[[bytes], Any], Callable[[bytes], Any]], ...] = (
        ("undecoded", len, len),
        ("decoded", codec.decode, codec.decode),
        ("decoded_half", lambda data: codec.decode(data, reduce=1), codec.decode),
        ("decoded_quarter", lambda data: codec.decode(data, reduce=2), codec.decode),
    )
    share = seconds / (len(cases) + 2)
    about = f"{samples} CT slices of {side} px in random order, one thread, CPU time, page cache warm"
    for name, ours, theirs in cases:
        sides = {"ours": partial(indexed, ours), "theirs": partial(stream, theirs)}
        took, turns = take_turns(_cpu(sides), share)
        whole = ", decoded in full" if name not in ("undecoded", "decoded") else ""
        rates = (samples / took["ours"], samples / took["theirs"])
        goal = f"; the goal is {GOAL:,}" if name == "undecoded" else ""
        yield figure(f"read_{name}", rates[0], "samples/s", rates[1], VERSUS + whole, turns, about + goal)
    took, turns = take_turns(_cpu({"ours": partial(indexed, len), "theirs": litdata}), share)
    rates = (samples / took["ours"], samples / took["theirs"])
    yield figure("read_undecoded_litdata", rates[0], "samples/s", rates[1], LITDATA, turns, about)
    sides = {"ours": partial(checked, 0), "theirs": partial(stream, len)}
    took, turns = take_turns(_cpu(sides), share)
    about = f"batches of {BATCH} in random order, near reads joined, each sample held to its CRC-32"
    rates = (samples / took["ours"], samples / took["theirs"])
    yield figure("read_checked", rates[0], "samples/s", rates[1], VERSUS, turns, about)


def _cpu(sides: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], float]]:
    """Sides that measure themselves, in CPU seconds of this process and all its threads."""

    def timed(work: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            began = time.process_time()
            work()
            return time.process_time() - began

        return run

    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    return {name: timed(work) for name, work in sides.items()}
