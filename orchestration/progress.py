"""Progress of a long step with an ETA: a live bar on a terminal, a plain line now and then elsewhere.

The bar has no colours where NO_COLOR is set (rich looks at it), and a terminal that is dumb gets the lines.
"""

import os
import sys
import time
from types import TracebackType
from typing import Any, TextIO

PLAIN_INTERVAL_SECONDS = 5.0


def format_seconds(seconds: float) -> str:
    """75.2 -> `1:15`, 3675 -> `1:01:15`; `?` where it is not known."""
    if not 0 <= seconds < 1e9:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def estimate_seconds(done: float, total: float, elapsed: float) -> float:
    """Remaining seconds at the mean rate so far; inf before anything is done."""
    return elapsed * (total - done) / done if done > 0 else float("inf")


class Progress:
    """`with Progress("ingest", total, "units") as p: p.update(done, "note")`. Writes to stderr.

    `start` is what was done before (a resume): it counts in the share, not in the rate. total 0: not known,
    no ETA.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        start: int = 0,
        stream: TextIO | None = None,
        interval: float = PLAIN_INTERVAL_SECONDS,
    ) -> None:
        self.what, self.total, self.unit, self.start, self.done = what, total, unit, start, start
        self._stream = stream or sys.stderr
        self._interval = interval
        self._began = self._printed = time.monotonic()
        self._live: Any = None
        if self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
            self._open_live()

    def _open_live(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Live

        self._live = Live(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("ETA {task.fields[eta]}"),
            TextColumn("{task.fields[note]}"),
            console=Console(file=self._stream),
        )
        self._live.start()
        self._task = self._live.add_task(
            self.what, total=self.total or None, completed=self.start, unit=self.unit, eta="?", note=""
        )

    def restart(self, start: int) -> None:
        """The work begins now, at `start`: set-up and what was done before do not count in the rate."""
        self.start, self._began = start, time.monotonic()

    def expect(self, total: int) -> None:
        """The total is known now."""
        self.total = total
        if self._live is not None:
            self._live.update(self._task, total=total or None)

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total`, counted with `start`."""
        now, self.done = time.monotonic(), done
        elapsed = now - self._began
        left = estimate_seconds(done - self.start, self.total - self.start, elapsed)
        if self._live is not None:
            self._live.update(self._task, completed=done, eta=format_seconds(left), note=note)
            return
        if now - self._printed >= self._interval or done == self.total > 0:
            self._printed = now
            print(self._line(done, elapsed, left, note), file=self._stream, flush=True)

    def _line(self, done: int, elapsed: float, left: float, note: str) -> str:
        parts = [f"{self.what}: {done}/{self.total} {self.unit}", f"{format_seconds(elapsed)} passed"]
        if self.total:
            parts.append(f"ETA {format_seconds(left)}")
        else:
            parts[0] = f"{self.what}: {done} {self.unit}"
        return ", ".join([*parts, note] if note else parts)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
