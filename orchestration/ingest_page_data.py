"""What `ingest report` shows of a dataset, from Arrow columns; only 12 rows a modality become objects."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orchestration.report_figures import thumbnail
from shards import catalog, exclusions
from shards.codec import get_codec
from shards.commit import list_commits
from shards.dataset import read_info
from shards.errors import UserError
from shards.objects import open_store
from shards.retries import input_count
from shards.tar import ShardReader
from trainer.augment.intensity import to_unit
from trainer.config import IntensityConfig

PICTURES = 12  # of each modality
SIDE = 128  # px, the longer side of a picture
BINS = 12
_PLACE = ("shard", "offset", "size", "codec")
_LEVELS = ("window_center", "window_width", "window_function", "p005", "p995", "minimum", "maximum")
_MEASURES = {
    "rows": "Rows, px",
    "columns": "Columns, px",
    "spacing_row_mm": "Distance of rows, mm",
    "spacing_column_mm": "Distance of columns, mm",
}
_STACKS = {
    "slices": "Slices",
    "spacing_slice_mm": "Distance of slices, mm",
    "obliquity_degrees": "Obliquity, degrees",
    "gantry_tilt_degrees": "Gantry tilt, degrees",
}


@dataclass(frozen=True)
class Histogram:
    """counts[i] images lie between edges[i] and edges[i + 1]; `unknown` images have no value."""

    name: str
    counts: tuple[int, ...]
    edges: tuple[float, ...]
    unknown: int


@dataclass(frozen=True)
class ModalityPage:
    """One modality. pictures: uint8 [H, W], at most PICTURES, no side above SIDE px."""

    modality: str
    splits: dict[str, int]
    vendors: dict[str, int]
    histograms: tuple[Histogram, ...]
    pictures: tuple[NDArray[np.uint8], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class VolumesPage:
    """The volumes of one modality. regular: how many are a grid of right angles and equal steps."""

    partition: str
    splits: dict[str, int]
    regular: int
    histograms: tuple[Histogram, ...]


@dataclass(frozen=True)
class PageData:
    codec: str
    key_id: str
    inputs: int
    modalities: tuple[ModalityPage, ...]
    refusals: dict[str, int]  # by shards.schema.Reason, most first
    volumes: tuple[VolumesPage, ...] = ()
    left_out: dict[str, int] = field(
        default_factory=dict
    )  # as equal to others, by reason (shards.exclusions)


def gather(dataset: str | Path, pictures: bool = True) -> PageData:
    """Everything the page says of a dataset. Raises UserError where it is none or is damaged."""
    store = open_store(dataset)
    info = read_info(store)
    found = [(m, splits) for m, splits in catalog.counts(store).items() if sum(splits.values())]
    return PageData(
        info.codec,
        info.key_id,
        input_count(list_commits(store)),
        tuple(_modality(dataset, m, splits, pictures) for m, splits in found),
        value_counts(catalog.quarantine(store)["reason"]),
        tuple(_volumes(dataset, p, splits) for p, splits in catalog.counts(store, volumes=True).items()),
        exclusions.read(store).reasons(),
    )


def _volumes(dataset: str | Path, partition: str, splits: dict[str, int]) -> VolumesPage:
    table = catalog.load(dataset, partition, [*_STACKS, "regularly_spaced_3d_volume"])
    regular = pc.sum(table["regularly_spaced_3d_volume"]).as_py() or 0
    charts = tuple(histogram(title, table[name]) for name, title in _STACKS.items())
    return VolumesPage(partition, splits, regular, charts)


def _modality(dataset: str | Path, modality: str, splits: dict[str, int], pictures: bool) -> ModalityPage:
    table = catalog.load(dataset, modality, [*_MEASURES, "manufacturer"])
    return ModalityPage(
        modality,
        splits,
        value_counts(table["manufacturer"]),
        tuple(histogram(title, table[name]) for name, title in _MEASURES.items()),
        _pictures(dataset, modality) if pictures else (),
    )


def value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """{value: rows}, most first; null is "unknown"."""
    counted = pc.value_counts(column).to_pylist()
    ordered = sorted(counted, key=lambda c: (-c["counts"], c["values"] or ""))
    return {c["values"] or "unknown": c["counts"] for c in ordered}


def histogram(name: str, column: pa.ChunkedArray) -> Histogram:
    """BINS equal bins from the least to the largest finite value; one bin where all are equal."""
    values = column.drop_null().to_numpy().astype(np.float64)
    values = values[np.isfinite(values)]
    unknown = len(column) - values.size
    if not values.size:
        return Histogram(name, (), (), unknown)
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return Histogram(name, (values.size,), (low, high), unknown)
    counts, edges = np.histogram(values, BINS, (low, high))
    return Histogram(name, tuple(counts.tolist()), tuple(edges.tolist()), unknown)


def _pictures(dataset: str | Path, modality: str) -> tuple[NDArray[np.uint8], ...]:
    """The images of the smallest keys: keys are keyed hashes, so the choice is random and always the same."""
    rows = catalog.load(dataset, modality, [*_PLACE, *_LEVELS]).slice(0, PICTURES).to_pylist()
    reader = ShardReader(dataset)
    try:
        return tuple(_picture(reader, modality, row) for row in rows)
    except (FileNotFoundError, ValueError):
        raise UserError(f"{dataset}: a shard is missing or damaged: run ingest verify --deep") from None
    finally:
        reader.close()


def _picture(reader: ShardReader, modality: str, row: dict[str, Any]) -> NDArray[np.uint8]:
    data = reader.read(modality, row["shard"], row["offset"], row["size"])
    unit = to_unit(get_codec(row["codec"]).decode(data), row, IntensityConfig())
    return thumbnail(np.rint(255 * unit).astype(np.uint8), SIDE)
