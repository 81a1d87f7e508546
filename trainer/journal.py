"""`RUN/metrics.jsonl`: one JSON object a step, written by rank 0, in step order, no step twice.

`loss` is written with repr's digits, so it reads back as exactly the number that was computed.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer import files


def journal_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that a crash cut off is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def truncate(path: Path, step: int) -> None:
    """Drop every line of `step` and later: they are computed again after a resume."""
    kept = [row for row in read(path) if row["step"] < step]
    with files.disk_full_is_clear("writing metrics"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(path, _lines(kept).encode())


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with files.disk_full_is_clear("writing metrics"), path.open("a") as file:
        file.write(_lines(rows))


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON has no nan: a diagnostic that is not finite becomes null."""
    return "".join(json.dumps({n: _clean(v) for n, v in row.items()}) + "\n" for row in rows)


def _clean(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
