"""Which files and objects lie under the sources, each once, in a fixed order. Nothing is opened."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ingest.config import IngestConfig
from ingest.places import not_inputs
from ingest.sources import objects
from shards.errors import UserError
from shards.objects import is_url


def _root(source: str) -> str:
    return source if is_url(source) else os.path.abspath(source)  # noqa: PTH100 - Path.resolve would follow links


def source_names(sources: Sequence[str]) -> dict[str, str]:
    """A name of each absolute source path: its last part, or as many as tell it from the other sources."""
    roots = [_root(source) for source in sources]
    names = {}
    for root in roots:
        parts = Path(root).parts[1:]
        others = [Path(other).parts[1:] for other in roots if other != root]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names[root] = "/".join(parts[-length:])
    return names


def settled_files(config: IngestConfig) -> list[tuple[str, str, str]]:
    """(path, path relative to its source, source) of the files that settle_seconds lets through.

    By ctime, which no copy can set back: `cp -p` and rsync give a file its old mtime. Raises UserError.
    """
    found = list(_walk(config))
    if not config.settle_seconds:
        return found
    latest = time.time() - config.settle_seconds
    return [item for item in found if _changed(item[0]) <= latest]


def _changed(path: str) -> float:
    if is_url(path):
        return 0.0  # an object appears whole
    try:
        return os.stat(path).st_ctime  # noqa: PTH116 - one call a file of millions
    except OSError:
        return float("inf")  # gone again


def _walk(config: IngestConfig) -> Iterator[tuple[str, str, str]]:
    """(absolute path, path relative to its source, source) of every file, each once, in a fixed order."""
    output = os.path.realpath(config.output) if config.output else ""  # `ingest plan` has none
    seen = set(not_inputs(config))
    for source in config.sources:
        if is_url(source):
            for url, key, _ in objects(source, config.output):
                if url not in seen:
                    seen.add(url)
                    yield url, key.encode("utf-8", "backslashreplace").decode(), source
            continue
        root = os.path.abspath(source)  # noqa: PTH100 - Path.resolve would follow links
        if not Path(root).exists():
            raise UserError(f"the source {source} does not exist: correct the path")
        pairs = [(root, Path(root).name)] if Path(root).is_file() else _files(root, output)
        for path, relative in pairs:
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                # File names may hold bytes that are no UTF-8: kept apart, but representable.
                yield path, relative.encode("utf-8", "backslashreplace").decode(), root


def _files(root: str, output: str) -> Iterator[tuple[str, str]]:
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError("a source folder cannot be read: give read permission")
    unreadable: list[str] = []
    visited = {os.path.realpath(root)}
    for folder, folders, names in os.walk(
        root, followlinks=True, onerror=lambda e: unreadable.append(e.filename)
    ):
        folders[:] = sorted(f for f in folders if _is_new(os.path.join(folder, f), output, visited))  # noqa: PTH118
        # A folder that cannot be read is an input that is refused, not one that is lost.
        paths = [os.path.join(folder, name) for name in sorted(names)] + unreadable  # noqa: PTH118 - faster
        unreadable.clear()
        for path in paths:
            yield path, os.path.relpath(path, root).replace(os.sep, "/")
    for path in unreadable:
        yield path, os.path.relpath(path, root).replace(os.sep, "/")


def _is_new(folder: str, output: str, visited: set[str]) -> bool:
    """Links to folders are followed once: no loops, and never into the output."""
    real = os.path.realpath(folder)
    if real == output or real in visited:
        return False
    visited.add(real)
    return True
