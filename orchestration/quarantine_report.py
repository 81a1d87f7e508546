"""What `ingest quarantine` prints: refused inputs and why, by pseudonym; paths from a path map only."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestration import path_map
from orchestration.report_data import REASON_TEXT
from shards import catalog
from shards.errors import UserError
from shards.schema import Reason

Paths = dict[str, list[str]]


def listing(dataset: Path, reason: str | None, limit: int, paths: Path | None, as_json: bool) -> str:
    """The refusals, sorted by source; at most `limit` of them (0: all). Raises UserError.

    As JSON {"rows": number that match, "refused": [the rows shown]}.
    """
    table = catalog.quarantine(dataset)
    if reason is not None:
        if reason not in set(Reason):
            raise UserError(f"{reason!r} is no reason; the reasons are {', '.join(Reason)}")
        table = table.filter(pc.equal(table["reason"], reason))
    known = path_map.read(paths) if paths is not None else {}
    rows = _rows(table.slice(0, limit or None), known)
    if as_json:
        return json.dumps({"rows": table.num_rows, "refused": rows}, indent=1)
    lines = [_line(row) for row in rows]
    if len(rows) < table.num_rows:
        lines.append(f"{table.num_rows - len(rows)} more: --limit 0 lists all")
    return "\n".join(lines) if lines else "nothing was refused" + (f" as {reason}" if reason else "")


def show(dataset: Path, source: str, paths: Path | None, as_json: bool) -> str:
    """Every refusal of one source, given by its pseudonym or a unique beginning of it. Raises UserError."""
    table = catalog.quarantine(dataset)
    if source:
        table = table.filter(pc.starts_with(table["source"], source))
    found = pc.unique(table["source"]).to_pylist()
    if not found:
        raise UserError(f"no refused source begins with {source!r}: see `ingest quarantine ls`")
    if len(found) > 1:
        raise UserError(f"{len(found)} refused sources begin with {source!r}: give more of the pseudonym")
    rows = _rows(table, path_map.read(paths) if paths is not None else {})
    if as_json:
        return json.dumps({"source": found[0], "refused": rows}, indent=1)
    lines = [f"source   {found[0]}"]
    lines += [f"path     {path}" for path in rows[0].get("paths", [])]
    for row in rows:
        what = "whole file" if row["frame"] < 0 else f"frame {row['frame']}"
        lines.append(f"{row['reason']:8} {what}: {REASON_TEXT[row['reason']]}")
        lines.append(f"         {row['kind']}, modality {row['modality']}, unit {row['unit']}")
    return "\n".join(lines)


def _rows(table: pa.Table, known: Paths) -> list[dict[str, Any]]:
    rows = table.to_pylist()
    return [row | ({"paths": known[row["source"]]} if row["source"] in known else {}) for row in rows]


def _line(row: dict[str, Any]) -> str:
    frame = "" if row["frame"] < 0 else f" frame {row['frame']}"
    path = "".join(f"  {path}" for path in row.get("paths", []))
    return f"{row['source']}  {row['reason']:24} {row['modality']:6} {row['kind']}{frame}{path}"
