"""What a batch reads, and reading it ahead: places of samples in the shards, for shards.reads. No torch."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from shards.reads import GAP_BYTES, LARGEST_BYTES, BatchReader, Place, Reads, coalesce, open_cache
from trainer.config import DataConfig
from trainer.rows import Plan, Rows

_AT_A_TIME = 64  # samples whose reads are begun together, outside of training
Key = tuple[str, int]  # modality, index
Needs = Callable[[int], tuple[Plan, Sequence[tuple[Key, Place]]]]


def open_reader(data: DataConfig) -> BatchReader:
    """Raises UserError for a node cache that cannot be written."""
    cache = open_cache(data.node_cache, data.node_cache_bytes)
    return BatchReader(data.dataset, data.read_threads, data.read_ahead_bytes, cache)


def place_of(modality: Rows, index: int, data: DataConfig) -> Place:
    """Where a sample lies; with a node cache also the range that the cache keeps: its block of the order."""
    row = modality.location(index)
    place = Place(modality.name, row["shard"], row["offset"], row["size"], row["crc32"])
    if data.node_cache is None:
        return place
    if (
        data.order.layout != "blocks"
    ):  # a range of the sample's own: what is joined differs from batch to batch
        return replace(place, block=(place.offset, place.end))
    first = index - index % data.order.block_samples
    near = [
        Place(modality.name, row["shard"], row["offset"], row["size"])
        for row in map(modality.location, range(first, min(first + data.order.block_samples, len(modality))))
    ]
    for span in coalesce(near, GAP_BYTES, LARGEST_BYTES):
        if index - first in span.members:
            return replace(place, block=(span.start, span.end))
    raise AssertionError("a sample lies in a span of its block")


class BatchReads:
    """The reads of one step's batch, and its plan."""

    def __init__(self, reader: BatchReader, plan: Plan, needed: Sequence[tuple[Key, Place]]) -> None:
        self.plan = plan
        self._often = Counter(key for key, _ in needed)
        places = dict(needed)
        self._numbers = {key: number for number, key in enumerate(places)}
        self._reads: Reads = reader.start(list(places.values()))
        self._kept: dict[Key, bytes] = {}

    def take(self, key: Key) -> bytes:
        """The bytes of a sample, which a batch may hold more than once. Raises UserError."""
        data = self._kept.get(key)
        if data is None:
            data = self._reads.take(self._numbers[key])
            if self._often[key] > 1:
                self._kept[key] = data
        return data

    def finish(self) -> dict[str, int]:
        """Forget what was not taken. What the reads cost: see shards.reads.Counts."""
        self._reads.drop()
        return asdict(self._reads.counts)


def encoded(reader: BatchReader, modality: Rows, indices: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(index, encoded bytes) of samples, as they lie in the shards: near ones in one read, some reads ahead.

    Raises UserError.
    """
    located = [(modality.location(index), index) for index in indices]
    located.sort(key=lambda one: (one[0]["shard"], one[0]["offset"]))
    parts = [located[first : first + _AT_A_TIME] for first in range(0, len(located), _AT_A_TIME)]
    begun: deque[tuple[list[int], Reads]] = deque()
    for number in range(len(parts) + 1):
        if number < len(parts):
            places = [Place(modality.name, **location) for location, _ in parts[number]]
            begun.append(([index for _, index in parts[number]], reader.start(places)))
        if number > 0:
            of, under_way = begun.popleft()
            for position, index in enumerate(of):
                yield index, under_way.take(position)


class ReadAhead:
    """`batch(step)`: the reads of that step, begun before it was asked for where steps go on as they did."""

    def __init__(self, reader: BatchReader, needs: Needs) -> None:
        self._reader, self._needs = reader, needs
        self._last: int | None = None
        self._next: tuple[int, BatchReads] | None = None

    def batch(self, step: int) -> BatchReads:
        if self._next is not None and self._next[0] == step:
            current = self._next[1]
        else:
            if self._next is not None:
                self._next[1].finish()
            current = self._begin(step)
        stride = 0 if self._last is None else step - self._last
        self._last, self._next = step, None
        if stride > 0 and self._reader.threads:
            self._next = (step + stride, self._begin(step + stride))
        return current

    def _begin(self, step: int) -> BatchReads:
        return BatchReads(self._reader, *self._needs(step))
