"""The catalogue rows that a run reads, modality by modality. No torch.

Many rows lie in a file that all processes of a node map (data.catalogue_cache), few in a table of each
process. Both number them alike and give the same values, so that a batch does not depend on which it is.
"""

import logging
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards import catalog
from shards.errors import UserError
from shards.objects import open_store
from shards.row_cache import NoRowCacheError, Wanted, open_rows
from shards.row_file import RowFile
from shards.schema import is_volumes
from trainer.config import DataConfig
from trainer.volumes import VOLUME_COLUMNS

Plan = dict[str, tuple[NDArray, NDArray]]  # modality: indices, pass numbers

_LOCATION = ("key", "shard", "offset", "size", "crc32", "codec", "rows", "columns")
_INTENSITY = ("window_center", "window_width", "window_function", "p005", "p995", "minimum", "maximum")
NEEDED_COLUMNS = (*_LOCATION, *_INTENSITY)  # of the catalogue, to read an image
SHARED_ROWS = 1_000_000  # of a modality: fewer are not worth a file, with data.catalogue_cache=auto
TABLE_ROW_BYTES = 364  # that a process grows by for a row of its own table (BENCHMARKS.md)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Modality:
    """The catalogue rows of one modality that are to be read; the index is the row number."""

    name: str
    table: pa.Table
    _columns: dict[str, pa.Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

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


@dataclass(frozen=True)
class MappedModality:
    """As Modality, of a row file. by_key: numbered by key, else by shard and offset."""

    name: str
    file: RowFile
    by_key: bool = True

    def __len__(self) -> int:
        return len(self.file)

    def key(self, index: int) -> str:
        return str(self.row(index)["key"])

    def row(self, index: int) -> dict[str, Any]:
        """Location and intensity columns of one sample. Raises UserError for a damaged file."""
        try:
            return self.file.row(int(self.file.by_key[index]) if self.by_key else index)
        except ValueError as error:
            raise UserError(f"{error}: remove that folder, and run again") from None

    def location(self, index: int) -> dict[str, Any]:
        """shard, offset, size and crc32 of one sample."""
        row = self.row(index)
        return {name: row[name] for name in ("shard", "offset", "size", "crc32")}


@dataclass(frozen=True)
class VolumeModality(Modality):
    """Of volumes: a sample lies where its slices do, which a shard holds one after the other."""

    def row(self, index: int) -> dict[str, Any]:
        """VOLUME_COLUMNS of one sample."""
        return {name: self._column(name)[index].as_py() for name in VOLUME_COLUMNS}


def with_range(table: pa.Table) -> pa.Table:
    """Rows of volumes with `offset` and `size` of the bytes that hold all slices, headers between them too.

    `crc32` is null: the pixels are held to pixel_digest when they are decoded. Raises UserError where slices
    are out of order.
    """
    offset, size = [], []
    for offsets, sizes in zip(table["offsets"].to_pylist(), table["sizes"].to_pylist(), strict=True):
        if any(a + n > b for a, n, b in zip(offsets, sizes, offsets[1:], strict=False)):
            raise UserError("the slices of a volume are out of order: run ingest verify on the dataset")
        offset.append(offsets[0])
        size.append(offsets[-1] + sizes[-1] - offsets[0])
    table = table.append_column("offset", pa.array(offset, pa.int64()))
    table = table.append_column("size", pa.array(size, pa.int64()))
    return table.append_column("crc32", pa.nulls(table.num_rows, pa.int64()))


Rows = Modality | MappedModality


def open_modalities(data: DataConfig) -> dict[str, Rows]:
    """The rows of each modality in the configured split, sorted by key. Raises UserError for one without."""
    split = None if data.split == "all" else data.split
    state = "" if data.catalogue_cache == "none" else catalog.state(data.dataset)
    found: dict[str, Rows] = {}
    for name in data.modalities:
        found[name] = _mapped(data, name, split, state) or _table(data, name, split)
    pa.default_memory_pool().release_unused()  # commit records and what was sorted: no other use is near
    return found


def open_modality(data: DataConfig, name: str) -> Rows:
    """`open_modalities` of one."""
    return open_modalities(data.model_copy(update={"modalities": (name,)}))[name]


def _table(data: DataConfig, name: str, split: str | None) -> Modality:
    modality = load_rows(data.dataset, name, split)
    if not len(modality):
        raise UserError(none_there(data.dataset, name, data.split))
    return modality


def none_there(root: str, name: str, split: str) -> str:
    """Why a run cannot read a modality, and what to do."""
    volumes = is_volumes(name)
    counts = catalog.counts(root, volumes=volumes)
    there = ", ".join(m for m, n in counts.items() if sum(n.values())) or "none"
    if volumes and not counts:
        return f"the dataset has no {name}: ingest the series into a new one with --as slices,volumes"
    return (
        f"the dataset has no {name} {'volumes' if volumes else 'images'} in split {split} (modalities there: "
        f"{there}): set data.modalities or data.split to what it holds"
    )


def load_rows(root: str, name: str, split: str | None = None, more: tuple[str, ...] = ()) -> Modality:
    """The rows of a modality, of images or of volumes, sorted by key. more: further columns of the table."""
    if not is_volumes(name):
        return Modality(name, catalog.load(root, name, [*NEEDED_COLUMNS, *more], split))
    return VolumeModality(name, with_range(catalog.load(root, name, [*VOLUME_COLUMNS, *more], split)))


def _mapped(data: DataConfig, name: str, split: str | None, state: str) -> MappedModality | None:
    """The row file as data.catalogue_cache has it; None: a table of this process, as volumes always have.
    Raises UserError."""
    if data.catalogue_cache == "none" or is_volumes(name):
        return None
    auto = data.catalogue_cache == "auto"
    store = open_store(data.dataset)
    if auto and catalog.select(store, name, split).committed < SHARED_ROWS:
        return None  # before a word about a folder that is not needed
    try:
        folder = _own_folder() if auto else Path(data.catalogue_cache)
        wanted = Wanted(store, name, split, NEEDED_COLUMNS)
        file = open_rows(wanted, state, folder, SHARED_ROWS if auto else 1)
        if auto and file is not None:
            _own_folder()  # still ours: it may have been made meanwhile
    except NoRowCacheError as error:
        if not auto:
            raise UserError(f"data.catalogue_cache: {error}") from None
        size = catalog.select(store, name, split).committed * TABLE_ROW_BYTES / 1e9
        log.warning(
            "the catalogue of %s takes %.1f GB of memory in every process that makes batches, because it "
            "cannot be shared: %s; set data.catalogue_cache to a folder on a disk of the node",
            *(name, size, error),
        )
        return None
    return MappedModality(name, file) if file is not None else None


def _own_folder() -> Path:
    """Of this user, among the temporary files of the node. Raises NoRowCacheError where another has it."""
    folder = Path(tempfile.gettempdir()) / f"medswav-{os.getuid()}"
    try:
        known = folder.lstat()
    except OSError:  # it is made private when it is needed
        return folder
    if known.st_uid != os.getuid() or known.st_mode & 0o077 or folder.is_symlink():
        raise NoRowCacheError(f"{folder} can be written by others")
    return folder


def in_order(modality: Rows, data: DataConfig) -> Rows:
    """The rows as the order of samples numbers them: as they lie in the shards, or by key.

    The names of shards are digests of their content: the numbering is the same wherever a dataset lies.
    """
    if data.order.layout == "keys":
        return modality
    if isinstance(modality, MappedModality):
        return replace(modality, by_key=False)
    places = [("shard", "ascending"), ("offset", "ascending")]
    return type(modality)(modality.name, modality.table.sort_by(places).combine_chunks())


def rows_of(root: str, modality: str, split: str, keys: pa.Array) -> Modality:
    """The rows of a split that have one of these keys, sorted by key; no other split is looked at."""
    rows = load_rows(root, modality, split)
    return type(rows)(modality, rows.table.filter(pc.is_in(rows.table["key"], keys)))
