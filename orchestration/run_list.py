"""`medswav ls`: the runs and datasets below a folder, and how each stands."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from orchestration.metrics_endpoint import TARGETS_FILE
from orchestration.page import duration
from orchestration.run_data import config_of, standing_of
from shards import catalog
from shards.commit import committed_units
from shards.dataset import NAME as DATASET_FILE
from shards.errors import UserError
from shards.objects import is_url, open_store
from shards.plan import planned_units
from trainer import journal, run_state
from trainer.checkpoint_files import list_steps, path_of, problem


@dataclass(frozen=True)
class Row:
    """`kind`: run | dataset. state: running | done | stopped | broken; why: in words. Of a run: step,
    max_steps, last_checkpoint (step). Of a dataset: units and units_planned, images of each modality, volumes
    of each. changed: UTC."""

    path: str
    kind: str
    state: str
    why: str
    changed: str | None
    step: int | None = None
    max_steps: int | None = None
    last_checkpoint: int | None = None
    units: int | None = None
    units_planned: int | None = None
    images: dict[str, int] = field(default_factory=dict)
    volumes: dict[str, int] = field(default_factory=dict)


def ls(folder: Path, depth: int, as_json: bool) -> str:
    """The listing. Raises UserError."""
    if is_url(folder):
        raise UserError(
            f"{folder}: `medswav ls` looks through folders; `ingest status` shows one dataset there"
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that holds runs or datasets")
    rows = [row_of(path, kind, folder) for path, kind in find(folder, depth)]
    if as_json:
        return json.dumps([asdict(row) for row in rows], indent=1)
    if not rows:
        return f"no run and no dataset down to {depth} folders below {folder} (--depth looks deeper)"
    now = run_state.clock_of(folder)
    wide = min(40, max(len(row.path) for row in rows))
    return "\n".join(_line(row, wide, now) for row in rows)


def find(folder: Path, depth: int) -> Iterator[tuple[Path, str]]:
    """(path, kind) of what is there, by name; nothing is looked for inside of what was found."""
    names: list[str] = []
    try:
        kind = kind_of(folder)
        if kind is None and depth > 0:
            with os.scandir(folder) as entries:
                names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
    except PermissionError:
        return  # what lies beside it is listed all the same
    if kind is not None:
        yield folder, kind
    for name in sorted(names):
        yield from find(folder / name, depth - 1)


def kind_of(folder: Path) -> str | None:
    """run, dataset or neither."""
    if (folder / DATASET_FILE).is_file():
        return "dataset"
    if run_state.path_of(folder).is_file():
        return "run"
    begun = (folder / "attempts").is_dir() and journal.journal_path(folder).is_file()
    return "run" if begun or list_steps(folder) else None


def row_of(path: Path, kind: str, below: Path) -> Row:
    name = str(path.relative_to(below)) if path != below else str(below)
    with contextlib.suppress(PermissionError):
        return _run(path, name) if kind == "run" else _dataset(path, name)
    return Row(name, kind, "broken", "it may not be read", None)


def _run(path: Path, name: str) -> Row:
    state, steps = run_state.read(path), list_steps(path)
    good = [step for step in steps if problem(path_of(path, step), deep=False) is None]
    rows = journal.last(journal.journal_path(path))
    step = max([int(rows["step"]) + 1 if rows else 0, *good])
    changed = _utc(max(_mtime(journal.journal_path(path)), _mtime(run_state.path_of(path))))
    try:
        config = config_of(path, state)
    except UserError as error:
        return Row(name, "run", "broken", str(error), changed, step, None, max(good, default=None))
    standing = standing_of(path, state, config, run_state.clock_of(path))
    return Row(
        name,
        "run",
        standing.state,
        standing.why,
        changed,
        step=step,
        max_steps=config.max_steps,
        last_checkpoint=max(good, default=None),
    )


def _dataset(path: Path, name: str) -> Row:
    try:
        store = open_store(path)
        done, planned = committed_units(store), planned_units(store)
        images = {m: sum(by.values()) for m, by in catalog.counts(store).items()}
        volumes = {m: sum(by.values()) for m, by in catalog.counts(store, volumes=True).items()}
    except (UserError, OSError, ValueError) as error:
        return Row(name, "dataset", "broken", " ".join(str(error).split())[:200], None)
    left = len(planned - done)
    state, why = "done", ""
    if left:
        state, why = "stopped", f"{left} units to do: run the same `ingest run` again"
        if _is_at_work(path):
            state, why = "running", f"{left} units to do"
    return Row(
        name,
        "dataset",
        state,
        why,
        _utc(max((_mtime(p) for p in (path / "commits", path / DATASET_FILE)), default=0.0)),
        units=len(done),
        units_planned=len(planned | done),
        images=images,
        volumes=volumes,
    )


def _is_at_work(dataset: Path) -> bool:
    """An ingest that was killed leaves the entry of its metrics behind, and one on another machine cannot be
    asked: then the newest commit tells."""
    try:
        (entry,) = json.loads((dataset / TARGETS_FILE).read_bytes())
        host, port = entry["targets"][0].rsplit(":", 1)
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError):
        silent = run_state.clock_of(dataset) - _mtime(dataset / "commits")
        return silent < run_state.SILENT_SECONDS


def _line(row: Row, wide: int, now: float) -> str:
    if row.kind == "run":
        steps = f"step {row.step or 0:,}" + (f" of {row.max_steps:,}" if row.max_steps else "")
        kept = "no checkpoint" if row.last_checkpoint is None else f"checkpoint {row.last_checkpoint:,}"
        about = f"{steps}, {kept}"
    else:
        counts = [f"{modality} {count:,}" for modality, count in (row.images | row.volumes).items() if count]
        about = ", ".join(counts) or "no images"
    age = ""
    if row.changed:
        then = datetime.fromisoformat(row.changed).timestamp()
        age = f", {duration(max(0, now - then))} ago"
    why = f" ({row.why})" if row.why else ""
    return f"{row.kind:8} {row.state:8} {row.path:{wide}}  {about}{age}{why}"


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _utc(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else None
