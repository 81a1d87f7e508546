"""Which attempt at a run may write: `RUN/attempts/NNNNNN`, one file for each, numbered without a gap.

A driver that was killed may leave ranks that live on for seconds, or a node may be cut off and come back: two
attempts at one run. The newest one goes on, an older one refuses to write (ops.md, section 2). Looking and
writing are two operations, so an older attempt may look just before and write just after a newer one begins;
what it writes then is harmless:

* A checkpoint names its attempt, and each attempt's file the step that it went on from: a checkpoint of an
  older attempt that lies beyond that step does not count (trainer.checkpoint_files.replaced_by).
* metrics.jsonl is replaced when an attempt begins, and an attempt keeps its file open: an older one appends
  to a file that has no name any more.
"""

import contextlib
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from trainer import files


class ReplacedError(UserError):
    """A newer attempt has begun: this one stops and writes nothing more."""


@dataclass(frozen=True)
class Attempt:
    run_dir: Path
    number: int

    def check(self) -> None:
        """Before anything is written. Raises ReplacedError when a newer attempt has begun.

        The folder is listed: NFS may remember for a while that a name was not there, but not after opening a
        folder that has changed.
        """
        newest = max(_numbers(self.run_dir), default=0)
        if newest > self.number:
            raise ReplacedError(
                f"another process has continued this run (attempt {newest}, this is attempt {self.number}): "
                "this one stops and writes nothing more; run one command at a time on a run folder"
            )

    def begin_from(self, step: int) -> None:
        """Record the step that this attempt goes on from, before it writes anything else."""
        files.replace_file(_path(self.run_dir, self.number), json.dumps({"from_step": step}).encode())


def begin(run_dir: Path) -> Attempt:
    """Claim the next number by creating its file exclusively: older attempts stop at their next write."""
    folder = run_dir / "attempts"
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(max(_numbers(run_dir), default=0) + 1):
        files.before("create", _path(run_dir, number))
        try:
            os.close(os.open(_path(run_dir, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            continue
        files.sync_folder(folder)
        return Attempt(run_dir, number)
    raise AssertionError("numbers do not end")


def starts(run_dir: Path) -> dict[int, int]:
    """{attempt: the step that it went on from}; without those that ended before they knew."""
    found = {}
    for number in _numbers(run_dir):
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            found[number] = int(json.loads(_path(run_dir, number).read_bytes())["from_step"])
    return found


def _numbers(run_dir: Path) -> list[int]:
    try:
        return [int(path.name) for path in (run_dir / "attempts").iterdir() if path.name.isdigit()]
    except FileNotFoundError:
        return []


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / "attempts" / f"{number:06d}"
