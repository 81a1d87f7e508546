"""`medswav bench augment`: views of a CT slice, against the naive order of method.md section 8."""

from collections.abc import Callable, Iterator
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from orchestration.bench import Figure, figure, take_turns
from orchestration.bench_images import ct_slice
from shards.codec import get_codec
from shards.stats import pixel_statistics
from trainer.augment.bands import band_energies, band_split, build_pyramid, fit_statistics
from trainer.augment.intensity import to_unit
from trainer.augment.views import make_views, naive_views
from trainer.config import IntensityConfig, ViewConfig, load_config

IMAGES, SIDE = 4, 512
FIXED = IntensityConfig(mode="fixed", center=40, width=400)
NAIVE = "everything redone for each view"


def measure(seconds: float, images: int = IMAGES, side: int = SIDE) -> Iterator[Figure]:
    """Images/s of one thread for the crops of the paper and of the demo; milliseconds of the bands alone."""
    cv2.setNumThreads(1)
    slices = [ct_slice(i, side) for i in range(images)]
    units = [to_unit(pixels, {}, FIXED) for pixels in slices]
    paper, demo = ViewConfig(), load_config("demo").views
    statistics = fit_statistics(units, paper.sigmas)
    yield from _views("augment_2x224_6x92", units, paper, statistics, 0.35 * seconds)
    yield from _views("augment_demo_crops", units, demo, statistics, 0.25 * seconds)
    yield _from_bytes(slices, paper, statistics, 0.25 * seconds)
    yield _bands(units, paper, 0.15 * seconds)


def _views(
    name: str, units: list[NDArray[np.float32]], views: ViewConfig, statistics: Any, seconds: float
) -> Iterator[Figure]:
    def run(make: Callable[..., Any]) -> None:
        for i, unit in enumerate(units):
            make(unit, views, statistics, (0, i, 0))

    took, turns = take_turns({"ours": lambda: run(make_views), "naive": lambda: run(naive_views)}, seconds)
    yield _rate(name, len(units), took["ours"], took["naive"], NAIVE, turns, _describe(units, views))


def _from_bytes(
    slices: list[NDArray[np.int16]], views: ViewConfig, statistics: Any, seconds: float
) -> Figure:
    """From encoded bytes to views: HTJ2K and one pyramid, against 16-bit PNG and the naive order."""
    codec = get_codec("htj2k")
    encoded = [codec.encode(pixels) for pixels in slices]
    # PNG has no signed pixels: the baseline keeps HU + 1024 and gets its window shifted to match.
    pngs = [imagecodecs.png_encode((p.astype(np.int32) + 1024).astype(np.uint16)) for p in slices]
    shifted = IntensityConfig(mode="fixed", center=FIXED.center + 1024, width=400)  # type: ignore[operator]
    rows = [pixel_statistics(p) for p in slices]

    def ours() -> None:
        for i, data in enumerate(encoded):
            make_views(to_unit(codec.decode(data), rows[i], FIXED), views, statistics, (0, i, 0))

    def naive() -> None:
        for i, data in enumerate(pngs):
            naive_views(to_unit(imagecodecs.png_decode(data), rows[i], shifted), views, statistics, (0, i, 0))

    took, turns = take_turns({"ours": ours, "naive": naive}, seconds)
    versus = f"16-bit PNG, {NAIVE}"
    detail = "decode included; " + _describe(slices, views)
    return _rate(
        "augment_from_bytes_2x224_6x92", len(slices), took["ours"], took["naive"], versus, turns, detail
    )


def _bands(units: list[NDArray[np.float32]], views: ViewConfig, seconds: float) -> Figure:
    def pyramid() -> None:
        for unit in units:
            build_pyramid(unit, views.sigmas)

    def exact() -> None:
        for unit in units:
            band_energies(band_split(unit, views.sigmas))

    took, turns = take_turns({"ours": pyramid, "exact": exact}, seconds)
    milliseconds = {name: 1000 * value / len(units) for name, value in took.items()}
    detail = f"{len(views.sigmas) + 1} bands and their energies, {_describe(units)}"
    return figure(
        "bands_with_energies",
        milliseconds["ours"],
        "ms",
        milliseconds["exact"],
        "exact filters",
        turns,
        detail,
    )


def _rate(name: str, count: int, ours: float, theirs: float, versus: str, turns: int, detail: str) -> Figure:
    return figure(name, count / ours, "images/s", count / theirs, versus, turns, detail)


def _describe(images: list[Any], views: ViewConfig | None = None) -> str:
    side = images[0].shape[0]
    crops = "" if views is None else ", " + " + ".join(f"{c.count} x {c.size}" for c in views.crops)
    return f"{side} px CT slice{crops}, one thread"
