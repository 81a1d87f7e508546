"""`RUN/run.json`: what a run is and how it stands, for `medswav ls`, `medswav report` and people. No torch.

Rank 0 writes it when an attempt begins and when it ends. Nothing is decided by it: a run goes on from its
checkpoints. What a killed attempt left says `running`, so a reader looks whether the process is still there
(on its own machine) or whether the run still writes (on another).
"""

import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from shards.errors import UserError
from shards.objects import location
from trainer import attempts, files, journal
from trainer.attempts import Attempt

log = logging.getLogger(__name__)
NAME, TIMING = "run.json", "timing.jsonl"
# Filled up with blanks: what is told at the end of a run that filled its disk goes into the blocks
# that it has.
_BLOCK, _SPARE = 4096, 1024
SILENT_SECONDS = 300.0  # of a run on another machine, at least
_SLOW_STEPS = 10  # as many logged intervals without a row, at least


@dataclass(frozen=True)
class RunState:
    """`state`: of the newest attempt, as that has told it. step: optimizer steps done, where it began or
    ended. began, changed: UTC, ISO 8601. process: when that process was started, in clock ticks since boot,
    by which another one of the same number is told from it. config: the whole configuration."""

    state: Literal["running", "finished", "stopped", "failed"]
    attempt: int
    step: int
    world: int
    device: str
    host: str
    pid: int
    process: int | None
    began: str
    changed: str
    error: str | None = None
    dataset_fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """How a run stands now. `state`: running | done | stopped | broken; why: in words, or empty."""

    state: str
    why: str = ""


def path_of(run_dir: Path) -> Path:
    return run_dir / NAME


def timing_path(run_dir: Path) -> Path:
    return run_dir / TIMING


def utc_now() -> str:
    """`2026-11-25T19:40:05Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Told:
    """What an attempt says of itself when it ends."""

    step: int = 0
    finished: bool = False


@contextlib.contextmanager
def telling(attempt: Attempt, about: RunState) -> Iterator[Told]:
    """Of rank 0: run.json says `running` in the body, and afterwards how it ended. A disk that is full, or an
    attempt that was replaced, is no reason to end."""
    told = Told(about.step)
    _write(attempt, about)
    try:
        yield told
    except BaseException as error:
        text = without_paths(error, attempt.run_dir, about.config)[:300]
        _write(attempt, replace(about, state="failed", step=told.step, changed=utc_now(), error=text))
        raise
    state: Literal["finished", "stopped"] = "finished" if told.finished else "stopped"
    _write(attempt, replace(about, state=state, step=told.step, changed=utc_now()))


def without_paths(
    error: BaseException, run_dir: Path, config: Mapping[str, Any], dataset: str | None = None
) -> str:
    """The error in one line for pages that name no path: its own folders have names in place of their paths.

    config: the whole configuration as plain values; dataset: where it lies, if not where that says.
    """
    data = config.get("data") or {}
    named = {
        "the dataset": (dataset, data.get("dataset")),
        "the node cache": (data.get("node_cache"),),
        "the catalogue cache": (data.get("catalogue_cache"),),
        "the run folder": (str(run_dir),),
    }
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    known = {}
    for name, paths in named.items():
        for path in paths:
            if path and ("/" in path or name == "the dataset"):
                known[path] = name
                with contextlib.suppress(UserError):  # an URL of no known store: as it was given
                    known[location(path)] = name
    for path in sorted(known, key=len, reverse=True):
        # Neither a part of a longer name nor of a word: a dataset may be given as `data`.
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", known[path], text)
    return " ".join(text.split()) or type(error).__name__


def of_this_process(
    attempt: int, step: int, world: int, device: str, fingerprint: str, config: dict[str, Any]
) -> RunState:
    """The state of an attempt that begins now, here."""
    now, pid = utc_now(), os.getpid()
    return RunState(
        state="running",
        attempt=attempt,
        step=step,
        world=world,
        device=device,
        host=socket.gethostname(),
        pid=pid,
        process=_started(pid),
        began=now,
        changed=now,
        dataset_fingerprint=fingerprint,
        config=config,
    )


def read(run_dir: Path) -> RunState | None:
    """None where there is none, of a version before or damaged."""
    try:
        return RunState(**json.loads(path_of(run_dir).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def standing(run_dir: Path, state: RunState, now: float) -> Standing:
    """How a run stands at the Unix time `now` of the file server."""
    if state.state == "finished":
        return Standing("done")
    if state.state == "failed":
        return Standing("broken", state.error or "an error")
    if state.state == "stopped":
        return Standing("stopped", "by a signal, with a checkpoint: the same command goes on")
    if state.host == socket.gethostname():
        if _is_alive(state.pid, state.process):
            return Standing("running")
        return Standing("stopped", f"process {state.pid} is gone without a word: the same command goes on")
    silent = now - _last_sign(run_dir)
    if silent <= _patience(run_dir):
        return Standing("running", f"on {state.host}")
    return Standing("stopped", f"no sign of life from {state.host} for {silent / 60:.0f} min")


def _write(attempt: Attempt, state: RunState) -> None:
    path = path_of(attempt.run_dir)
    text = json.dumps(asdict(state), indent=1)
    try:
        attempt.check()
        files.replace_file(path, _filled(text, -(-(len(text) + _SPARE) // _BLOCK) * _BLOCK))
    except attempts.ReplacedError:
        return
    except OSError as error:
        log.warning("%s could not be replaced: %s", path.name, error.strerror)
        with contextlib.suppress(OSError), path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if len(text) < size:
                file.write(_filled(text, size))


def _filled(text: str, size: int) -> bytes:
    return text.ljust(size - 1).encode() + b"\n"


def _last_sign(run_dir: Path) -> float:
    """Unix time of the newest write."""
    found = [0.0]
    for path in (path_of(run_dir), timing_path(run_dir), journal.journal_path(run_dir)):
        with contextlib.suppress(OSError):
            found.append(path.stat().st_mtime)
    return max(found)


def _patience(run_dir: Path) -> float:
    """Seconds without a write after which a run on another machine is taken for dead."""
    rows = journal.read(timing_path(run_dir))[-2:]
    if len(rows) < 2:
        return SILENT_SECONDS
    steps = max(1, int(rows[-1]["step"]) - int(rows[-2]["step"]))
    return max(SILENT_SECONDS, _SLOW_STEPS * steps * float(rows[-1]["step_seconds"] or 0))


def _is_alive(pid: int, process: int | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process is None or _started(pid) in (None, process)


def _started(pid: int) -> int | None:
    """Clock ticks since boot; None where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def clock_of(folder: Path) -> float:
    """Unix time of the file server of a folder; of this machine where it cannot be written to."""
    probe = folder / f".clock-{files.new_attempt()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
