"""`medswav bench feed`: batches on their way to one rank, against torch's DataLoader with as many workers.

Three things are measured of Ray actors and of the worker processes of a run without Ray: how many images a
second come through (batches that cost nothing to make), how long a consumer of known speed waits once the
makers have been counted automatically, and what lies in the object store when the consumer stops.
"""

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.bench import Figure, figure, take_turns
from orchestration.bench_images import write_dataset
from orchestration.cluster import connected
from orchestration.feed import Feed, Feeders
from trainer.augment.bands import fit_statistics
from trainer.batches import Batch
from trainer.config import TrainConfig, load_config
from trainer.feeding import WAIT_SHARE, Ahead, Pace
from trainer.workers import BatchWorkers, make_batches

SAMPLES, SIDE, BATCH, MAKERS = 64, 256, 32, 2
CROPS = "[{count: 2, size: 224}, {count: 6, size: 92}]"
STORE_BYTES, BATCHES, WARM_UP = 1 << 30, 60, 10
SLOW_SECONDS, STEP_SECONDS, STEPS = 0.08, 0.02, 80
MOST = 8  # makers that may be started; they sleep, so that the number of cores does not matter
FOREVER = 10**9
Factory = Callable[..., Callable[[int], Batch]]
Next = Callable[[], Any]


def ready_made(config: TrainConfig, rank: int, world: int, bands: Any, kind: str = "uint8") -> Any:
    """A batch function that costs nothing: always the same crops (of another kind: as their bytes)."""
    n = config.data.batch_size // world
    crops = tuple(np.zeros(shape, kind).view(np.uint8) for shape in config.views.stack_shapes(n))
    return lambda step: Batch(step, crops, config.data.modalities, ("",) * n, (0,) * n, {})


def slow(config: TrainConfig, rank: int, world: int, bands: Any) -> Any:
    """The same after SLOW_SECONDS, as from a slow store: as many at a time as there are makers."""
    make = ready_made(config, rank, world, bands)

    def wait(step: int) -> Batch:
        time.sleep(SLOW_SECONDS)
        return make(step)

    return wait


class Steps:
    """Step -> crops, as a dataset of torch's DataLoader, which makes the batch function in each worker."""

    def __init__(self, factory: Factory, args: tuple[Any, ...]) -> None:
        self._factory, self._args = factory, args
        self._make: Callable[[int], Batch] | None = None

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, step: int) -> list[Any]:
        import torch

        self._make = self._make or self._factory(*self._args)
        return [torch.from_numpy(crop) for crop in self._make(step).crops]


def measure(seconds: float) -> Iterator[Figure]:
    """Images/s, percent of the time waited, and bytes in the object store."""
    paper = load_config("demo", ("data.modalities=[ct]", f"data.batch_size={BATCH}", f"views.crops={CROPS}"))
    with connected(cpus=2 * MOST, object_store_bytes=STORE_BYTES), tempfile.TemporaryDirectory() as folder:
        arguments = (paper, 0, 1, None)
        yield from _transport(arguments, seconds / 3)
        yield _memory(arguments)
        yield from _waits(arguments, seconds / 3)
        root = Path(folder) / "dataset"
        write_dataset(root, Path(folder) / "scratch", SAMPLES, SIDE)
        given = (f"data.dataset={root}", "data.modalities=[ct]", f"data.batch_size={BATCH}")
        config = load_config("demo", given)
        yield _demo((config, 0, 1, _bands(config)), seconds / 3)


def _bands(config: TrainConfig) -> Any:
    """Statistics of a few made-up images: the arithmetic is the same whatever the numbers."""
    rng = np.random.default_rng(0)
    images = [rng.random((64, 64), np.float32) for _ in range(4)]
    return {"ct": fit_statistics(images, config.views.sigmas)}


def _transport(arguments: tuple[Any, ...], seconds: float) -> Iterator[Figure]:
    """Ready-made batches of the paper's crops; the wire in float32 as well."""
    with ExitStack() as stack:
        sources = {
            "ray": _of_actors(stack, ready_made, arguments, MAKERS),
            "ray_1": _of_actors(stack, ready_made, arguments, 1),
            "float32": _of_actors(stack, ready_made, (*arguments, "float32"), MAKERS),
            "processes": _of_processes(stack, ready_made, arguments, MAKERS),
            "torch": _of_torch(stack, ready_made, arguments, MAKERS),
        }
        sides = {name: partial(_timed, source) for name, source in sources.items()}
        took, turns = take_turns(sides, seconds)
    rates = {name: BATCH * BATCHES / value for name, value in took.items()}
    nbytes = BATCH * arguments[0].views.crop_values
    about = f"ready-made batches of {BATCH} x (2 x 224 px + 6 x 92 px), {nbytes / 1e6:.1f} MB in uint8"
    torchs = f"torch's DataLoader with {MAKERS} workers"
    for name, value, base, versus in (
        ("feed_transport_ray", "ray", "torch", torchs),
        ("feed_transport_processes", "processes", "torch", torchs),
        ("feed_transport_ray_1_actor", "ray_1", "ray", f"{MAKERS} actors"),
        ("feed_transport_uint8", "ray", "float32", "the same crops sent as float32"),
    ):
        makers = 1 if value == "ray_1" else MAKERS
        yield figure(name, rates[value], "images/s", rates[base], versus, turns, f"{makers} makers; {about}")


def _memory(arguments: tuple[Any, ...]) -> Figure:
    with Feed(ready_made, arguments, MAKERS, FOREVER) as feed:
        for step in range(2 * BATCHES):
            feed(step)
        since, used = time.monotonic(), store_bytes()
        while time.monotonic() - since < 3:  # freed ones go once a second; then it has to stay so
            time.sleep(0.1)
            used, before = store_bytes(), used
            if used != before:
                since = time.monotonic()
        depth = feed.depth
    detail = f"a consumer that stopped after {2 * BATCHES} of {FOREVER:.0e} batches; {depth} are in flight"
    return figure("feed_memory", used, "bytes", STORE_BYTES / 2, "half of the object store", 1, detail)


def _waits(arguments: tuple[Any, ...], seconds: float) -> Iterator[Figure]:
    """Percent of its time that a consumer of STEP_SECONDS waits for batches of SLOW_SECONDS."""
    with ExitStack() as stack:
        actors, ray_makers = _counted(stack, Feed(slow, arguments, Feeders(1, MOST), FOREVER))
        workers = BatchWorkers(*arguments, workers=1, stop=FOREVER, factory=slow)
        processes, makers = _counted(stack, workers)
        sources = {"ray": actors, "processes": processes}
        sources["torch"] = _of_torch(stack, slow, arguments, ray_makers)
        shares, turns = take_turns({n: partial(_share, s) for n, s in sources.items()}, seconds)
    about = (
        f"batches of {1e3 * SLOW_SECONDS:.0f} ms (asleep, as in slow reads), steps of "
        f"{1e3 * STEP_SECONDS:.0f} ms; limit {100 * WAIT_SHARE:.0f} %; one maker alone: "
        f"{100 * (1 - STEP_SECONDS / SLOW_SECONDS):.0f} % by arithmetic"
    )
    versus, base = f"torch's DataLoader with {ray_makers} workers", max(shares["torch"], 0.01)
    for name, found in (("ray", ray_makers), ("processes", makers)):
        value = max(shares[name], 0.01)
        yield figure(
            f"feed_wait_{name}", value, "%", base, versus, turns, f"auto found {found} makers; {about}"
        )


def _counted(stack: ExitStack, feed: Feed | BatchWorkers) -> tuple[Next, int]:
    """The source, once as many makers are at work as auto finds for a consumer of STEP_SECONDS; how many."""
    pace = Pace(MOST, lambda text: None)
    ahead, steps = stack.enter_context(Ahead(feed, FOREVER, pace)), count()
    while not pace.done:
        ahead(next(steps))
        time.sleep(STEP_SECONDS)
    return (lambda: ahead(next(steps))), feed.count


def _demo(arguments: tuple[Any, ...], seconds: float) -> Figure:
    with ExitStack() as stack:
        ours = _of_actors(stack, make_batches, arguments, MAKERS)
        theirs = _of_torch(stack, make_batches, arguments, MAKERS)
        took, turns = take_turns({"ray": lambda: _timed(ours), "torch": lambda: _timed(theirs)}, seconds)
    rates = {name: BATCH * BATCHES / value for name, value in took.items()}
    detail = f"demo crops of {SIDE} px CT slices, batches of {BATCH}; {MAKERS} makers"
    versus = f"torch's DataLoader with {MAKERS} workers, which makes the same batches"
    return figure("feed_demo_crops", rates["ray"], "images/s", rates["torch"], versus, turns, detail)


def _timed(source: Next) -> float:
    """Seconds for BATCHES batches, after some that were made while others had their turn."""
    for _ in range(WARM_UP):
        source()
    start = time.perf_counter()
    for _ in range(BATCHES):
        source()
    return time.perf_counter() - start


def _share(source: Next) -> float:
    """Percent of the time waited in STEPS steps."""
    waited, start = 0.0, time.perf_counter()
    for _ in range(STEPS):
        asked = time.perf_counter()
        source()
        waited += time.perf_counter() - asked
        time.sleep(STEP_SECONDS)
    return 100 * waited / (time.perf_counter() - start)


def _of_actors(stack: ExitStack, factory: Factory, args: tuple[Any, ...], makers: int) -> Next:
    feed = Feed(factory, args, makers, FOREVER)
    ahead, steps = stack.enter_context(Ahead(feed, FOREVER)), count()
    feed.ready()
    return lambda: ahead(next(steps))


def _of_processes(stack: ExitStack, factory: Factory, args: tuple[Any, ...], makers: int) -> Next:
    workers = BatchWorkers(*args, workers=makers, stop=FOREVER, factory=factory)
    ahead, steps = stack.enter_context(Ahead(workers, FOREVER)), count()
    return lambda: ahead(next(steps))


def _of_torch(stack: ExitStack, factory: Factory, args: tuple[Any, ...], makers: int) -> Next:
    from torch.utils.data import DataLoader

    context = multiprocessing.get_context(
        "forkserver"
    )  # torch is imported once, and Ray's threads not forked
    context.set_forkserver_preload(["torch", "orchestration.bench_feed"])
    steps: Any = Steps(factory, args)
    with warnings.catch_warnings():  # of more workers than cores: here they sleep
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(steps, batch_size=None, num_workers=makers, multiprocessing_context=context)
        iterator: Any = iter(loader)
    stack.callback(iterator._shutdown_workers)
    return lambda: next(iterator)


def store_bytes() -> int:
    """In the object store of this node."""
    import ray
    from ray._private.internal_api import node_stats  # no public call tells it before minutes have passed

    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(stats.store_stats.object_store_bytes_used)
