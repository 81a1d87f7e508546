"""Which attempt at a run may write: `RUN/attempts/NNNNNN`, one file for each, numbered without a gap.

A driver that was killed may leave ranks that live on for seconds, or a node may be cut off and come back: two
attempts at one run. The newest one goes on, an older one refuses to write (ops.md, section 2).
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from trainer import files


@dataclass(frozen=True)
class Attempt:
    run_dir: Path
    number: int

    def check(self) -> None:
        """One stat; before anything is written. Raises UserError when a newer attempt has begun."""
        if _path(self.run_dir / "attempts", self.number + 1).exists():
            raise UserError(
                f"another process has continued this run (this is attempt {self.number}): "
                "this one stops and writes nothing more; run one command at a time on a run folder"
            )


def begin(run_dir: Path) -> Attempt:
    """Claim the next number by creating its file exclusively: older attempts stop at their next write."""
    folder = run_dir / "attempts"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (int(path.name) for path in folder.iterdir() if path.name.isdigit())
    for number in itertools.count(max(numbers, default=0) + 1):
        files.before("create", _path(folder, number))
        try:
            os.close(os.open(_path(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            continue
        files.sync_folder(folder)
        return Attempt(run_dir, number)
    raise AssertionError("numbers do not end")


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"
