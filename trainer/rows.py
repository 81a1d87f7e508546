"""The catalogue rows that a run reads, one table a modality. No torch."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards import catalog
from shards.errors import UserError
from shards.schema import is_volumes
from trainer.config import DataConfig

Plan = dict[str, tuple[NDArray, NDArray]]  # modality: indices, pass numbers

_LOCATION = ("key", "shard", "offset", "size", "crc32", "codec", "rows", "columns")
_INTENSITY = ("window_center", "window_width", "window_function", "p005", "p995", "minimum", "maximum")
NEEDED_COLUMNS = (*_LOCATION, *_INTENSITY)  # of the catalogue, to read an image


@dataclass(frozen=True)
class Modality:
    """The catalogue rows of one modality that are to be read; the index is the row number."""

    name: str
    table: pa.Table
    _columns: dict[str, pa.Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def keys(self) -> pa.Array:
        return self._column("key")

    def key(self, index: int) -> str:
        return str(self._column("key")[index].as_py())

    def row(self, index: int) -> dict[str, Any]:
        """Location and intensity columns of one sample."""
        return {name: self._column(name)[index].as_py() for name in NEEDED_COLUMNS}

    def location(self, index: int) -> dict[str, Any]:
        """shard, offset, size and crc32 of one sample."""
        return {name: self._column(name)[index].as_py() for name in ("shard", "offset", "size", "crc32")}

    def _column(self, name: str) -> pa.Array:
        if name not in self._columns:
            self._columns[name] = self.table[name].combine_chunks()
        return self._columns[name]


def open_modality(data: DataConfig, name: str) -> Modality:
    """The rows of a modality in the configured split, sorted by key. Raises UserError when there is none."""
    if is_volumes(name):
        raise UserError(
            f"{name} holds volumes, training takes 2D images: set data.modalities to their slices"
        )
    split = None if data.split == "all" else data.split
    modality = Modality(name, catalog.load(data.dataset, name, list(NEEDED_COLUMNS), split))
    if not len(modality):
        there = ", ".join(m for m, n in catalog.counts(data.dataset).items() if sum(n.values())) or "none"
        raise UserError(
            f"the dataset has no {name} images in split {data.split} (modalities there: {there}): "
            f"set data.modalities or data.split to what it holds"
        )
    return modality


def in_order(modality: Modality, data: DataConfig) -> Modality:
    """The rows as the order of samples numbers them: as they lie in the shards, or by key.

    The names of shards are digests of their content: the numbering is the same wherever a dataset lies.
    """
    if data.order.layout == "keys":
        return modality
    places = [("shard", "ascending"), ("offset", "ascending")]
    return Modality(modality.name, modality.table.sort_by(places).combine_chunks())


def rows_of(root: str, modality: str, split: str, keys: pa.Array) -> Modality:
    """The rows of a split that have one of these keys, sorted by key; no other split is looked at."""
    table = catalog.load(root, modality, [*_LOCATION, *_INTENSITY], split)
    return Modality(modality, table.filter(pc.is_in(table["key"], keys)))
