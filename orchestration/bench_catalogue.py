"""`medswav bench catalogue`: memory of processes that read batches, with a shared catalogue and their own.

The rows are made up, the columns that training reads, 240 of CT to a unit as ingest makes them (2,400 of more
than two million); no pixels.
Processes of their own open them one after the other and look up blocks of 16 neighbours, as many as 400
batches of 64; then, while all are alive, the kernel says what is private to each (Private_Dirty, growth since
before opening) and its part of what is shared (Pss).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa

from orchestration.bench import Figure, figure
from shards import parquet
from shards.commit import Commit
from shards.dataset import DatasetInfo, open_or_create, to_json
from shards.errors import UserError
from shards.ids import digest
from shards.records import record_name
from shards.schema import catalog_schema
from shards.snapshot import take
from shards.store import Store
from shards.unit_files import CommittedFile
from trainer.config import DataConfig
from trainer.rows import NEEDED_COLUMNS, in_order, open_modality

ROWS = 1_000_000
UNIT_ROWS, LARGE_UNIT_ROWS = (
    240,
    2400,
)  # as ingest makes them; of more than MANY rows, to have them made sooner
MANY = 2_000_000  # then one process has its own table, which takes gigabytes while it is sorted
PROCESSES = (2, 4)
_READS, _BLOCK = 25_600, 16
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz234567", np.uint8)
_VERSUS = "a table in each process (data.catalogue_cache=none)"


def measure(seconds: float, rows: float = ROWS) -> Iterator[Figure]:
    """Private memory of 2 and 4 processes, seconds to build and to open.

    One turn: `seconds` is not looked at. Raises UserError.
    """
    count = int(rows)
    if count < 1:
        raise UserError("--rows: give a positive number")
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as name:
        root, cache = Path(name) / "dataset", Path(name) / "cache"
        unit_rows = UNIT_ROWS if count <= MANY else LARGE_UNIT_ROWS
        generate(root, count, unit_rows)
        alone = _processes(root, "none", 1)
        built = _processes(root, str(cache), 1)[0]
        of = f"{count:,} rows, {-(-count // unit_rows):,} units"
        for number in PROCESSES:
            ours = _processes(root, str(cache), number)
            theirs = _processes(root, "none", number) if count <= MANY else alone
            for what, text in (("private", "private memory"), ("pss", "with its part of shared pages")):
                one, other = (mean(p[what] for p in side) for side in (ours, theirs))
                detail = f"{of}; growth of each of {number} processes, {text}"
                yield figure(f"catalogue_{what}_{number}", max(one, 1.0), "bytes", other, _VERSUS, 1, detail)
        last, table = ours[-1], theirs[-1]
        files = sum(path.stat().st_size for path in cache.rglob("*.npy"))
        peaks = f"peak of the process {built['peak'] / 1e6:.0f} MB against {table['peak'] / 1e6:.0f} MB"
        detail = f"{of}; CPU time, {built['seconds']:.1f} s passed against {table['seconds']:.1f}; "
        detail += f"{files / 1e6:.0f} MB of files; {peaks}"
        yield figure("catalogue_build", built["cpu"], "s", table["cpu"], _VERSUS, 1, detail)
        detail = f"{of}; CPU time, {last['seconds']:.2f} s passed; the last of {PROCESSES[-1]} processes"
        yield figure("catalogue_open", last["cpu"], "s", table["cpu"], _VERSUS, 1, detail)
        detail = f"{of}; CPU time, all columns of a row, in blocks of {_BLOCK}"
        yield figure("catalogue_row", last["row"] * 1e3, "ms", table["row"] * 1e3, _VERSUS, 1, detail)


def generate(root: Path, rows: int, unit_rows: int = UNIT_ROWS) -> None:
    """A dataset with a catalogue and no shards."""
    store = Store(root)
    open_or_create(store, DatasetInfo("htj2k", digest("bench"), "bench", modalities=("ct",)))
    (root / "catalog" / "ct").mkdir(parents=True)
    (root / "commits").mkdir()
    for number, first in enumerate(range(0, rows, unit_rows)):
        table = _part(number, min(unit_rows, rows - first))
        data = parquet.to_bytes(table)
        path = f"catalog/ct/ct-{digest('part', data)}.parquet"
        (root / path).write_bytes(data)
        unit, count = digest("unit", str(number)), len(table)
        part = CommittedFile(path, "ct", len(data), digest(data), count)
        counts = {"samples": count, "quarantined": 0, "inputs": count}
        values: dict[str, Any] = vars(Commit(unit, (), (), None, counts)) | {
            "catalogs": [vars(part)],
            "statistics": {"ct": {"train": count, "val": 0, "test": 0}},
        }
        del values["retry"]
        (root / record_name(unit)).write_bytes(to_json(values))
    take(store)


def _part(seed: int, rows: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    keys = _LETTERS[np.frombuffer(rng.bytes(rows * 26), np.uint8) & 31].tobytes().decode()
    numbers = rng.random(rows) * 4000
    values: dict[str, Any] = {
        "key": sorted(keys[at : at + 26] for at in range(0, len(keys), 26)),
        "shard": [f"ct-{digest('shard', str(seed))}.tar"] * rows,
        "offset": np.arange(rows) * 153_600,
        "codec": ["htj2k"] * rows,
        "split": ["train"] * rows,
        "window_function": ["LINEAR"] * rows,
    }
    schema = pa.schema([catalog_schema().field(name) for name in (*NEEDED_COLUMNS, "split")])
    columns = [
        pa.array(
            values.get(field.name, numbers.astype(np.int32) if pa.types.is_integer(field.type) else numbers)
        )
        for field in schema
    ]
    return pa.table([column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema)


def _processes(root: Path, cache: str, number: int) -> list[dict[str, float]]:
    """What each of them measured while all were alive."""
    command = [sys.executable, "-m", "orchestration.bench_catalogue", str(root), cache]
    alive: list[subprocess.Popen[str]] = []
    try:
        for _ in range(number):  # one after the other: opening takes more memory than having opened
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            alive.append(process)
            _line(process)
        found = []
        for process in alive:
            assert process.stdin is not None
            process.stdin.write("measure\n")
        for process in alive:
            found.append(json.loads(_line(process)))
        return found
    finally:
        for process in alive:
            process.kill()
            process.communicate()


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process of the bench ended")
    return line


def _memory() -> dict[str, int]:
    """Bytes by name, of /proc/self/smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}


def main() -> None:
    """A process of its own: open, look up, wait to be asked, tell."""
    data = DataConfig(dataset=sys.argv[1], modalities=("ct",), catalogue_cache=sys.argv[2])
    before, began, cpu = _memory(), time.perf_counter(), time.process_time()
    rows = in_order(open_modality(data, "ct"), data)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    rng = np.random.default_rng(os.getpid())
    firsts = rng.integers(0, max(1, len(rows) - _BLOCK), _READS // _BLOCK).tolist()
    rows.row(0)
    started = time.process_time()
    for first in firsts:
        for index in range(first, min(first + _BLOCK, len(rows))):
            rows.row(index)
    row = (time.process_time() - started) / _READS
    print("opened", flush=True)
    sys.stdin.readline()
    after = _memory()
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    facts = {
        "seconds": seconds,
        "cpu": cpu,
        "row": row,
        "peak": peak,
        "private": after["Private_Dirty"] - before["Private_Dirty"],
        "pss": after["Pss"] - before["Pss"],
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
