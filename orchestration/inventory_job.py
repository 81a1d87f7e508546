"""The inventory of the sources of a job, with progress and within its limits of reading."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from orchestration.progress import Progress

if TYPE_CHECKING:
    from ingest.config import IngestConfig
    from ingest.inventory import Inventory
    from shards.ids import Pseudonymizer


def take_inventory(
    config: "IngestConfig", names: "Pseudonymizer", folder: Path, stream: TextIO | None, workers: int | None
) -> "Inventory":
    """Every input below the sources, kept in `folder`; workers: of the header scan. Raises UserError."""
    from ingest.discover import scan, told_apart
    from ingest.inventory import Inventory, tell_apart
    from ingest.limits import own_meter
    from ingest.scan import scanner
    from ingest.sources import limited

    stored = Inventory(folder / "inventory", names)
    notes = list[str]()
    with (
        Progress("ingest: looking at the sources", 0, "files", stream=stream) as progress,
        limited(own_meter(config.bytes_per_second, config.open_files)),
    ):
        parallel = None  # a limit on reading counts in one process; inline: no process of another kind
        if config.sandbox == "process" and config.bytes_per_second is None and config.open_files is None:
            parallel = scanner(config, workers or os.cpu_count() or 1)
        stored.append(scan(config, progress.update, progress.expect, parallel, notes.append))
        stored.close()
        tell_apart(stored, lambda entries: told_apart(entries, config))
    for note in notes:  # behind the bar
        print(f"ingest: {note}", file=stream or sys.stderr, flush=True)
    return stored
