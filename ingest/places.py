"""Where a run may write: never into or above what it reads, never among files of somebody else."""

import os
from pathlib import Path

from ingest.config import IngestConfig
from shards.dataset import NAME
from shards.errors import UserError
from shards.objects import ObjectStore, is_url
from shards.store import TEMPORARY_PREFIX

_HARMLESS = frozenset({"lost+found"})  # of a file system of its own


def check_output(config: IngestConfig) -> None:
    """Raises UserError where the output is, or holds, a source, has other files or cannot be written."""
    for source in config.sources:
        if is_url(source) and f"{source.rstrip('/')}/".startswith(config.output.rstrip("/") + "/"):
            raise UserError("the output is a source or holds one: choose another, empty or new prefix")
    if is_url(config.output):
        store = ObjectStore(config.output)
        if not store.exists(NAME) and not store.is_empty():
            raise UserError(f"{config.output} is not empty and no dataset: choose an empty or new prefix")
        return
    output = Path(os.path.realpath(config.output))
    for source in config.sources:
        if not is_url(source) and Path(os.path.realpath(source)).is_relative_to(output):
            raise UserError("the output folder is a source or holds one: choose another, empty or new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {config.output} is a file: choose an empty or new folder")
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):  # now, not behind a scan of hours
        raise UserError(
            f"the output {config.output} cannot be written: change the permissions of {place} or mount it "
            "writable, or choose another folder"
        )
    if (output / NAME).exists() or not output.exists():
        return
    try:
        names = os.listdir(output)  # noqa: PTH208 - names only
    except OSError as error:
        raise UserError(f"cannot look into the output folder {config.output}: {error.strerror}") from None
    # Temporary files: a first run that was killed before it had made its dataset.json.
    if any(not name.startswith(TEMPORARY_PREFIX) and name not in _HARMLESS for name in names):
        raise UserError(
            f"the output folder {config.output} is not empty and no dataset: choose an empty or new folder"
        )


def not_inputs(config: IngestConfig) -> frozenset[str]:
    """Real paths of the key, wherever it lies: a secret is never an input."""
    paths = [config.key_file] if config.key_file else []
    if config.output and not is_url(config.output):
        paths.append(os.path.abspath(config.output) + ".key")  # noqa: PTH100 - what orchestration.keys makes
    return frozenset(os.path.realpath(path) for path in paths)
