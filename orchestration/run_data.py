"""What the page of a run shows, as plain values from the files of its folder. No torch."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from orchestration.report_data import modality_name
from shards.errors import UserError
from trainer import alarms, checkpoint_files, journal, run_state
from trainer.alarms import TITLES, Alarm, Event
from trainer.checkpoint_files import STATE, TENSORS, Listed, list_steps, listing, path_of
from trainer.config import TrainConfig
from trainer.run_state import RunState, Standing

POINTS = 400  # of a line: more cannot be told apart


@dataclass(frozen=True)
class Series:
    """Columns over optimizer steps done (from 1); nan where a row has no such value."""

    steps: tuple[int, ...] = ()
    columns: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def get(self, name: str) -> tuple[float, ...]:
        """All nan where there is no such column."""
        return self.columns.get(name, (math.nan,) * len(self.steps))

    def last(self, name: str) -> float:
        """The newest value, nan where there is none."""
        return next((v for v in reversed(self.get(name)) if math.isfinite(v)), math.nan)


@dataclass(frozen=True)
class RunData:
    """A run at one moment. metrics, timing: of the logged steps, thinned to POINTS, timing without its first
    row, in which all starts; recent: the newest rows of timing.jsonl as they are; use: mean prediction of
    each prototype of late, by group, at the newest checkpoint; free_bytes: on its disk; seconds: of training,
    without what lay between two attempts."""

    name: str
    standing: Standing
    config: TrainConfig
    state: RunState | None
    step: int
    metrics: Series
    timing: Series
    recent: tuple[dict[str, Any], ...]
    alarms: tuple[Alarm, ...]
    events: tuple[str, ...]
    use: dict[str, tuple[float, ...]]
    checkpoints: tuple[Listed, ...]
    free_bytes: int
    seconds: float = math.nan


def gather(run_dir: Path, name: str | None = None) -> RunData:
    """Raises UserError where `run_dir` is no run, or one of another version."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} does not exist: give the --run-dir of `medswav pretrain`")
    state = run_state.read(run_dir)
    config = config_of(run_dir, state)
    now = run_state.clock_of(run_dir)
    rows = journal.read(journal.journal_path(run_dir))
    logged = [row for row in rows if any(key.startswith("m/") for key in row)]
    timing = journal.read(run_state.timing_path(run_dir))
    watch = alarms.Watch(config)
    events = [_event(event) for row in logged for event in watch.add(row)]
    step = int(rows[-1]["step"]) + 1 if rows else 0
    return RunData(
        name=name or run_dir.resolve().name,
        standing=standing_of(run_dir, state, config, now),
        config=config,
        state=state,
        step=max([step, *list_steps(run_dir)]),
        metrics=series(logged),
        timing=series(timing[1:] or timing),
        recent=tuple(timing[-10:]),
        alarms=tuple(watch.active),
        events=tuple(events),
        use=use_of(run_dir),
        checkpoints=tuple(
            listing(run_dir, config.checkpoint.keep, config.checkpoint.keep_every_steps, now, deep=False)
        ),
        free_bytes=shutil.disk_usage(run_dir).free,
        seconds=_seconds(timing),
    )


def config_of(run_dir: Path, state: RunState | None) -> TrainConfig:
    """From run.json, or from the newest checkpoint that can be read. Raises UserError."""
    trees = [state.config] if state is not None else []
    for step in reversed(list_steps(run_dir)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            trees.append(json.loads((path_of(run_dir, step) / STATE).read_bytes())["config"])
    if not trees:
        raise UserError(
            f"{run_dir} is no run folder, or no step of it is done yet: give the --run-dir of "
            "`medswav pretrain` (`medswav ls` lists runs)"
        )
    try:
        return TrainConfig.model_validate(trees[0])
    except ValidationError as error:
        name = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(
            f"the run in {run_dir} has settings that this version does not know (first {name}): use the "
            "version that wrote it"
        ) from None


def standing_of(run_dir: Path, state: RunState | None, config: TrainConfig, now: float) -> Standing:
    """As run.json has it; of a run of a version before, as its files do."""
    steps = list_steps(run_dir)
    good = [s for s in steps if checkpoint_files.problem(path_of(run_dir, s), deep=False) is None]
    if steps and not good:
        return Standing("broken", "no checkpoint has the files of its manifest")
    if state is not None:
        return run_state.standing(run_dir, state, now)
    if good and good[-1] >= config.max_steps and (run_dir / "encoder.safetensors").is_file():
        return Standing("done")
    return Standing("stopped", "the same command goes on")


def series(rows: Sequence[Mapping[str, Any]], points: int = POINTS) -> Series:
    """Numbers of journal rows, thinned: a point is the mean of rows in a row, at the step of the last."""
    steps = [int(row["step"]) + 1 for row in rows]
    names = {name: None for row in rows for name, value in row.items() if isinstance(value, int | float)}
    parts = np.array_split(np.arange(len(rows)), min(points, len(rows))) if rows else []
    return Series(
        tuple(steps[part[-1]] for part in parts),
        {n: tuple(_mean(rows[i].get(n) for i in part) for part in parts) for n in names if n != "step"},
    )


def _mean(values: Iterable[Any]) -> float:
    found = [float(v) for v in values if v is not None and math.isfinite(v)]
    return sum(found) / len(found) if found else math.nan


def _event(event: Event) -> str:
    """A line without the advice, which stands with what is still wrong."""
    alarm = event.alarm
    title = f"{modality_name(alarm.modality)}: {TITLES[alarm.sign]}"
    return f"Step {event.step:,}: {title}" + (f", since step {alarm.since:,}" if event.raised else " no more")


def _seconds(timing: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all logged intervals: what was spent between two attempts is not counted."""
    if not timing:
        return math.nan
    total, before = 0.0, -1
    for row in timing:
        steps, before = int(row["step"]) - before, int(row["step"])
        total += steps * float(row["step_seconds"])
    return total


def use_of(run_dir: Path) -> dict[str, tuple[float, ...]]:
    """{group: share of the views that each prototype got of late}, as the newest checkpoint has it."""
    from safetensors import SafetensorError, safe_open

    for step in reversed(list_steps(run_dir)):
        with contextlib.suppress(OSError, SafetensorError):
            with safe_open(path_of(run_dir, step) / TENSORS, "np") as file:
                names = [name for name in file.keys() if name.startswith("use.")]  # noqa: SIM118 - no dict
                found = {name.removeprefix("use."): file.get_tensor(name) for name in names}
            return {name: tuple((v[:-1] / max(float(v[-1]), 1e-9)).tolist()) for name, v in found.items()}
    return {}
