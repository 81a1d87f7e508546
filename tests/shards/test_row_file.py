"""Catalogue rows in a mapped file: the values of the table, whatever the parts they come in."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards import row_file
from shards.row_file import LongKeyError, RowFile, write
from shards.schema import catalog_schema
from trainer.rows import NEEDED_COLUMNS as COLUMNS

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz234567", np.uint8)


def table(rows: int, shards: list[str], seed: int) -> pa.Table:
    """Random rows, nulls where the schema has them."""
    rng = np.random.default_rng(seed)
    letters = LETTERS[rng.integers(0, 32, (rows, 26))]
    letters[::3, :8] = ord("q")  # the first 8 letters alone do not order them
    values = {
        "key": [bytes(one).decode() for one in letters],
        "shard": rng.choice(shards, rows),
        "offset": rng.permutation(rows * 10)[:rows] * 512 + (seed << 40),
        "codec": rng.choice(["htj2k", "png16"], rows),
        "window_function": rng.choice(["LINEAR", "SIGMOID"], rows),
    }
    columns = {}
    for name in COLUMNS:
        field = catalog_schema().field(name)
        found = values.get(name)
        if found is None:
            found = rng.integers(0, 2**31, rows) if pa.types.is_integer(field.type) else rng.normal(size=rows)
        mask = rng.random(rows) < 0.3 if field.nullable else None
        columns[name] = pa.array(found, field.type, mask=mask)
    return pa.table(columns)


def test_rows_are_those_of_the_sorted_table_whatever_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_file, "_BUCKET_ROWS", 100)  # several buckets of keys
    parts = [
        table(200, ["d", "a"], 1),
        table(0, ["x"], 2),
        table(300, ["c", "a", "b"], 3),
        table(1, ["e"], 4),
    ]
    assert write(tmp_path, parts, COLUMNS) == 501
    found = RowFile(tmp_path, COLUMNS)
    whole = pa.concat_tables(parts).sort_by([("shard", "ascending"), ("offset", "ascending")])
    rows = [found.row(n) for n in range(len(found))]
    assert rows == whole.to_pylist() and list(rows[0]) == list(COLUMNS)
    assert [rows[n]["key"] for n in found.by_key.tolist()] == sorted(whole["key"].to_pylist())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.npy" for name in ("rows", "by_key", "shard", "codec", "window_function")
    )


def test_a_flipped_bit_is_never_a_row(tmp_path: Path) -> None:
    write(tmp_path, [table(50, ["a"], 1)], COLUMNS)
    path = tmp_path / "rows.npy"
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(
        len(data) - 50 * (row_file.row_bytes(COLUMNS) - 4), len(data), 20
    ):
        data[place] ^= 16
        path.write_bytes(data)
        opened = RowFile(tmp_path, COLUMNS)
        with pytest.raises(ValueError, match="other bytes than were written"):
            [opened.row(n) for n in range(50)]
        data[place] ^= 16


def test_a_key_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    one = table(1, ["a"], 1)
    long = one.set_column(0, "key", pa.array(["k" * 27]))
    with pytest.raises(LongKeyError, match="26 characters"):
        write(tmp_path, [long], COLUMNS)


def test_opening_and_reading_takes_no_private_memory(tmp_path: Path) -> None:
    part = table(2000, [f"s{n}" for n in range(50)], 1)
    count = write(tmp_path, [part] * 50, COLUMNS)
    before = private_bytes()
    opened = RowFile(tmp_path, COLUMNS)
    for n in range(0, count, 100):
        opened.row(n)
    assert private_bytes() - before < 0.1 * count * row_file.row_bytes(COLUMNS)


def private_bytes() -> int:
    """Anonymous memory of this process: what no other process can share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("Anonymous:"))
    return int(kilobytes) << 10
