"""What `medswav capacity` reckons with: every figure with where it comes from.

A figure is `given` (an option), `measured` (by --measure, here and now) or of the `docs`: then `source` says
of which page. docs/capacity.md says where those are from.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from shards.errors import UserError
from shards.row_file import row_bytes
from trainer.config import TrainConfig
from trainer.rows import NEEDED_COLUMNS

Origin = Literal["given", "measured", "docs"]
PAPER_CROPS = ((2, 224), (6, 92))
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_QUANTITY = re.compile(r"(\d*\.?\d+(?:e[+-]?\d+)?)\s*([kmgtp]?)(i?)b?(/s)?", re.IGNORECASE)


@dataclass(frozen=True)
class Figure:
    """value in `unit`; source: the option, the page, or what was measured."""

    value: float
    unit: str
    origin: Origin
    source: str


@dataclass(frozen=True)
class Cluster:
    """Bandwidths in bytes/s: of the storage as a whole, of a node's network; None: not known."""

    gpus: int
    nodes: int
    cores_per_node: Figure
    memory_per_node: Figure
    storage: Figure | None = None
    network: Figure | None = None

    @property
    def cores(self) -> int:
        return round(self.nodes * self.cores_per_node.value)


@dataclass(frozen=True)
class Rates:
    """views, stored: by modality. Rates are of one core or of one GPU."""

    scan: Figure  # files/s
    convert: Figure  # images/s
    source_bytes: Figure  # of an image
    stored_bytes: Mapping[str, Figure]  # of an image
    views: Mapping[str, Figure]  # samples/s, from stored bytes to all views
    gpu: Figure  # samples/s
    row_bytes: Figure  # of the catalogue in the file of a node
    table_row_bytes: Figure  # of the catalogue in the memory of a process, where it is not shared


PAPER = "docs/capacity.md: hardware of the paper"
SCAN = Figure(1780, "files/s and core", "docs", "docs/capacity.md: header scan")
CONVERT = Figure(1 / 0.006, "images/s and core", "docs", "docs/capacity.md: 6 ms, uncompressed CT")
SOURCE_BYTES = Figure(524_288, "bytes an image", "docs", "docs/capacity.md: 512 x 512 px of 16 bits")
STORED_BYTES = Figure(152e3, "bytes an image", "docs", "docs/capacity.md: 16 TB of 105 M images")
ROW_BYTES = Figure(
    row_bytes(NEEDED_COLUMNS), "bytes a row", "docs", "one file a node, mapped by its processes"
)
TABLE_ROW_BYTES = Figure(166.5, "bytes a row", "docs", "docs/capacity.md: columns that training reads")
CORES, MEMORY = Figure(80, "cores a node", "docs", PAPER), Figure(512e9, "bytes a node", "docs", PAPER)
_RATE, _OF = "samples/s and core", "docs/capacity.md: 2026-11-25, geometry"
# By geometry of the views. `medswav bench augment`: 512 px CT, 1200 px X-ray.
_VIEWS = {
    geometry: {
        "ct": Figure(ct, _RATE, "docs", f"{_OF} {geometry}"),
        "xr": Figure(xr, _RATE, "docs", f"{_OF} {geometry}"),
    }
    for geometry, ct, xr in (("recommended", 155.1, 47.0), ("paper", 197.1, 45.3))
}
# Samples/s of a GPU for 2 x 224 + 6 x 92: published, or an estimate, never measured by us.
_GPUS = {
    ("v100", "resnet50"): (96.5, "SwAV's published 91 to 102 samples/s of a V100"),
    ("h200", "resnet50"): (1900, "an estimate for an H200, not measured"),
    ("h200", "resnet50w2"): (800, "an estimate for an H200, not measured"),
    ("h200", "resnet50w4"): (270, "an estimate for an H200, not measured"),
}
GPU_KINDS = tuple(dict.fromkeys(kind for kind, _ in _GPUS))


def quantity(option: str, text: str, unit: str) -> Figure:
    """`2GB/s`, `512 GB`, `1.5TiB`: a given figure in bytes. Raises UserError."""
    match = _QUANTITY.fullmatch(text.strip())
    rate = unit.startswith("bytes/s")
    value = 0.0
    if match is not None and bool(match[4]) <= rate:
        power = _UNITS[match[2].lower()]
        value = float(match[1]) * (1024 ** round(math.log(power, 1000)) if match[3] else power)
    if not 0 < value < math.inf:
        raise UserError(f"{option} {text}: write it as {'2GB/s' if rate else '512GB'}")
    return Figure(value, unit, "given", option)


def positive(option: str, value: float, unit: str) -> Figure:
    """A given figure. Raises UserError for what is not a number above 0."""
    if not 0 < value < math.inf:
        raise UserError(f"{option} {value:g}: give a number above 0")
    return Figure(value, unit, "given", option)


def documented_views(config: TrainConfig) -> dict[str, Figure]:
    """Samples/s and core by modality. Raises UserError for other crops than the documented ones."""
    crops = tuple((c.count, c.size) for c in config.views.crops)
    if crops != PAPER_CROPS:
        raise UserError(
            f"no figure of the docs is for crops of {config.views.crops_text}: add --measure, or give "
            "--core-rate"
        )
    known = _VIEWS[config.views.geometry]
    as_ct = replace(known["ct"], source=f"{known['ct'].source}, of CT")
    return {m: known.get(m, as_ct) for m in config.data.modalities}


def documented_gpu(config: TrainConfig, kind: str) -> Figure:
    """Samples/s of a GPU. Raises UserError where nothing is known."""
    crops = tuple((c.count, c.size) for c in config.views.crops)
    found = _GPUS.get((kind, config.model.backbone))
    if found is None or crops != PAPER_CROPS:
        known = ", ".join(f"{k} {b}" for k, b in _GPUS)
        raise UserError(
            f"no figure of the docs is for {config.model.backbone} with crops of {config.views.crops_text} "
            f"on a {kind} (there is, for {_crops(PAPER_CROPS)}: {known}): give --step-seconds or --gpu-rate"
        )
    return Figure(found[0], "samples/s and GPU", "docs", f"docs/capacity.md: {found[1]}")


def _crops(crops: tuple[tuple[int, int], ...]) -> str:
    return " + ".join(f"{count} x {size}" for count, size in crops)
