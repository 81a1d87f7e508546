"""One unit of work: read > de-identify > encode > commit. A pure function of its inputs, settings and key."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ingest.config import IngestConfig
from ingest.copies import copied, is_read, unread_reason
from ingest.dedupe import Keys, Seen, image_keys, named_by, seen_before
from ingest.deidentify import deidentification, make_row, sample_key, source_id
from ingest.discover import Entry, unchanged
from ingest.frames import Frame, Item, Refusal, Refused
from ingest.plan import Unit
from ingest.sandbox import Reader, shared_reader
from ingest.sources import is_copied, state_of
from ingest.stacks import Kept, stacked
from shards import parquet
from shards.codec import Codec, get_codec
from shards.commit import Commit, EncodedSample, QuarantineRow, Retry, VolumeSample, commit_unit, find_commit
from shards.dataset import DatasetInfo, to_json
from shards.duplicates import GEOMETRY
from shards.errors import UserError
from shards.ids import Pseudonymizer
from shards.objects import is_url, open_store
from shards.retries import family
from shards.schema import FORMAT_VERSION, Reason, Row, catalog_schema, check_row, plainly_storable
from shards.stats import pixel_digest, pixel_statistics
from shards.store import Store


@dataclass
class UnitResult:
    """What a unit gave, for progress and metrics. seconds: by stage (read, encode, commit)."""

    unit: str
    modality: str
    inputs: int = 0
    samples: dict[str, int] = field(default_factory=dict)  # by partition
    reasons: dict[str, int] = field(default_factory=dict)  # refusals by reason
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def dataset_info(config: IngestConfig, names: Pseudonymizer) -> DatasetInfo:
    """What dataset.json records and a resume is held to."""
    return DatasetInfo(
        codec=config.codec,
        fingerprint=config.fingerprint(names.site_id),
        key_id=names.key_id,
        config=config.shaping(names.site_id),
        deidentification=deidentification(config),
        modalities=tuple(sorted({*config.modalities.values(), config.nifti_modality})),
        format_version=FORMAT_VERSION,
    )


def run_unit(
    unit: Unit,
    config: IngestConfig,
    names: Pseudonymizer,
    root: str | Path,
    scratch: Path,
    reader: Reader | None = None,
) -> UnitResult:
    """Convert and commit a unit: equal inputs, settings and key, equal bytes. Does nothing when committed.

    reader: by default the one of this process. Raises UserError where the output or the scratch cannot be
    written, SourceChangedError where an input is not what was planned; no other input raises.
    """
    store = open_store(root)
    standing = find_commit(store, unit.unit)
    if standing is not None:
        return _result(unit, standing)
    work = _Work(unit, config, names, reader or shared_reader(config))
    if unit.retry is not None:
        rows = list(_rows_of(store, unit.retry))
        work.seen, work.standing = seen_before(rows), frozenset(row["key"] for row in rows)
    started = time.perf_counter()
    commit = commit_unit(
        store,
        unit.unit,
        work.samples(),
        work.quarantine,
        scratch,
        inputs=len(unit.entries),
        retry=unit.retry,
        volumes=work.volumes,
    )
    seconds = time.perf_counter() - started
    result = _result(unit, commit)
    result.reasons = dict(Counter(row.reason for row in work.quarantine))
    result.seconds = dict(work.seconds) | {"commit": max(0.0, seconds - sum(work.seconds.values()))}
    return result


def _rows_of(store: Store, retry: Retry) -> Iterator[Row]:
    """What the unit and the attempts before have kept, by the columns that duplicates are known by."""
    columns = ["key", "instance", "frame", "modality", "pixel_digest", *GEOMETRY]
    for name in family(retry.unit, retry.attempt - 1):
        commit = find_commit(store, name)
        for file in commit.images if commit else ():
            yield from parquet.read(store, file.path, columns).to_pylist()


def _result(unit: Unit, commit: Commit) -> UnitResult:
    return UnitResult(
        unit=unit.unit,
        modality=unit.modality,
        inputs=commit.counts["inputs"],
        samples={file.modality: file.samples for file in commit.shards},
        bytes_in=sum(entry.size for entry in unit.entries),
        bytes_out=sum(file.size for file in commit.files()),
    )


class SourceChangedError(Exception):
    """An input went or changed while its unit ran: the unit stays uncommitted (see ingest.plan)."""


class _Work:
    """The state of one unit while its samples are drawn: quarantine rows, seen images, clocks."""

    def __init__(self, unit: Unit, config: IngestConfig, names: Pseudonymizer, reader: Reader) -> None:
        self.unit = unit
        self.config = config
        self.names = names
        self.reader = reader
        self.codec: Codec = get_codec(config.codec)
        self.seen = Seen()
        self.standing: frozenset[str] = frozenset()  # keys of samples that a retry finds there
        self.seconds = {"read": 0.0, "encode": 0.0}
        self.quarantine: list[QuarantineRow] = []
        self.kept: list[Kept] = []
        self.volumes: list[VolumeSample] = []

    def samples(self) -> Iterator[EncodedSample]:
        for entry in self.unit.entries:
            yield from self._file(entry)
        # Not of a retry: the other slices of its series are in a commit that stands.
        if "volumes" in self.config.outputs and self.unit.retry is None:
            found = stacked(self.kept, self.unit.unit, self.names)
            self.volumes += found.volumes
            self.quarantine += found.refusals
            for kept in self.kept:
                kept.row.update(found.places.get(kept.row["key"], {}))

    def _file(self, entry: Entry) -> list[EncodedSample]:
        """Samples of one file; refusals go to the quarantine. A file refused as a whole gives no sample."""
        samples: list[EncodedSample] = []
        found: list[Keys] = []
        refusals: list[Refusal] = []
        kept: list[Kept] = []
        stand = False
        for item in self._timed(read_entry(entry, self.reader)):
            if isinstance(item, Frame) and self._stands(item, entry):
                stand = True
                continue
            made = item if isinstance(item, Refusal) else self._sample(item, entry)
            if isinstance(made, Refusal):
                _check_source(made, entry)
                refusals.append(made)
                if made.reason is Reason.CRASHED:
                    break
            else:
                samples.append(made[0])
                found.append(made[1])
                if isinstance(item, Frame) and item.stack is not None:
                    kept.append(Kept(made[0].row, item.stack))
        whole = [refusal for refusal in refusals if refusal.frame == -1]
        if not whole and not samples and not stand and len(refusals) == 1:
            whole = [replace(refusals[0], frame=-1)]  # its only image
        self._refuse(entry, whole or refusals)
        if whole:
            return []
        self.seen.add(found)
        self.kept += kept
        return samples

    def _stands(self, frame: Frame, entry: Entry) -> bool:
        return bool(self.standing) and sample_key(entry, frame.index, self.names) in self.standing

    def _sample(self, frame: Frame, entry: Entry) -> tuple[EncodedSample, Keys] | Refusal:
        """A frame encoded, or why it is not; CRASHED (the whole file) where our code fails on it."""
        started = time.perf_counter()
        try:
            keys = image_keys(frame, pixel_digest(frame.pixels))
            if self.unit.retry is not None:
                keys = named_by(keys, self.names)
            reason = self.seen.reason(keys)
            if reason is not None:
                return Refusal(reason, frame.index, frame.modality)
            return self._encode(frame, entry, keys.pixels), keys
        except (UserError, OSError):  # of this machine (a codec, a disk), not of the file: a run may mend it
            raise
        except Exception:  # noqa: BLE001 - the boundary: one odd file must not end its unit, nor its texts leave
            return Refusal(Reason.CRASHED, modality=frame.modality)
        finally:
            self.seconds["encode"] += time.perf_counter() - started

    def _encode(self, frame: Frame, entry: Entry, digest: str) -> EncodedSample:
        row = make_row(frame, entry, self.unit.unit, self.config, self.names)
        row |= {"pixel_digest": digest} | pixel_statistics(frame.pixels)
        _check_storable(row)
        return EncodedSample(row, self.codec.encode(frame.pixels))

    def _refuse(self, entry: Entry, refusals: list[Refusal]) -> None:
        if not refusals:
            return
        source = source_id(entry.source, self.names)
        self.quarantine += [
            QuarantineRow(source, refusal.frame, entry.kind, refusal.modality, refusal.reason.value)
            for refusal in refusals
        ]

    def _timed(self, items: Iterator[Item]) -> Iterator[Item]:
        while True:
            started = time.perf_counter()
            item = next(items, None)
            self.seconds["read"] += time.perf_counter() - started
            if item is None:
                return
            yield item


def _check_storable(row: Row) -> None:
    """Raise what the commit would raise: there it would end the whole unit."""
    placed = row | {"shard": "", "offset": 0, "size": 0}
    check_row(placed)
    if plainly_storable(placed):
        return
    to_json(pa.RecordBatch.from_pylist([placed], catalog_schema()).to_pylist()[0])


def _check_source(refusal: Refusal, entry: Entry) -> None:
    gone = refusal.reason is Reason.SOURCE_MISSING and not entry.absent
    # A mount that drops while a file is read makes it look damaged.
    if gone or (refusal.reason is Reason.UNREADABLE and not unchanged(entry)):
        raise SourceChangedError


def read_entry(entry: Entry, reader: Reader) -> Iterator[Item]:
    """Items of one input; SOURCE_MISSING where it is not what the inventory saw, or was not there then."""
    from_copy = is_copied(entry.path) and is_read(entry)
    if entry.absent or not (from_copy or unchanged(entry)):
        yield Refusal(Reason.SOURCE_MISSING, modality=entry.modality)
    elif entry.listed and entry.modality == "none":
        yield Refusal(Reason.MODALITY_OUT_OF_SCOPE)
    elif from_copy:
        yield from _read_copy(entry, reader)
    elif is_copied(entry.path) and (entry.member or is_url(entry.path)) and not entry.member.startswith("!"):
        yield Refusal(unread_reason(entry) or Reason.NOT_AN_IMAGE, modality=entry.modality)
    else:
        before = _state(entry)
        yield from reader.read(entry.path, entry.kind, entry.modality, entry.member, entry.partner)
        after = _state(entry)
        if after is not None and after != before:  # written to: what was read may be half of each
            yield Refusal(Reason.SOURCE_MISSING, modality=entry.modality)


def _state(entry: Entry) -> tuple[Any, ...] | None:
    """None where a file is gone: once open, it is read to its end all the same."""
    try:
        return state_of(entry.path) + (state_of(entry.partner) if entry.partner else ())
    except OSError:
        return None


def _read_copy(entry: Entry, reader: Reader) -> Iterator[Item]:
    try:
        with copied(entry) as (local, partner):
            yield from reader.read(local, entry.kind, entry.modality, partner=partner)
    except Refused as refused:
        yield Refusal(refused.reason, modality=entry.modality)
    except OSError:  # of the source: those of the copy are UserError
        yield Refusal(Reason.UNREADABLE, modality=entry.modality)
