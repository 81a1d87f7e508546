"""What the steps of a demo say and how long they took: FOLDER/steps.json, for the report.

Times only: whether a step is done is asked of what it made, never of this file.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestration.report import duration
from trainer import files

STEPS = ("Generate patients", "Ingest", "Join labels", "Pretrain", "Probe", "Report")


class Detail:
    """What a step says at its end. already: there was nothing to do. stopped: by the user, unfinished."""

    text = ""
    already = False
    stopped = False


class StepLog:
    """Prints `[2/6] Ingest: ...` and keeps seconds and detail of every step that was done."""

    def __init__(self, folder: Path, say: Callable[[str], None], steps: Sequence[str] = STEPS) -> None:
        self._path, self.say, self._steps = folder / "steps.json", say, tuple(steps)
        self._records: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError, ValueError):  # a damaged file costs the times and nothing else
            self._records = json.loads(self._path.read_text())

    @contextmanager
    def step(self, name: str) -> Iterator[Detail]:
        """Time the body and record it. A step that was cut off before says that it went on."""
        before = self._records.get(name)
        interrupted = before is not None and "seconds" not in before
        if before is None:
            self._record(name, {"begun": True})
        self.say(
            f"{self._number(name)} {name}" + (": goes on where it was interrupted" if interrupted else "")
        )
        began, detail = time.monotonic(), Detail()
        yield detail
        if detail.stopped:
            self.say(
                f"{self._number(name)} {name}: stopped; nothing is lost, the same command goes on from here"
            )
            return
        if detail.already:
            self.already(name, detail.text)
            return
        seconds = time.monotonic() - began
        text = detail.text + (" (the last part, after an interruption)" if interrupted else "")
        self._record(name, {"seconds": seconds, "detail": text})
        self.say(f"{self._number(name)} {name}: done in {duration(seconds)}; {detail.text}")

    def already(self, name: str, text: str) -> None:
        """The step's own state says that it is done."""
        self.say(f"{self._number(name)} {name}: already done ({text})")
        if "seconds" not in self._records.get(name, {}):
            self._record(name, {"seconds": 0.0, "detail": text + " (done before, time not known)"})

    def skipped(self, name: str, why: str) -> None:
        self.say(f"{self._number(name)} {name}: skipped; {why}")

    def rows(self) -> list[dict[str, Any]]:
        """name, seconds and detail of the finished steps, in their order."""
        return [
            {"name": name, **self._records[name]}
            for name in self._steps
            if "seconds" in self._records.get(name, {})
        ]

    def _record(self, name: str, values: dict[str, Any]) -> None:
        self._records[name] = values
        files.replace_file(self._path, (json.dumps(self._records, indent=1) + "\n").encode())

    def _number(self, name: str) -> str:
        return f"[{self._steps.index(name) + 1}/{len(self._steps)}]"
