"""Which files and objects lie under the sources, each once, in a fixed order. Nothing is opened."""

import hashlib
import os
import struct
import tempfile
import time
from array import array
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np

from ingest.config import IngestConfig
from ingest.pairs import image_of
from ingest.places import not_inputs
from ingest.sources import objects
from shards.errors import UserError
from shards.objects import is_url
from shards.store import clear_errors

_RECORD = struct.Struct("<IHH?")  # number of the source, bytes of path and relative path, shared


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


class Files:
    """(path, path relative to its source, source) of every file under the sources, on disk.

    Sources may hold 100 million files: their names lie in an unlinked temporary file, private to the
    process and gone with it. Memory: the folders, the links to files and, of several sources, 8 bytes a file.
    """

    def __init__(self, config: IngestConfig, names: Container[str] = ()) -> None:
        """Walks at once. `named`: the paths whose last part is one of `names`. Raises UserError."""
        self.named: list[str] = []
        self._sources: list[str] = []
        self._count = 0
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        hashes = array("q")
        with clear_errors(tempfile.gettempdir()):
            for path, relative, source in settled_files(config):
                if not self._sources or self._sources[-1] != source:
                    self._sources.append(source)
                if path.rpartition("/")[2] in names:
                    self.named.append(path)
                if len(config.sources) > 1:
                    hashes.append(_hash(relative))
                self._add(len(self._sources) - 1, os.fsencode(path), os.fsencode(relative))
            self._spool.flush()
        values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
        self._shared = frozenset(values[counts > 1].tolist())

    def _add(self, source: int, path: bytes, relative: bytes) -> None:
        # Most paths end as their relative part does: only what stands before is written once more.
        kept = path[: -len(relative)] if path.endswith(relative) else path
        self._spool.write(_RECORD.pack(source, len(kept), len(relative), kept is not path) + kept + relative)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """In the order of the walk; one loop at a time."""
        self._spool.seek(0)
        while head := self._spool.read(_RECORD.size):
            source, before, after, shared = _RECORD.unpack(head)
            data = self._spool.read(before + after)
            path, relative = data[:before] + (data[before:] if shared else b""), data[before:]
            yield os.fsdecode(path), os.fsdecode(relative), self._sources[source]

    def several(self, relative: str) -> bool:
        """Whether files of several sources have this relative path.

        By 64 bits of a digest: of 105 million files one too many is named so in one of 3,000 datasets, which
        puts its source before its path and no more.
        """
        return bool(self._shared) and _hash(relative) in self._shared


def _hash(relative: str) -> int:
    data = hashlib.blake2b(os.fsencode(relative), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def settled_files(config: IngestConfig) -> Iterator[tuple[str, str, str]]:
    """(path, path relative to its source, source) of the files that settle_seconds lets through.

    By ctime, which no copy can set back: `cp -p` and rsync give a file its old mtime. Raises UserError.
    """
    latest = time.time() - config.settle_seconds
    for item in _walk(config):
        if not config.settle_seconds or _changed(item[0]) <= latest:
            yield item


def _changed(path: str) -> float:
    if is_url(path):
        return 0.0  # an object appears whole
    try:
        return max(os.stat(path).st_ctime, _image_changed(path))  # noqa: PTH116 - one call a file of millions
    except OSError:
        return float("inf")  # gone again


def _image_changed(path: str) -> float:
    """Of the image file that the header of a NIfTI pair would have: the two are one input."""
    image = image_of(path)
    return os.stat(image).st_ctime if image else 0.0  # noqa: PTH116


def _walk(config: IngestConfig) -> Iterator[tuple[str, str, str]]:
    """(absolute path, path relative to its source, source) of every file, each once, in a fixed order."""
    walk = _Walk(os.path.realpath(config.output) if config.output else "", set(not_inputs(config)))
    for source in config.sources:
        if is_url(source):
            for url, key, _ in objects(source, config.output):
                if url not in walk.taken and not any(_holds(other, url) for other in walk.buckets):
                    yield url, key.encode("utf-8", "backslashreplace").decode(), source
            walk.buckets.append(source)
            continue
        root = os.path.abspath(source)  # noqa: PTH100 - Path.resolve would follow links
        if not Path(root).exists():
            raise UserError(f"the source {source} does not exist: correct the path")
        pairs = walk.one(root) if Path(root).is_file() else walk.below(root)
        for path, relative in pairs:
            # File names may hold bytes that are no UTF-8: kept apart, but representable.
            yield path, relative.encode("utf-8", "backslashreplace").decode(), root


def _holds(source: str, url: str) -> bool:
    """Whether an object is below a source that was listed before."""
    return url == source or url.startswith(source.rstrip("/") + "/")


class _Walk:
    """The folders and links that were met, so that every file comes once, under the path that comes first."""

    def __init__(self, output: str, taken: set[str]) -> None:
        self._output = output
        self.taken = taken  # real paths of files: no inputs, or met by a link or as a source
        self.buckets: list[str] = []  # sources that were listed
        self._visited: set[str] = set()  # real paths of folders
        self._finished: set[str] = set()  # those of which every file was met

    def one(self, path: str) -> Iterator[tuple[str, str]]:
        real = os.path.realpath(path)
        if real not in self.taken and os.path.dirname(real) not in self._finished:  # noqa: PTH120
            self.taken.add(real)
            yield path, Path(path).name

    def below(self, root: str) -> Iterator[tuple[str, str]]:
        if not os.access(root, os.R_OK | os.X_OK):
            raise UserError("a source folder cannot be read: give read permission")
        if not self._is_new(root):
            return
        unreadable: list[str] = []
        for folder, folders, names in os.walk(
            root, followlinks=True, onerror=lambda e: unreadable.append(e.filename)
        ):
            folders[:] = [f for f in sorted(folders) if self._is_new(f"{folder}/{f}")]
            real = os.path.realpath(folder)
            start = os.path.relpath(folder, root)
            start = "" if start == "." else start.replace(os.sep, "/") + "/"
            names.sort()
            known = set(names)
            for name in names:
                if self._is_first(folder, name, real, known):
                    yield os.path.join(folder, name), start + name  # noqa: PTH118 - faster
            self._finished.add(real)
            # A folder that cannot be read is an input that is refused, not one that is lost.
            yield from ((path, os.path.relpath(path, root).replace(os.sep, "/")) for path in unreadable)
            unreadable.clear()
        yield from ((path, os.path.relpath(path, root).replace(os.sep, "/")) for path in unreadable)

    def _is_first(self, folder: str, name: str, real_folder: str, names: set[str]) -> bool:
        """Whether a file was not met under another name; only links have one."""
        path = f"{folder}/{name}"
        if not os.path.islink(path):  # noqa: PTH114 - one call a file of millions
            return not self.taken or f"{real_folder}/{name}" not in self.taken
        real = os.path.realpath(path)
        if real in self.taken:
            return False
        parent, _, base = real.rpartition("/")
        passed = parent in self._finished or (parent == real_folder and base in names and base < name)
        if passed and os.path.lexists(real):
            return False
        self.taken.add(real)
        return True

    def _is_new(self, folder: str) -> bool:
        """Links to folders are followed once: no loops, and never into the output."""
        real = os.path.realpath(folder)
        if real == self._output or real in self._visited:
            return False
        self._visited.add(real)
        return True
