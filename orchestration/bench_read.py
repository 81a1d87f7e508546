"""`medswav bench read`: random reads by catalogue against a sequential stream of vanilla WebDataset.

The baseline has the easier task: it reads the same shards front to back and cannot give a chosen sample.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.bench import Figure, figure, take_turns
from orchestration.bench_images import write_dataset
from shards import catalog
from shards.codec import get_codec
from shards.errors import UserError
from shards.order import permute
from shards.tar import ShardReader

SAMPLES, SIDE = 96, 512
VERSUS = "webdataset.WebDataset over the same shards, in file order"


def measure(seconds: float, samples: int = SAMPLES, side: int = SIDE) -> Iterator[Figure]:
    """Samples/s of one thread from the page cache: undecoded, decoded, decoded at 1/2 and 1/4 size."""
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "bench read measures against webdataset: install it (`pip install medswav[test]`)"
        ) from None
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:
        root = Path(folder) / "dataset"
        write_dataset(root, Path(folder) / "scratch", samples, side)
        shards = sorted(str(p) for p in root.glob("shards/ct/*.tar"))

        def stream(decode: Callable[[bytes], Any]) -> None:
            for item in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
                decode(item["j2c"])

        yield from _figures(root, samples, side, seconds, stream)


def _figures(
    root: Path, samples: int, side: int, seconds: float, stream: Callable[[Callable[[bytes], Any]], None]
) -> Iterator[Figure]:
    table = catalog.load(root, "ct", columns=["shard", "offset", "size"])
    rows = list(zip(*(table[name].to_pylist() for name in ("shard", "offset", "size")), strict=True))
    order = permute(np.arange(samples), samples, 1).tolist()
    reader, codec = ShardReader(root), get_codec("htj2k")

    def indexed(decode: Callable[[bytes], Any]) -> None:
        for index in order:
            decode(reader.read("ct", *rows[index]))

    cases: tuple[tuple[str, Callable[[bytes], Any], Callable[[bytes], Any]], ...] = (
        ("undecoded", len, len),
        ("decoded", codec.decode, codec.decode),
        ("decoded_half", lambda data: codec.decode(data, reduce=1), codec.decode),
        ("decoded_quarter", lambda data: codec.decode(data, reduce=2), codec.decode),
    )
    for name, ours, theirs in cases:
        sides = {"ours": lambda f=ours: indexed(f), "theirs": lambda f=theirs: stream(f)}
        took, turns = take_turns(sides, seconds / len(cases))
        whole = ", decoded in full" if name not in ("undecoded", "decoded") else ""
        yield figure(
            f"read_{name}",
            samples / took["ours"],
            "samples/s",
            samples / took["theirs"],
            VERSUS + whole,
            turns,
            f"{samples} CT slices of {side} px in random order, one thread, page cache warm",
        )
