"""`ingest watch`: a landing folder that a PACS writes to; what has settled becomes new units.

Each pass is an `ingest run` of the files that have not changed for settle_seconds: exactly-once, resumable,
and nothing else. A pass starts only when a settled file is new or another; the watch itself keeps no state on
disk, so it may be killed and started again at any time.
"""

import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from orchestration.cluster import StopFlag
from shards.errors import UserError
from shards.objects import is_url

if TYPE_CHECKING:
    from ingest.config import IngestConfig

POLL_SECONDS = 0.2  # how soon a signal is noticed


def watch(
    config: "IngestConfig",
    every_seconds: float,
    *,
    once: bool = False,
    stream: TextIO | None = None,
    **run: Any,
) -> int:
    """Look at the sources every `every_seconds`; convert what is new; the exit code.

    once: one pass, with the exit code of `ingest run` (0 where nothing has settled). Else it ends by SIGTERM
    or SIGINT: 0 while it waits, 130 in the middle of a conversion. run: arguments of run_ingest.
    Raises UserError, as run_ingest: a wrong setting, a full disk.
    """
    from ingest.discover import NothingToIngestError
    from orchestration.ingest_job import run_ingest

    if any(is_url(source) for source in config.sources):
        raise UserError("ingest watch looks at folders: for a bucket, let cron call `ingest run` again")
    out = stream or sys.stderr
    done: frozenset[tuple[str, int, int]] | None = None
    waiting_said = False
    with StopFlag() as stop:
        while not stop:
            here = settled(config)
            code = 0
            if here and here != done:
                try:
                    summary = run_ingest(config, stream=stream, **run)
                    if summary.interrupted:
                        return summary.exit_code
                    code = summary.exit_code
                    done = None if summary.failed else here  # failed units are tried again
                except NothingToIngestError:
                    done = here
            if once:
                return code
            if not waiting_said:
                print("ingest: watching; Ctrl-C or SIGTERM ends it, nothing is lost", file=out, flush=True)
                waiting_said = True
            _wait(every_seconds, stop)
    return 0


def settled(config: "IngestConfig") -> frozenset[tuple[str, int, int]]:
    """(path, bytes, ctime in ns) of every file that has settled."""
    from ingest.walk import settled_files

    found = set()
    for path, _, _ in settled_files(config):
        try:
            status = os.stat(path)  # noqa: PTH116 - one call a file
        except OSError:  # gone again
            continue
        found.add((path, status.st_size, status.st_ctime_ns))
    return frozenset(found)


def _wait(seconds: float, stop: StopFlag) -> None:
    until = time.monotonic() + seconds
    while not stop and time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
