"""`medswav bench feed`: batches through Ray augmentation actors, and what uint8 saves on the way."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.bench import Figure, figure, take_turns
from orchestration.bench_images import write_dataset
from orchestration.cluster import connected
from orchestration.feed import DEPTH, Feed, make_batches, object_store_bytes
from trainer.augment.bands import fit_statistics
from trainer.batches import Batch, BatchMaker
from trainer.config import TrainConfig, load_config

SAMPLES, SIDE, BATCH, BATCHES = 64, 256, 32, 24
WIRE_CROPS = ((2, 224), (6, 92))
Factory = Callable[..., Callable[[int], Batch]]


def ready_made(count: int, kind: str) -> Callable[[int], Batch]:
    """A batch function that costs nothing: `count` images of the paper's crops as `kind`, always the same."""
    crops = tuple(np.zeros((n, count, side, side), kind) for n, side in WIRE_CROPS)

    def make(step: int) -> Batch:
        return Batch(step, crops, ("ct",), ("",) * count, (0,) * count, {})

    return make


def measure(seconds: float, batches: int = BATCHES) -> Iterator[Figure]:
    """Images/s that one consumer gets: one and two actors against its own process; uint8 against float32."""
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:
        root = Path(folder) / "dataset"
        write_dataset(root, Path(folder) / "scratch", SAMPLES, SIDE)
        config = load_config(
            "demo", (f"data.dataset={root}", "data.modalities=[ct]", f"data.batch_size={BATCH}")
        )
        bands = _bands(config)
        store = object_store_bytes(config, 1, DEPTH, 1 << 30)
        with connected(cpus=4, object_store_bytes=store):
            for feeders in (1, 2):
                yield _feed(config, bands, feeders, batches, seconds / 3)
            yield _wire(batches, seconds / 3)


def _bands(config: TrainConfig) -> Any:
    """Statistics of a few made-up images: the arithmetic is the same whatever the numbers."""
    rng = np.random.default_rng(0)
    images = [rng.random((64, 64), np.float32) for _ in range(4)]
    return {"ct": fit_statistics(images, config.views.sigmas)}


def _feed(config: TrainConfig, bands: Any, feeders: int, batches: int, seconds: float) -> Figure:
    arguments = (config.model_dump_json(), 0, 1, bands)

    def alone() -> None:
        maker = BatchMaker(config, 0, 1, bands)  # a new one, as the actors are: nothing is cached yet
        for step in range(batches):
            maker(step)

    sides = {"feed": lambda: _consume(make_batches, arguments, feeders, batches), "alone": alone}
    took, turns = take_turns(sides, seconds)
    return figure(
        f"feed_{feeders}_actor{'s' * (feeders > 1)}",
        BATCH * batches / took["feed"],
        "images/s",
        BATCH * batches / took["alone"],
        "the same batches made in the consumer's process, which then cannot train",
        turns,
        f"demo crops of {SIDE} px CT slices, batches of {BATCH}, uint8, start of the actors left out",
    )


def _wire(batches: int, seconds: float) -> Figure:
    def side(kind: str) -> float:
        return _consume(ready_made, (BATCH, kind), 1, batches)

    took, turns = take_turns({"uint8": lambda: side("uint8"), "float32": lambda: side("float32")}, seconds)
    megabytes = BATCH * sum(n * s * s for n, s in WIRE_CROPS) / 1e6
    return figure(
        "feed_wire_uint8",
        BATCH * batches / took["uint8"],
        "images/s",
        BATCH * batches / took["float32"],
        "the same crops sent as float32",
        turns,
        f"ready-made batches of {BATCH} x (2 x 224 px + 6 x 92 px), {megabytes:.1f} MB as uint8",
    )


def _consume(factory: Factory, arguments: tuple[Any, ...], feeders: int, batches: int) -> float:
    """Seconds for `batches` batches through a new feed, after its actors are ready."""
    with Feed(factory, arguments, feeders, stop=batches) as feed:
        feed.ready()
        start = time.perf_counter()
        for step in range(batches):
            feed(step)
        return time.perf_counter() - start
