"""Exactly-once commits: what a finished unit of work wrote becomes visible in one step.

1. Write a tar and a Parquet file a modality to local scratch, close, reopen, count, hash.
2. Put them under final names that are digests of their content: a retry rewrites the same bytes.
3. Create commits/<unit>.json if absent: the only truth. Readers list it, and read it or its copy in a
   snapshot (shards.records).

So a kill at any point leaves either no commit (and orphans, which the sweep removes) or all of it, and of two
writers of a unit one commits and both return that commit. The sync order makes this hold over a power cut
too: files and folders are durable before the commit that names them.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from shards import parquet
from shards.dataset import to_json
from shards.errors import UserError
from shards.records import all_records, record_name, unit_ids
from shards.schema import FORMAT_VERSION, is_volumes
from shards.store import TEMPORARY_PREFIX, Store, clear_errors
from shards.unit_files import (
    CommittedFile as CommittedFile,
)
from shards.unit_files import (
    EncodedSample as EncodedSample,
)
from shards.unit_files import (
    QuarantineRow as QuarantineRow,
)
from shards.unit_files import (
    Spooled,
    scratch_folder,
    spool,
    statistics_of,
    write_catalog,
    write_quarantine,
    write_shard,
    write_volumes,
)
from shards.unit_files import (
    VolumeSample as VolumeSample,
)

_UNIT_NAME = re.compile(r"[A-Za-z0-9-]{1,100}")
# What the sweep may remove: our own names in our own folders, nothing else that lies in the root.
_OURS = re.compile(
    r"shards/([a-z0-9_]{1,32})/\1-[a-z2-7]{26}\.tar"
    r"|catalog/([a-z0-9_]{1,32})/\2-[a-z2-7]{26}\.parquet"
    r"|quarantine/[A-Za-z0-9-]{1,100}-[a-z2-7]{26}\.parquet"
)
_OUR_TEMPORARY = re.compile(
    r"((shards|catalog)/[a-z0-9_]{1,32}/|(quarantine|commits|plans|labels|snapshots|exclusions)/)?"
    + re.escape(TEMPORARY_PREFIX)
    + r"[0-9a-f]{16}-[^/]+"
)
_MANAGED_FOLDERS = ("shards", "catalog", "quarantine")


@dataclass(frozen=True)
class Retry:
    """An attempt (1, 2, ...) at refused inputs of the planned unit `unit` (shards.retries).

    sources: theirs. rows: refusals of theirs in earlier commits, which count no more.
    """

    unit: str
    attempt: int
    sources: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Commit:
    """What a finished unit wrote.

    counts: samples, quarantined, inputs. statistics: {modality: {samples, pixels, raw_bytes, encoded_bytes,
    train, val, test}}, all integers.
    """

    unit: str
    shards: tuple[CommittedFile, ...]
    catalogs: tuple[CommittedFile, ...]
    quarantine: CommittedFile | None
    counts: dict[str, int]
    statistics: dict[str, dict[str, int]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    retry: Retry | None = None  # left out of the record where there is none

    @property
    def images(self) -> tuple[CommittedFile, ...]:
        """The catalogue parts of 2D samples."""
        return tuple(file for file in self.catalogs if not is_volumes(file.modality))

    def files(self) -> tuple[CommittedFile, ...]:
        """Every file the commit names."""
        return self.shards + self.catalogs + ((self.quarantine,) if self.quarantine else ())


def commit_unit(
    store: Store,
    unit: str,
    samples: Iterable[EncodedSample],
    quarantine: Sequence[QuarantineRow],
    scratch: str | Path,
    inputs: int,
    retry: Retry | None = None,
    volumes: Sequence[VolumeSample] = (),
) -> Commit:
    """Write what a unit of work made and commit it; the commit that stands where there was one before.

    samples: in any order, each key once; they are spooled to scratch, so an iterator needs little memory.
    quarantine, volumes: may be lists that grow while `samples` is consumed, and rows may be
    completed until it ends. inputs: number of input files.
    Raises UserError for a full, read-only or forbidden disk (nothing is committed; run again), ValueError
    for rows that break the schema.
    """
    if not _UNIT_NAME.fullmatch(unit):
        raise ValueError("a unit id has only letters, digits and -")
    standing = find_commit(store, unit)
    if standing is not None:
        return standing
    with scratch_folder(Path(scratch)) as folder:
        spooled = spool(samples, unit, folder)
        with clear_errors(scratch):
            commit, local_files = _write_local(folder, unit, spooled, quarantine, inputs, volumes)
        commit = dataclasses.replace(commit, retry=retry)
        for file, path in local_files:
            if store.put(file.path, path) != file.sha256:
                raise OSError(f"{path} changed while it was copied")
    # The loser of a race has put the same content-addressed files, or orphans: harmless either way.
    if store.create(record_name(unit), _record(commit)):
        return commit
    return _read_commit(store, unit)


def _write_local(
    folder: Path,
    unit: str,
    spooled: dict[str, list[Spooled]],
    quarantine: Sequence[QuarantineRow],
    inputs: int,
    volumes: Sequence[VolumeSample],
) -> tuple[Commit, list[tuple[CommittedFile, Path]]]:
    """Step 1: the files of a unit in `folder`, checked, and the commit that names them."""
    shards: list[CommittedFile] = []
    catalogs: list[CommittedFile] = []
    statistics: dict[str, dict[str, int]] = {}
    local: list[tuple[CommittedFile, Path]] = []
    stacks: dict[str, list[VolumeSample]] = {}
    for volume in volumes:
        stacks.setdefault(volume.row["modality"], []).append(volume)
    for modality in sorted(spooled.keys() | stacks.keys()):
        if modality in stacks:
            spans = chain.from_iterable(spooled.values())
            shard, table = write_volumes(folder, modality, stacks[modality], spans)
        else:
            shard, table = write_shard(folder, modality, spooled[modality])
        catalog = write_catalog(folder, modality, table)
        shards.append(shard)
        catalogs.append(catalog)
        statistics[modality] = statistics_of(table)
        local += [(shard, folder / f"{modality}.tar"), (catalog, folder / f"{modality}.parquet")]
    refused = write_quarantine(folder, unit, quarantine)
    if refused is not None:
        local.append((refused, folder / "quarantine.parquet"))
    counts = {
        "samples": sum(s.samples for s in shards),
        "quarantined": refused.samples if refused else 0,
        "inputs": inputs,
    }
    return Commit(unit, tuple(shards), tuple(catalogs), refused, counts, statistics), local


def _record(commit: Commit) -> bytes:
    values = dataclasses.asdict(commit)
    if commit.retry is None:
        del values["retry"]
    return to_json(values)


def _read_commit(store: Store, unit: str) -> Commit:
    """Raises FileNotFoundError where there is none, DamagedRecordError."""
    return parse_record(unit, store.read(record_name(unit)))


class DamagedRecordError(UserError, ValueError):
    """A commit record that cannot be read."""

    def __init__(self, unit: str) -> None:
        super().__init__(f"{record_name(unit)} is damaged: run ingest verify, then ingest repair")


def parse_record(unit: str, data: bytes) -> Commit:
    """The commit of a unit from the bytes of its record. Raises DamagedRecordError."""
    try:
        values = json.loads(data)
        values["shards"] = tuple(CommittedFile(**v) for v in values["shards"])
        values["catalogs"] = tuple(CommittedFile(**v) for v in values["catalogs"])
        if values["quarantine"] is not None:
            values["quarantine"] = CommittedFile(**values["quarantine"])
        if (retry := values.get("retry")) is not None:
            values["retry"] = Retry(**retry | {"sources": tuple(retry["sources"])})
        commit = Commit(**values)
        whole = commit.unit == unit and {"samples", "quarantined", "inputs"} <= commit.counts.keys()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedRecordError(unit) from error
    if not whole:
        raise DamagedRecordError(unit)
    return commit


def find_commit(store: Store, unit: str) -> Commit | None:
    """The commit of a unit, or None."""
    return _read_commit(store, unit) if store.exists(record_name(unit)) else None


def release_unit(store: Store, unit: str) -> bool:
    """Give a planned unit up by an empty commit: its inputs belong to no unit again. False: it is committed.

    The same create-if-absent as a commit: of a writer of the unit and its release exactly one wins.
    """
    counts = {"samples": 0, "quarantined": 0, "inputs": 0}
    empty = Commit(unit, (), (), None, counts)
    return store.create(record_name(unit), _record(empty)) or is_release(_read_commit(store, unit))


def is_release(commit: Commit) -> bool:
    """Whether the unit was given up: every commit of work has at least one input."""
    return commit.counts["inputs"] == 0


def list_commits(store: Store) -> list[Commit]:
    """All commits, sorted by unit id. Raises DamagedRecordError, a UserError (see verify)."""
    return [parse_record(unit, data) for unit, data in all_records(store)]


def committed_units(store: Store) -> set[str]:
    """Ids of all committed units."""
    return unit_ids(store)


def committed_sources(store: Store) -> set[str]:
    """Pseudonyms of all inputs that gave a committed sample or a quarantine row."""
    sources: set[str] = set()
    for commit in list_commits(store):
        files = commit.images + ((commit.quarantine,) if commit.quarantine else ())
        for file in files:
            with clear_errors(store.root):
                column = parquet.read(store, file.path, ["source"])
            sources.update(column["source"].to_pylist())
    return sources


def orphans(store: Store) -> list[str]:
    """Sorted names of ours that no commit accounts for: uncommitted files and temporary files."""
    # Files first: what is committed while we look is then in the commits that we list afterwards.
    present = [n for folder in _MANAGED_FOLDERS for n in store.list(folder) if _OURS.fullmatch(n)]
    temporary = [n for n in store.temporaries() if _OUR_TEMPORARY.fullmatch(n)]
    named = {file.path for commit in list_commits(store) for file in commit.files()}
    return sorted(set(present) - named | set(temporary))


def sweep(store: Store, dry_run: bool = False, min_age_seconds: float = 0.0) -> list[str]:
    """Remove orphans; the names removed (dry_run: that would be).

    Only while nobody writes to the dataset, or with a min_age_seconds longer than any commit takes: the files
    of a commit under way are orphans until it is created.
    """
    removed = []
    for name in orphans(store):
        try:
            old_enough = min_age_seconds <= 0 or store.age_seconds(name) >= min_age_seconds
        except FileNotFoundError:  # its writer has just finished with it
            continue
        if old_enough:
            removed.append(name)
            if not dry_run:
                store.delete(name)
    return removed
