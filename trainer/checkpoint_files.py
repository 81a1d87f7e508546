"""The files of a run's checkpoints: names, manifests, which ones count and which are kept. No torch."""

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer import attempts, files

TENSORS, STATE, MANIFEST, LATEST = "state.safetensors", "state.json", "manifest.json", "LATEST"
_NAME = re.compile(r"step-(\d{8,})$")


class BrokenCheckpointError(Exception):
    """The files of a checkpoint are not those that were written."""


@dataclass(frozen=True)
class Manifest:
    """`files`: {name: (bytes, sha256)}. attempt: that wrote it; None in checkpoints of before."""

    attempt: int | None
    files: dict[str, tuple[int, str]]
    saved_at: float  # Unix time, of the file

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def path_of(run_dir: Path, step: int) -> Path:
    return folder(run_dir) / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps of all complete-looking checkpoints, ascending; nothing is verified."""
    if not folder(run_dir).is_dir():
        return []
    matches = (_NAME.match(path.name) for path in folder(run_dir).iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def read_manifest(path: Path) -> Manifest:
    """Raises BrokenCheckpointError."""
    try:
        tree = json.loads((path / MANIFEST).read_bytes())
        listed = {
            n: (int(tree["files"][n]["size"]), str(tree["files"][n]["sha256"])) for n in (TENSORS, STATE)
        }
        attempt = tree.get("attempt")
        return Manifest(None if attempt is None else int(attempt), listed, (path / MANIFEST).stat().st_mtime)
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenCheckpointError("a file is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenCheckpointError("the manifest is damaged") from None


def problem(path: Path, *, deep: bool = True) -> str | None:
    """Why a checkpoint must not be loaded, or None: manifest, sizes and, if `deep`, sha256 of every file."""
    try:
        for name, (size, digest) in read_manifest(path).files.items():
            same = (path / name).stat().st_size == size
            if not same or (deep and files.sha256_of_file(path / name) != digest):
                raise BrokenCheckpointError(f"{name} is not what the manifest says")
    except (FileNotFoundError, NotADirectoryError):
        return "a file is missing"
    except BrokenCheckpointError as error:
        return str(error)
    return None


def replaced_by(path: Path, step: int, starts: dict[int, int]) -> int | None:
    """The attempt that makes this checkpoint void, if any: it began later, from an earlier step.

    Such a checkpoint was committed by an attempt that did not yet know of the other (its check and its rename
    are two operations). It is as good as any, but metrics.jsonl of the newer attempt does not lead up to it.
    starts: of attempts.starts.
    """
    try:
        attempt = read_manifest(path).attempt
    except BrokenCheckpointError:
        return None
    later = [n for n, start in starts.items() if attempt is not None and n > attempt and start < step]
    return min(later, default=None)


def kept(steps: Iterable[int], keep: int, keep_every: int | None) -> dict[int, str]:
    """{step: why it is kept}: the newest `keep`, and those that keep_every divides."""
    steps = sorted(steps)
    why = {step: f"every {keep_every} steps" for step in steps if keep_every and step % keep_every == 0}
    why |= dict.fromkeys(steps[-keep:], f"one of the newest {keep}")
    return why | dict.fromkeys(steps[-1:], "the newest")


def prune(run_dir: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Once `step` is verified: remove what is not kept up to it, and what a replaced attempt left there."""
    starts = attempts.starts(run_dir)
    steps = [s for s in list_steps(run_dir) if s <= step]
    good = [s for s in steps if s == step or replaced_by(path_of(run_dir, s), s, starts) is None]
    keeping = kept(good, keep, keep_every)
    for old in steps:
        if old not in keeping:
            remove(path_of(run_dir, old))


def publish(temporary: Path, final: Path, bad: Callable[[], bool]) -> None:
    """Give a finished folder its final name. What has it goes out of the way where it is `bad`, under a name
    that `sweep` removes; a good one of another attempt stays where it is."""
    if final.exists() and bad():
        files.rename(final, final.with_name(f"{final.name}.tmp-broken-{files.new_attempt()}"))
    try:
        files.rename(temporary, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        remove(temporary)  # another live attempt was faster; `save` verifies what it wrote
    files.sync_folder(final.parent)


def sweep(run_dir: Path) -> None:
    """Remove what interrupted attempts left: they never had a final name."""
    for place in (run_dir, folder(run_dir)):
        if place.is_dir():
            for path in place.glob("*.tmp-*"):
                remove(path)


def remove(path: Path) -> None:
    """Delete under a temporary name, so that no half-deleted folder bears a checkpoint's name."""
    if ".tmp-" not in path.name:
        aside = path.with_name(f"{path.name}.tmp-old-{files.new_attempt()}")
        files.rename(path, aside)
        path = aside
    files.before("remove", path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another attempt may be sweeping the same names
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Listed:
    """A checkpoint as `medswav checkpoints` shows it. trouble: None where it may be loaded; why: it is kept,
    or what becomes of it. age_seconds, bytes and attempt are None where the manifest does not say."""

    step: int
    bytes: int | None
    age_seconds: float | None
    attempt: int | None
    trouble: str | None
    why: str


def listing(run_dir: Path, keep: int, keep_every: int | None, now: float, *, deep: bool) -> list[Listed]:
    """All checkpoints by name, ascending. deep: every file is hashed."""
    starts, steps = attempts.starts(run_dir), list_steps(run_dir)
    troubles = {step: _trouble(path_of(run_dir, step), step, starts, deep) for step in steps}
    keeping = kept([s for s in steps if troubles[s] is None], keep, keep_every)
    rows = []
    for step in steps:
        known: tuple[int | None, float | None, int | None] = (None, None, None)
        with contextlib.suppress(BrokenCheckpointError):
            manifest = read_manifest(path_of(run_dir, step))
            known = (manifest.size, max(0.0, now - manifest.saved_at), manifest.attempt)
        lost = "is not loaded; made again, or removed, by the run that goes on"
        otherwise = "not kept: goes with the next save" if troubles[step] is None else lost
        rows.append(Listed(step, *known, troubles[step], keeping.get(step, otherwise)))
    return rows


def _trouble(path: Path, step: int, starts: dict[int, int], deep: bool) -> str | None:
    trouble = problem(path, deep=deep)
    by = replaced_by(path, step, starts) if trouble is None else None
    return trouble if by is None else f"of an attempt that attempt {by} had replaced"


def steps_that_count(run_dir: Path) -> Sequence[int]:
    """Ascending, without those of replaced attempts; nothing is verified."""
    starts = attempts.starts(run_dir)
    return [s for s in list_steps(run_dir) if replaced_by(path_of(run_dir, s), s, starts) is None]
