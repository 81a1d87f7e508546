"""Which committed files are broken, and putting right ones in their place: committed bytes or nothing."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from shards import parquet
from shards.commit import Commit, CommittedFile, committed_units, find_commit
from shards.retries import family
from shards.schema import ADDED_COLUMNS, schema_of
from shards.store import Store


@dataclass(frozen=True)
class Broken:
    """A unit with files that are missing or hold other bytes than were committed."""

    commit: Commit
    files: tuple[CommittedFile, ...]


def find_broken(
    store: Store, progress: Callable[[int], None] | None = None, workers: int = 2
) -> tuple[list[Broken], list[str]]:
    """(units with broken files, sorted by id; names of commit records that cannot be read).

    Every committed byte is read once. progress is called with the number of units so far.
    """
    found, damaged = [], []

    def look(unit: str) -> tuple[Broken | None, str]:
        try:
            commit = find_commit(store, unit)
        except ValueError:
            return None, f"commits/{unit}.json"
        files = tuple(file for file in (commit.files() if commit else ()) if not whole(store, file))
        return (Broken(commit, files) if commit and files else None), ""

    with ThreadPoolExecutor(workers) as pool:
        for number, (broken, name) in enumerate(pool.map(look, sorted(committed_units(store))), 1):
            if broken is not None:
                found.append(broken)
            if name:
                damaged.append(name)
            if progress is not None:
                progress(number)
    return found, damaged


def whole(store: Store, file: CommittedFile) -> bool:
    """Whether the file is there with the bytes that were committed."""
    return (
        store.exists(file.path)
        and store.size(file.path) == file.size
        and store.sha256(file.path) == file.sha256
    )


def with_history(store: Store, commit: Commit, folder: Path) -> Store:
    """A new store in `folder` with what the unit saw when it was made: of a retry, the attempts before.

    Raises FileNotFoundError where a catalogue of those is missing: then they are repaired first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    made = Store(folder)
    for unit in family(commit.retry.unit, commit.retry.attempt - 1) if commit.retry else ():
        earlier = find_commit(store, unit)
        for file in earlier.catalogs if earlier else ():
            made.put(file.path, store.read(file.path))
        if earlier is not None:
            made.create(f"commits/{unit}.json", store.read(f"commits/{unit}.json"))
    return made


def _as_before(made: Store, unit: str, file: CommittedFile) -> bool:
    """Leave ADDED_COLUMNS out of a catalogue part: is it then what an earlier version committed?"""
    commit = find_commit(made, unit)
    for part in commit.catalogs if commit else ():
        if file.path.startswith("catalog/") and part.modality == file.modality:
            kept = [f for f in schema_of(part.modality) if f.name not in ADDED_COLUMNS]
            table = parquet.read(made, part.path, [f.name for f in kept])
            made.put(file.path, parquet.to_bytes(table.cast(pa.schema(kept))))
            return whole(made, file)
    return False


def put_back(store: Store, made: Store, broken: Broken) -> list[str]:
    """Copy the broken files of a unit from where it was made anew: those that have the committed bytes there.
    Their names."""
    done = []
    for file in broken.files:
        if whole(made, file) or _as_before(made, broken.commit.unit, file):
            if store.put(file.path, made.local(file.path)) != file.sha256:
                raise OSError(f"{file.path} changed while it was copied")
            done.append(file.path)
    return done
