"""Parquet with fixed writer options: equal tables give equal bytes."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards import store

_ROW_GROUP_ROWS = 65_536


def to_bytes(table: pa.Table) -> bytes:
    """A Parquet file of the table (rows must be sorted by the caller). No time, host or path goes in."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=_ROW_GROUP_ROWS,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
    )
    return sink.getvalue().to_pybytes()


def write_local(path: Path, table: pa.Table) -> None:
    """Write to a local file that must not exist. All or nothing: ParquetWriter may leave a part."""
    data = to_bytes(table)
    with open(path, "xb", buffering=0) as file:
        store.write_all(file.fileno(), data)


def read_bytes(data: bytes) -> pa.Table:
    """The table of a Parquet file in memory."""
    return pq.read_table(pa.BufferReader(data))


def read(
    files: store.Store, name: str, columns: Sequence[str] | None = None, threads: bool = True
) -> pa.Table:
    """A Parquet file of a store, or some of its columns. Raises FileNotFoundError, ArrowException."""
    source = pa.BufferReader(files.read(name)) if files.remote else files.local(name)
    wanted = None if columns is None else list(columns)
    return pq.read_table(source, columns=wanted, partitioning=None, use_threads=threads)
