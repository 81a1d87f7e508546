"""`medswav bench plan`: the plan of a generated inventory, in a process of its own, whose peak memory counts.

The rows are as the header scan leaves them (ingest.inventory): input ids, bytes, and a key of partition,
patient, study and series; the mix of the paper: 72 % CT, 25 % MR, 2 % US, 1 % X-ray, in no order. The
baseline is the plan in memory (ingest.plan) of fewer such rows.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from ingest.config import IngestConfig, load_config
from ingest.discover import Entry
from ingest.inventory import INPUT_LENGTH, KEYS_SCHEMA, PART_ROWS, Inventory, write_keys
from ingest.plan import plan_units
from ingest.planner import plan_stored
from ingest.sandbox import process_usage
from orchestration.bench import Figure, figure
from shards.errors import UserError
from shards.ids import Pseudonymizer
from shards.store import Store

ROWS = 105_000_000
_BASELINE_ROWS = 200_000
_GOAL_SECONDS, _GOAL_BYTES = 120.0, 2e9
_ROW_BYTES = 200  # of scratch: generated, spread, planned
_ALPHABET = np.frombuffer(b"234567abcdefghijklmnopqrstuvwxyz", np.uint8)
_MIX = (("ct", 0.72, 60), ("mr", 0.25, 40), ("us", 0.02, 8), ("xr", 0.01, 2))  # share of rows, rows a series
_NAMES = Pseudonymizer(b"benchmark benchmark")


def measure(seconds: float, rows: float = ROWS) -> Iterator[Figure]:
    """Rows a second against the plan in memory; seconds and peak memory against the goals for 105 M rows.

    One turn: `seconds` is not looked at. Raises UserError where the scratch disk is too small.
    """
    count = int(rows)
    if count < 1:
        raise UserError("--rows: give a positive number")
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as name:
        folder = Path(name)
        status = os.statvfs(folder)
        if status.f_bavail * status.f_frsize < count * _ROW_BYTES:
            raise UserError(f"{count} rows need {count * _ROW_BYTES >> 30} GiB of scratch: set TMPDIR")
        generate(folder / "inventory", count)
        found = json.loads(
            subprocess.run(
                [sys.executable, "-m", "orchestration.bench_plan", str(folder), str(count)],
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
    base = _in_memory(min(count, _BASELINE_ROWS))
    detail = (
        f"{count} rows to {found['units']} units in {found['seconds']:.1f} s, {found['cpu']:.1f} s of CPU, "
        f"peak {found['peak'] / 1e6:.0f} MB (VmHWM), plan of {found['bytes'] / 1e6:.0f} MB on disk"
    )
    versus = "the plan in memory, from a list of entries"
    yield figure("plan_rows", count / found["seconds"], "rows/s", base, versus, 1, detail)
    versus = "the goal, for 105 M rows"
    yield figure("plan_seconds", found["seconds"], "s", _GOAL_SECONDS, versus, 1, detail)
    yield figure("plan_memory", found["peak"], "bytes", _GOAL_BYTES, versus, 1, detail)


def generate(folder: Path, rows: int) -> None:
    """The planner's half of an inventory of `rows` rows."""
    folder.mkdir(mode=0o700)

    def part(number: int) -> None:
        count = min(PART_ROWS, rows - number * PART_ROWS)
        write_keys(folder / f"{number:08d}.keys", _part(number, count))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(part, range(-(-rows // PART_ROWS))))


def _part(seed: int, count: int) -> pa.RecordBatch:
    rng = np.random.default_rng(seed)
    inputs = _ALPHABET[np.frombuffer(rng.bytes(count * INPUT_LENGTH), np.uint8) & 31]
    inputs.reshape(count, INPUT_LENGTH)[:, INPUT_LENGTH // 2] = ord("-")
    keys, lengths = [], []
    for modality, share, length in _MIX:
        series = max(1, round(count * share / length))
        lengths += [length] * series
        for a, b in rng.integers(0, 1 << 62, (series, 2)).tolist():
            keys.append(
                f"{modality}\0\1PAT{a % 10**7:07d}\x001.2.840.113619.2.{a}\x001.2.840.113619.2.{a}.{b}"
            )
    codes = np.repeat(np.arange(len(keys), dtype=np.int32), lengths)
    codes = np.append(codes, np.full(max(0, count - len(codes)), 0, np.int32))[:count]
    key = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array([k.encode() for k in keys], pa.binary()))
    ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(INPUT_LENGTH), count, [None, pa.py_buffer(inputs)])
    sizes = pa.array(rng.integers(150_000, 600_000, count))
    return pa.record_batch([ids, sizes, key], schema=KEYS_SCHEMA)


def _config(folder: Path) -> IngestConfig:
    return load_config({"sources": [str(folder)], "output": str(folder / "dataset")})


def _in_memory(rows: int) -> float:
    """Rows a second of the plan in memory."""
    entries = []
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as name:
        batch = _part(0, rows)
        codes, keys = batch["key"].indices.to_pylist(), batch["key"].dictionary.to_pylist()
        for number, (size, code) in enumerate(zip(batch["size"].to_pylist(), codes, strict=True)):
            modality, _, group = keys[code].decode().partition("\0")
            path = f"{code:06d}/{number:08d}.dcm"
            identity = f"{number:026d}"
            entries.append(Entry(path, path, path, size, "dicom", identity, modality, group[1:]))
        start = time.perf_counter()
        plan_units(Store(Path(name) / "dataset"), entries, _config(Path(name)), _NAMES)
        return rows / (time.perf_counter() - start)


def main() -> None:
    """In the process of its own: plan, and print what it took as JSON."""
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    found = Inventory.reopened(folder / "inventory", _NAMES, rows)
    config, store = _config(folder), Store(folder / "dataset")
    start = time.perf_counter()
    todo = plan_stored(store, found, config, _NAMES, folder / "plan")
    seconds = time.perf_counter() - start
    peak = process_usage(os.getpid())[1]
    size = sum(store.size(name) for name in store.list("plans"))
    facts = {
        "seconds": seconds,
        "cpu": time.process_time(),
        "peak": peak,
        "units": len(todo.units),
        "bytes": size,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
