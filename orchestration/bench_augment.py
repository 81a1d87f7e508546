"""`medswav bench augment`: from shard bytes to the views of an image, on one thread.

Ours is the path of training itself: batches of trainer.batches.BatchMaker from a dataset in the page cache,
nothing cached, so that reading, decoding at the resolution that the views need, windowing and bands are all
in. Baselines: the naive order of method.md section 8 from 16-bit PNG, and the multi-crop of torchvision and
of MONAI (orchestration.bench_peers), all from bytes in memory. Times are CPU seconds of the process (all of
its threads), so that a busy machine changes the figures less.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from orchestration.bench import Figure, figure, take_turns
from orchestration.bench_images import made_up, write_dataset
from orchestration.bench_peers import Make, eight_bits, monai_views, torchvision_views
from shards.codec import get_codec
from shards.stats import pixel_statistics
from trainer.augment.bands import band_energies, band_split, build_pyramid
from trainer.augment.intensity import to_unit
from trainer.augment.views import naive_views
from trainer.batches import BatchMaker, choose_reduce, fit_bands
from trainer.config import IntensityConfig, TrainConfig, load_config

SIDES = {"ct": 512, "xr": 1200}
WINDOWS = {"ct": IntensityConfig(mode="fixed", center=40, width=400), "xr": IntensityConfig()}
IMAGES = 8  # a dataset holds, and a batch takes
SWAV = "SwAV's transforms, RGB, from 8-bit JPEG"
NAIVE = "everything redone for each view, from 16-bit PNG"
CROPS = "[{count: 2, size: 224, share: [0.14, 1.0]}, {count: 6, size: 92, share: [0.05, 0.14]}]"


def measure(
    seconds: float, images: int = IMAGES, sides: dict[str, int] | None = None, scale: float = 1.0
) -> Iterator[Figure]:
    """Images/s of one thread for CT slices and radiographs; milliseconds of the bands alone.

    scale: of the sizes to which geometry `paper` brings an image.
    """
    import torch

    cv2.setNumThreads(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            # Threads of BLAS that the naive side wakes spin for a while, in the time of the next turn.
            stack.enter_context(threadpool_limits(1))
            for modality, side in (sides or SIDES).items():
                root = Path(stack.enter_context(TemporaryDirectory(prefix="medswav-bench-")))
                write_dataset(root / "d", root / "s", images, side, min(images, 4), modality)
                pixels = [made_up(modality, i, side) for i in range(images)]
                yield from _modality(modality, root / "d", pixels, 0.45 * seconds, scale)
    finally:
        torch.set_num_threads(threads)
    slices = [made_up("ct", i, (sides or SIDES)["ct"]) for i in range(min(images, 2))]
    yield _bands([to_unit(p, {}, WINDOWS["ct"]) for p in slices], 0.1 * seconds)


def _modality(name: str, root: Path, pixels: list[NDArray], seconds: float, scale: float) -> Iterator[Figure]:
    """The figures of one modality: both geometries and the demo's crops against naive, then the others."""
    recommended = _config(root, name, len(pixels), f"views.crops={CROPS}")
    sizes = f"views.default_size_range=[{600 * scale}, {1200 * scale}]"
    paper = _config(root, name, len(pixels), f"views.crops={CROPS}", "views.geometry=paper", sizes)
    demo = _config(root, name, len(pixels))
    for label, config, part in (("", recommended, 0.35), ("_paper", paper, 0.25), ("_demo", demo, 0.1)):
        took, turns = take_turns({"ours": _ours(config), "naive": _naive(config, pixels)}, part * seconds)
        about = _describe(pixels[0], config)
        yield _rate(f"augment_{name}{label}", took["ours"], took["naive"], NAIVE, turns, about)
    about = _describe(pixels[0], recommended)
    views, rows = recommended.views, [pixel_statistics(p) for p in pixels]
    units = [to_unit(p, r, WINDOWS[name]) for p, r in zip(pixels, rows, strict=True)]
    jpegs, codec = [eight_bits(unit) for unit in units], get_codec("htj2k")
    codes = [codec.encode(p) for p in pixels]
    others = {
        "torchvision": (
            _peer([torchvision_views(views, True)], jpegs),
            SWAV,
        ),
        "torchvision_grey": (_peer([torchvision_views(views, False)], jpegs), "the same in one channel"),
        "monai": (
            _peer([monai_views(views, dict(row), WINDOWS[name]) for row in rows], codes),
            "MONAI: crop, resize, smooth, gamma, scale, shift; from HTJ2K",
        ),
    }
    peers = {"ours": _ours(recommended)} | {key: side for key, (side, _) in others.items()}
    took, turns = take_turns(peers, 0.3 * seconds)
    for key, (_, versus) in others.items():
        yield _rate(f"augment_{name}_vs_{key}", took["ours"], took[key], versus, turns, about)


def _config(root: Path, modality: str, images: int, *more: str) -> TrainConfig:
    window = WINDOWS[modality].model_dump_json(exclude_none=True)
    return load_config(
        "demo",
        (
            f"data.dataset={root}",
            f"data.modalities=[{modality}]",
            f"data.batch_size={images}",
            "data.cache_bytes=0",
            f"data.intensity={{{modality}: {window}}}",
            *more,
        ),
    )


def _ours(config: TrainConfig) -> Callable[[], float]:
    """CPU seconds an image of the next batch."""
    make, steps = BatchMaker(config, 0, 1, fit_bands(config)), count()

    def run() -> float:
        start = time.process_time()
        batch = make(next(steps))
        return (time.process_time() - start) / len(batch.keys)

    return run


def _naive(config: TrainConfig, pixels: list[NDArray]) -> Callable[[], float]:
    """CPU seconds of one image, each turn another one."""
    (modality,) = config.data.modalities
    (bands,) = fit_bands(config).values()
    # PNG has no signed pixels: HU + 1024 is stored, and taken off again.
    offset = 1024 if modality == "ct" else 0
    files = [imagecodecs.png_encode((p.astype(np.int32) + offset).astype(np.uint16)) for p in pixels]
    rows, turns = [pixel_statistics(p) for p in pixels], count()

    def run() -> float:
        turn = next(turns)
        i = turn % len(files)
        start = time.process_time()
        image = (imagecodecs.png_decode(files[i]).astype(np.int32) - offset).astype(pixels[i].dtype)
        naive_views(to_unit(image, rows[i], WINDOWS[modality]), config.views, bands, (0, i, turn))
        return time.process_time() - start

    return run


def _peer(makers: list[Make], files: list[bytes]) -> Callable[[], float]:
    """CPU seconds an image, over all of them. makers: one for all images, or one each."""

    def run() -> float:
        start = time.process_time()
        for i, data in enumerate(files):
            makers[i % len(makers)](data)
        return (time.process_time() - start) / len(files)

    return run


def _bands(units: list[NDArray[np.float32]], seconds: float) -> Figure:
    sigmas = load_config("demo").views.sigmas

    def timed(work: Callable[[NDArray[np.float32]], Any]) -> Callable[[], float]:
        def run() -> float:
            start = time.process_time()
            for unit in units:
                work(unit)
            return (time.process_time() - start) / len(units)

        return run

    ours, exact = (
        timed(lambda unit: build_pyramid(unit, sigmas)),
        timed(lambda unit: band_energies(band_split(unit, sigmas))),
    )
    took, turns = take_turns({"ours": ours, "exact": exact}, seconds)
    detail = (
        f"{len(sigmas) + 1} bands and their energies, {units[0].shape[0]} px CT slice, one thread, CPU time"
    )
    return figure(
        "bands_with_energies", 1000 * took["ours"], "ms", 1000 * took["exact"], "exact filters", turns, detail
    )


def _rate(name: str, ours: float, theirs: float, versus: str, turns: int, detail: str) -> Figure:
    return figure(name, 1 / ours, "images/s", 1 / theirs, versus, turns, detail)


def _describe(pixels: NDArray, config: TrainConfig) -> str:
    (modality,) = config.data.modalities
    kind = {"ct": "CT slice", "xr": "radiograph"}[modality]
    crops = " + ".join(f"{c.count} x {c.size}" for c in config.views.crops)
    shape = (pixels.shape[0], pixels.shape[1])
    reduce = choose_reduce(shape, config.views, config.views.default_size_range)
    at = f"decoded at 1/{2**reduce}" if reduce else "decoded in full"
    return f"{shape[0]} px {kind}, {crops}, geometry {config.views.geometry}, {at}; one thread, CPU time"
