"""`ingest plan`: what a run would do and cost. Decodes a sample of the inputs, writes nothing."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ingest.config import IngestConfig
from ingest.convert import read_entry
from ingest.discover import Entry
from ingest.frames import Frame, Refusal
from ingest.sandbox import Reader, open_reader
from ingest.stacks import in_volumes
from shards.codec import get_codec
from shards.stats import pixel_digest, pixel_statistics


@dataclass
class PlanReport:
    """Counts of inputs and an estimate from `sampled` decoded ones. seconds are those of one core."""

    inputs: int = 0
    bytes_in: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    modalities: dict[str, int] = field(default_factory=dict)  # inputs by partition, before decoding
    # Refusals that the headers tell, and, scaled from the sample, those that only decoding tells.
    refusals: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # expected samples by partition
    sampled: int = 0
    bytes_out: int = 0
    core_seconds: float = 0.0


@dataclass
class _Measured:
    """Of the sampled files of one kind and partition."""

    files: int = 0
    images: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    bytes_out: int = 0
    seconds: float = 0.0


class Entries(Protocol):
    """A list of entries, or an Inventory on disk."""

    def __iter__(self) -> Iterator[Entry]: ...

    def __getitem__(self, number: int, /) -> Entry: ...


class _Stratum:
    """The files of one kind and partition: how many, and up to 2 x `most` of their numbers, evenly spread."""

    def __init__(self, most: int) -> None:
        self.count, self.numbers = 0, list[int]()
        self._most, self._step = most, 1

    def add(self, number: int) -> None:
        if self.count % self._step == 0:
            self.numbers.append(number)
            if len(self.numbers) > 2 * self._most:
                self.numbers, self._step = self.numbers[::2], 2 * self._step
        self.count += 1


def estimate(entries: Entries, config: IngestConfig, sample: int = 48) -> PlanReport:
    """Counts of all entries; cost, size and further refusals scaled up from about `sample` decoded files.

    Memory: `sample` numbers for each kind and partition, whatever the number of entries.
    """
    report = PlanReport()
    kinds, modalities, refusals = Counter[str](), Counter[str](), Counter[str]()
    strata: dict[tuple[str, str], _Stratum] = defaultdict(lambda: _Stratum(max(4, sample)))
    for number, entry in enumerate(entries):
        report.inputs += 1
        report.bytes_in += entry.size
        kinds[entry.kind] += 1
        modalities[entry.modality] += 1
        if entry.hint:
            refusals[entry.hint] += 1
        else:
            strata[entry.kind, entry.modality].add(number)
    report.kinds, report.modalities = dict(kinds), dict(modalities)
    images: Counter[str] = Counter()
    reader = open_reader(config)
    try:
        for _, members in sorted(strata.items()):
            numbers = _spread(members.numbers, max(4, sample // max(1, len(strata))))
            measured = _measure([entries[number] for number in numbers], config, reader)
            scale = members.count / measured.files
            report.sampled += measured.files
            report.bytes_out += round(measured.bytes_out * scale)
            report.core_seconds += measured.seconds * scale
            for reason, number in measured.reasons.items():
                refusals[reason] += round(number * scale)
            for modality, number in measured.images.items():
                images[modality] += round(number * scale)
    finally:
        reader.close()
    report.refusals, report.images = dict(refusals), dict(images)
    return report


def _measure(entries: Sequence[Entry], config: IngestConfig, reader: Reader) -> _Measured:
    measured, codec = _Measured(), get_codec(config.codec)
    if entries:
        list(read_entry(entries[0], reader))  # the start of the decoder process is not a cost per file
    for entry in entries:
        started = time.perf_counter()
        for item in read_entry(entry, reader):
            if isinstance(item, Refusal):
                measured.reasons[item.reason.value] += 1
            else:
                measured.images[item.modality] += 1
                size = _encoded_bytes(item, codec.encode(item.pixels))
                measured.bytes_out += size * (2 if in_volumes(item) else 1)
        measured.seconds += time.perf_counter() - started
        measured.files += 1
    return measured


def _encoded_bytes(frame: Frame, data: bytes) -> int:
    pixel_digest(frame.pixels)  # the work of a run, for its time
    pixel_statistics(frame.pixels)
    return len(data) + 3072  # the JSON, the tar headers and padding, the catalogue row


def _spread(members: list[int], most: int) -> list[int]:
    return members if len(members) <= most else [members[i * len(members) // most] for i in range(most)]
