"""`ingest dedupe`, and the end of `ingest run`: what readers leave out as equal over units and runs."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from orchestration.cluster import process_folder
from orchestration.progress import Progress

if TYPE_CHECKING:
    from shards.exclusions import Exclusions
    from shards.store import Store


def leave_out(store: "Store", stream: TextIO | None = None) -> "Exclusions":
    """Compare the samples of all units and record what is left out. Raises UserError."""
    from shards import exclusions

    with (
        Progress("dedupe: comparing images", 0, "catalogues", stream=stream) as progress,
        tempfile.TemporaryDirectory(prefix="dedupe-", dir=process_folder()) as folder,
    ):

        def told(done: int, total: int) -> None:
            progress.expect(total)
            progress.update(done)

        return exclusions.update(store, Path(folder), told)


def dedupe_report(dataset: Path, as_json: bool) -> str:
    """What is left out now, for people or as JSON. Raises UserError."""
    from shards.dataset import read_info
    from shards.objects import open_store

    store = open_store(dataset)
    read_info(store)
    found = leave_out(store)
    reasons = found.reasons()
    if as_json:
        return json.dumps({"name": found.name, "units": len(found.units), "excluded": reasons}, indent=1)
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing"
    return f"compared {len(found.units)} units; left out: {said}"
