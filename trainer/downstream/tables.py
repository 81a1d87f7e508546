"""Label tables of a task: those of a dataset by name, or a CSV or Parquet file with a column `key`."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq

from shards import catalog
from shards.errors import UserError
from shards.ids import digest
from shards.store import file_sha256

_SUFFIXES = (".csv", ".parquet")
_LISTS = ("labels", "unknown")  # columns whose cells hold several labels; in a CSV apart by a semicolon


def is_file(labels: str) -> bool:
    """Whether `labels` is the path of a table, and not the name of one in the dataset."""
    return labels.endswith(_SUFFIXES)


def read_table(dataset: str, labels: str, needed: Sequence[str] = ()) -> pa.Table:
    """The table; its keys are those of the dataset, each once. needed: columns that it must have, of which
    `a|b` is either. Raises UserError."""
    table = _file(Path(labels)) if is_file(labels) else catalog.labels(dataset, labels)
    there = table.column_names
    for wanted in ("key", *needed):
        if not set(wanted.split("|")) & set(there):
            names = " or ".join(wanted.split("|"))
            raise UserError(
                f"the label table {Path(labels).name} has no column {names} (it has: {', '.join(there)}): "
                "correct it, or join it to the dataset with medswav ingest label"
            )
    keys = table["key"]
    if keys.null_count or len(set(keys.to_pylist())) < table.num_rows:
        raise UserError(f"the label table {Path(labels).name} must have each key once: remove the other rows")
    return table


def table_digest(dataset: str, labels: str) -> str:
    """Equal tables give equal digests. Raises UserError."""
    if not is_file(labels):
        return catalog.labels_with_digest(dataset, labels)[1]
    _there(Path(labels))
    return digest(file_sha256(Path(labels)))


def _file(path: Path) -> pa.Table:
    _there(path)
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        names = pv.open_csv(path).schema.names
        text = pv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
        table = pv.read_csv(path, convert_options=text)
    except (pa.ArrowInvalid, OSError) as error:
        line = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise UserError(f"the label table {path.name} cannot be read ({line})") from None
    for name in set(_LISTS) & set(table.column_names):
        cells = [[] if cell is None else _several(cell) for cell in table[name].to_pylist()]
        column = pa.array(cells, pa.list_(pa.string()))
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _there(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"there is no label table {path}: give a file, or the name of a table of the dataset")


def _several(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(";") if part.strip()]
