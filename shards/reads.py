"""Reading many samples at once: near ranges in one read, ahead of their use, checked, through a node cache.

Who makes a batch knows all its reads beforehand. `coalesce` joins ranges that are near each other, a few
threads carry the reads out while earlier samples are decoded, and every sample is held to its CRC-32 where
the catalogue has one. What is wrong is read once more and then named: a shard's name is a digest, nothing of
a patient.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from zlib import crc32

from shards.cache import NodeCache
from shards.errors import UserError
from shards.objects import is_url
from shards.tar import ShardReader

# A request costs an object store as much time as some 1 MB; a disk's read-ahead takes what lies between.
GAP_BYTES, LOCAL_GAP_BYTES = 512 << 10, 32 << 10
LARGEST_BYTES = 16 << 20  # of one read of several samples
HANG_SECONDS = 800.0  # longer than an object store is tried, shorter than a rank waits for a batch


@dataclass(frozen=True)
class Place:
    """Where one sample's encoded pixels lie. crc32: None where the catalogue has none.

    block: (start, end) of the range of the shard that a node cache keeps them in; None: the sample alone.
    """

    modality: str
    shard: str
    offset: int
    size: int
    crc32: int | None = None
    block: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Span:
    """One read: bytes [start, end) of a shard, for the samples `members` (indices into the places)."""

    modality: str
    shard: str
    start: int
    end: int
    members: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.end - self.start


def coalesce(places: Sequence[Place], gap: int, largest: int) -> list[Span]:
    """Reads that hold all places, ordered by the first place that needs them.

    Ranges of a shard with at most `gap` bytes between them become one read, of at most `largest` bytes (a
    sample larger than that is a read of its own). A block (Place.block) is one read of its own.
    """
    by_shard: dict[tuple[str, str, tuple[int, int] | None], list[int]] = {}
    for number, place in enumerate(places):
        by_shard.setdefault((place.modality, place.shard, place.block), []).append(number)
    spans = []
    for (modality, shard, block), members in by_shard.items():
        if block is not None:
            spans.append(Span(modality, shard, *block, tuple(members)))
            continue
        members.sort(key=lambda n: (places[n].offset, n))
        start, end, joined = places[members[0]].offset, places[members[0]].end, [members[0]]
        for number in members[1:]:
            place = places[number]
            if place.offset - end <= gap and max(end, place.end) - start <= largest:
                end = max(end, place.end)
                joined.append(number)
            else:
                spans.append(Span(modality, shard, start, end, tuple(joined)))
                start, end, joined = place.offset, place.end, [number]
        spans.append(Span(modality, shard, start, end, tuple(joined)))
    return sorted(spans, key=lambda span: min(span.members))


@dataclass
class Counts:
    """What reading cost: requests and bytes asked of the store, samples found in the node cache and not."""

    requests: int = 0
    store_bytes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


class Reads:
    """The reads of one batch: `take(i)` gives the bytes of place i, each once. Made by BatchReader.start."""

    def __init__(self, reader: "BatchReader", places: Sequence[Place]) -> None:
        self._reader, self.places = reader, places
        self.counts = Counts()
        self._todo: deque[Span] = deque(coalesce(places, reader.gap, LARGEST_BYTES))
        self._span_of = {n: span for span in self._todo for n in span.members}
        self._running: dict[Span, Future[dict[int, bytes]]] = {}
        self._left = {span: len(span.members) for span in self._todo}

    def take(self, number: int) -> bytes:
        """Raises UserError that names the shard, after what can be tried again has been."""
        span = self._span_of[number]
        while span not in self._running:
            self._submit()
        try:
            found = self._running[span].result(HANG_SECONDS)
        except TimeoutError:
            raise UserError(
                f"shard {span.shard} was not read within {HANG_SECONDS:g} s: the file system does not "
                "answer; check its mount, then run again"
            ) from None
        data = found.pop(number)
        self._left[span] -= 1
        if not self._left[span]:
            del self._running[span]
            self._reader.ahead_left += span.size
        self._reader.pump()
        return data

    def pump(self) -> None:
        """Begin as many reads as there is room for."""
        while self._todo and self._todo[0].size <= self._reader.ahead_left:
            self._submit()

    def drop(self) -> None:
        """Forget what was not taken: reads that run finish unseen."""
        for span, future in self._running.items():
            future.cancel()
            self._reader.ahead_left += span.size
        self._todo.clear()
        self._running.clear()

    def _submit(self) -> None:
        span = self._todo.popleft()
        self._reader.ahead_left -= span.size
        self._running[span] = self._reader.submit(lambda: self._reader.fetch(span, self.places, self.counts))


@dataclass
class BatchReader:
    """Reads of a dataset's shards for whole batches, from one consumer thread.

    threads: reads at a time; 0: each when it is needed, in the caller's thread. ahead_bytes: of reads under
    way or not yet taken; one read is always allowed.
    """

    root: str
    threads: int = 4
    ahead_bytes: int = 64 << 20
    cache: NodeCache | None = None
    gap: int = field(init=False)
    ahead_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.shards = ShardReader(self.root)
        self.gap = GAP_BYTES if is_url(self.root) else LOCAL_GAP_BYTES
        self.ahead_left = self.ahead_bytes
        self._pool = ThreadPoolExecutor(self.threads, "reads") if self.threads else None
        self._lock = Lock()
        self._started: list[Reads] = []

    def start(self, places: Sequence[Place]) -> Reads:
        """Begin to read; at most two batches at a time are under way: this one and the one before it."""
        reads = Reads(self, places)
        self._started = [*self._started[-1:], reads]
        self.pump()
        return reads

    def pump(self) -> None:
        if self._pool is not None:
            for reads in self._started:
                reads.pump()

    def submit(self, work: "Callable[[], dict[int, bytes]]") -> "Future[dict[int, bytes]]":
        if self._pool is not None:
            return self._pool.submit(work)
        done: Future[dict[int, bytes]] = Future()
        done.set_result(work())
        return done

    def fetch(self, span: Span, places: Sequence[Place], counts: Counts) -> dict[int, bytes]:
        """{member: its bytes}, from the node cache or the store. Runs in a thread of the pool."""
        found = {} if self.cache is None else self._cached(self.cache, span, places)
        missing = [n for n in span.members if n not in found]
        with self._lock:
            counts.cache_hits += len(found)
            counts.cache_misses += len(missing) if self.cache is not None else 0
        for attempt in range(2):  # what arrives damaged may be whole in the store
            if not missing:
                break
            data = _read(self.shards, span)
            with self._lock:
                counts.requests += 1
                counts.store_bytes += len(data)
            parts = {n: data[places[n].offset - span.start : places[n].end - span.start] for n in missing}
            damaged = [n for n, part in parts.items() if not whole(part, places[n])]
            if damaged and attempt:
                raise damaged_shard(span.shard, places[damaged[0]].offset)
            if not damaged:
                if self.cache is not None:
                    self.cache.put(_entry(span), data)
                found |= parts
                missing = []
        return found

    def _cached(self, cache: NodeCache, span: Span, places: Sequence[Place]) -> dict[int, bytes]:
        found = {}
        for n in span.members:
            part = cache.get(_entry(span), places[n].offset - span.start, places[n].size)
            if part is not None and not whole(part, places[n]):
                cache.drop(_entry(span))
                part = None
            if part is not None:
                found[n] = part
        return found

    def close(self) -> None:
        """End the threads and let go of all files."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.shards.close()


def read_one(shards: ShardReader, place: Place) -> bytes:
    """The bytes of one sample, checked; read once more where they are not whole. Raises UserError."""
    span = Span(place.modality, place.shard, place.offset, place.end, (0,))
    for _ in range(2):
        data = _read(shards, span)
        if whole(data, place):
            return data
    raise damaged_shard(place.shard, place.offset)


def _read(shards: ShardReader, span: Span) -> bytes:
    try:
        return shards.read(span.modality, span.shard, span.start, span.size)
    except FileNotFoundError:
        raise UserError(
            f"shard {span.shard} is missing: run ingest verify on the dataset, then ingest repair"
        ) from None
    except ValueError as error:
        raise UserError(f"{error}, then ingest repair") from None
    except UserError as error:
        raise UserError(f"shard {span.shard}: {error}") from error


def whole(data: bytes, place: Place) -> bool:
    """Whether these are the bytes that were committed, as far as the catalogue can tell."""
    return len(data) == place.size and place.crc32 in (None, crc32(data))


def damaged_shard(shard: str, offset: int) -> UserError:
    return UserError(
        f"shard {shard} holds other bytes than were committed (the sample at byte {offset}): run ingest "
        "verify --deep on the dataset, then ingest repair"
    )


def _entry(span: Span) -> str:
    """The name of a cached range: a shard's name is a digest of its committed sha256."""
    return f"{span.shard}-{span.start}-{span.end}"


def open_cache(folder: str | Path | None, limit: int) -> NodeCache | None:
    return NodeCache(Path(folder), limit) if folder else None
