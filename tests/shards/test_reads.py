"""Reads of batches: near ranges in one, ahead of use, held to their checksums; what fails is named."""

import errno
import os
import random
import shutil
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import catalog, objects, tar
from shards.cache import NodeCache
from shards.errors import UserError
from shards.objects import ObjectStore, open_store
from shards.reads import BatchReader, Place, coalesce
from shards.store import Store
from shards.tar import ShardReader
from tests.batches import make as batches
from tests.shards import servers
from tests.shards.test_object_store import build
from trainer.batches import BatchMaker

SHARD = "ct-aaaaaaaaaaaaaaaaaaaaaaaaaa.tar"


def place(offset, size, shard=SHARD, **more):
    return Place("ct", shard, offset, size, **more)


@settings(max_examples=150, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.integers(1, 60)), max_size=20),
    gap=st.integers(0, 100),
    largest=st.integers(1, 200),
)
def test_every_place_is_in_one_read_that_is_no_larger_than_asked(ranges, gap, largest):
    places = [place(offset, size, shard) for shard, offset, size in ranges]
    spans = coalesce(places, gap, largest)
    assert sorted(n for span in spans for n in span.members) == list(range(len(places)))
    for span in spans:
        inside = [places[n] for n in span.members]
        assert all(span.shard == p.shard and span.start <= p.offset and p.end <= span.end for p in inside)
        assert span.size <= max(largest, *(p.size for p in inside))
        covered = span.start
        for p in sorted(inside, key=lambda p: p.offset):
            assert p.offset - covered <= gap
            covered = max(covered, p.end)
    firsts = [min(span.members) for span in spans]
    assert firsts == sorted(firsts)  # what is needed first is read first


def test_neighbours_are_one_read_and_far_ones_are_not():
    places = [place(3000, 100), place(0, 100), place(150, 100), place(3100, 50, "ct-b.tar")]
    spans = coalesce(places, 64, 1 << 20)
    assert [(s.start, s.end, s.members) for s in spans] == [
        (3000, 3100, (0,)),
        (0, 250, (1, 2)),
        (3100, 3150, (3,)),
    ]
    assert len(coalesce(places, 1 << 20, 1 << 20)) == 2


@pytest.fixture
def folder(tmp_path):
    build(Store(tmp_path / "data"), tmp_path / "scratch", 12)
    return tmp_path / "data"


def places_of(root, block=False):
    rows = catalog.load(root).sort_by([("shard", "ascending"), ("offset", "ascending")]).to_pylist()
    found = []
    for row in rows:
        near = [r for r in rows if r["shard"] == row["shard"]]
        whole = (near[0]["offset"], near[-1]["offset"] + near[-1]["size"]) if block else None
        where = (row["modality"], row["shard"], row["offset"], row["size"])
        found.append(Place(*where, row["crc32"], whole))
    random.Random(3).shuffle(found)
    return found


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("ahead_bytes", [0, 3000, 1 << 20])
def test_a_batch_is_read_whole_whatever_the_threads_and_the_memory(folder, threads, ahead_bytes):
    places, plain = places_of(folder), ShardReader(folder)
    reader = BatchReader(str(folder), threads, ahead_bytes)
    first, second = reader.start(places[:10]), reader.start(places[10:])
    for reads, part in ((first, places[:10]), (second, places[10:])):
        for number, p in enumerate(part):
            assert reads.take(number) == plain.read(p.modality, p.shard, p.offset, p.size)
    assert reader.ahead_left == ahead_bytes
    third = reader.start(places[:10])
    third.take(0)
    third.drop()
    assert reader.ahead_left == ahead_bytes
    reader.close()


def test_no_more_bytes_are_under_way_than_allowed(folder):
    places = places_of(folder)
    reader = BatchReader(str(folder), 2, 4000)
    reader.gap = -(1 << 20)  # nothing is joined
    reads = reader.start(places)
    for number in range(len(places)):
        reads.take(number)
        assert reader.ahead_left >= 4000 - max(4000, max(p.size for p in places))
    assert reads.counts.requests == len(places)
    reader.close()


def test_a_node_reads_a_block_once_and_all_its_processes_have_it(folder, tmp_path):
    places = places_of(folder, block=True)
    counts = []
    for _ in range(2):  # another process would have a NodeCache of its own too
        reader = BatchReader(str(folder), 2, cache=NodeCache(tmp_path / "cache", 1 << 30))
        for batch in (places[:12], places[12:]):
            reads = reader.start(batch)
            data = [reads.take(number) for number in range(len(batch))]
            assert [crc32(d) for d in data] == [p.crc32 for p in batch]
            counts.append(reads.counts)
        reader.close()
    assert counts[0].requests == 2 and counts[0].cache_misses == 12  # two shards
    assert all((c.requests, c.store_bytes, c.cache_hits) == (0, 0, 12) for c in counts[1:])


def test_an_entry_that_fails_the_catalogue_is_read_anew(folder, tmp_path):
    places, cache = places_of(folder, block=True), NodeCache(tmp_path / "cache", 1 << 30)
    reader = BatchReader(str(folder), 0, cache=cache)
    for p in {p.shard: p for p in places}.values():  # whole, but of other bytes
        cache.put(f"{p.shard}-{p.block[0]}-{p.block[1]}", bytes(p.block[1] - p.block[0]))
    reads = reader.start(places)
    assert [crc32(reads.take(n)) for n in range(len(places))] == [p.crc32 for p in places]
    assert reads.counts.requests == 2 and reads.counts.cache_hits == 0


def test_a_flipped_bit_anywhere_in_a_shard_ends_in_its_name_or_harms_no_sample(folder):
    shard = next(folder.glob("shards/ct/*.tar"))
    raw, generator, named = shard.read_bytes(), random.Random(1), 0
    places = [p for p in places_of(folder) if p.modality == "ct"]
    for _ in range(40):
        at = generator.randrange(len(raw))
        shard.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << generator.randrange(8)]) + raw[at + 1 :])
        hit = any(p.offset <= at < p.end for p in places)
        reader = BatchReader(str(folder), 0)
        reads = reader.start(places)
        if hit:
            with pytest.raises(UserError, match=rf"shard {shard.name} holds other bytes .*ingest repair"):
                [reads.take(n) for n in range(len(places))]
        else:  # padding, headers and rows between the images
            assert all(crc32(reads.take(n)) == p.crc32 for n, p in enumerate(places))
        named += hit
        reader.close()
    assert named >= 5


def test_a_cut_or_missing_shard_is_named(folder):
    p = places_of(folder)[0]
    path = folder / "shards" / p.modality / p.shard
    path.write_bytes(path.read_bytes()[: p.offset + 3])
    with pytest.raises(UserError, match=rf"shard {p.shard} is shorter .*ingest repair"):
        BatchReader(str(folder)).start([p]).take(0)
    path.unlink()
    with pytest.raises(UserError, match=rf"shard {p.shard} is missing"):
        BatchReader(str(folder)).start([p]).take(0)


def test_a_disk_that_fails_for_a_moment_is_tried_again_and_then_named(folder, monkeypatch):
    monkeypatch.setattr(tar, "_FIRST_WAIT", 0.001)
    p, pread, fails = places_of(folder)[0], os.pread, [2]

    def failing(fd, size, offset):
        if fails[0]:
            fails[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert crc32(BatchReader(str(folder)).start([p]).take(0)) == p.crc32
    fails[0] = 99
    with pytest.raises(UserError, match=rf"shard {p.shard}: .*Input/output error, 4 times"):
        BatchReader(str(folder)).start([p]).take(0)


@pytest.fixture(scope="module")
def bucket():
    with servers.moto() as (proxy, _):
        yield proxy


@pytest.fixture
def stored(bucket, monkeypatch, tmp_path):
    """A dataset in S3, its places and a reader that tries three times."""
    servers.choose(monkeypatch, bucket.url)
    bucket.rule = lambda method, path: None
    root = f"s3://{servers.BUCKET}/reads/{tmp_path.name}"
    build(open_store(root), tmp_path / "scratch", 12)
    reader = BatchReader(root, 2)
    reader.shards._objects = ObjectStore(root, attempts=3, first_wait=0.001)
    bucket.requests.clear()
    yield bucket, places_of(root), reader
    bucket.rule = lambda method, path: None
    reader.close()


def gets(proxy):
    return [path for method, path in proxy.requests if method == "GET" and ".tar" in path]


def test_near_samples_of_an_object_are_one_request(stored):
    proxy, places, reader = stored
    proxy.requests.clear()
    reads = reader.start(places)
    assert [crc32(reads.take(n)) for n in range(len(places))] == [p.crc32 for p in places]
    assert len(gets(proxy)) == reads.counts.requests == 2  # 24 samples of two shards


@pytest.mark.parametrize("answer", ["500", "503", "drop"])
def test_a_store_that_recovers_is_waited_for_and_one_that_does_not_is_named(stored, answer):
    proxy, places, reader = stored
    tar_reads = lambda method, path: method == "GET" and ".tar" in path  # noqa: E731
    proxy.rule = servers.first(2, answer, tar_reads)
    assert crc32(reader.start(places[:1]).take(0)) == places[0].crc32
    proxy.rule = servers.first(99, answer, tar_reads)
    said = {"500": "it answered 500 InternalError", "503": "it answered 503 SlowDown", "drop": "no answer"}
    with pytest.raises(UserError) as caught:
        reader.start(places[:1]).take(0)
    text = str(caught.value)
    assert text.startswith(f"shard {places[0].shard}: s3://") and "\n" not in text
    assert said[answer] in text and "3 tries" in text


def test_a_store_that_is_too_slow_is_given_up_and_named(stored, monkeypatch):
    proxy, places, reader = stored
    monkeypatch.setattr(objects, "_READ_SECONDS", 0.2)
    proxy.let_go.clear()
    proxy.rule = lambda method, path: "hold" if ".tar" in path else None
    try:
        with pytest.raises(UserError, match=rf"shard {places[0].shard}: .*no answer: .*Timeout.*3 tries"):
            reader.start(places[:1]).take(0)
    finally:
        proxy.let_go.set()


def test_batches_from_a_bucket_are_those_of_the_folder_and_its_failure_is_one_line(
    bucket, monkeypatch, tmp_path
):
    servers.choose(monkeypatch, bucket.url)
    bucket.rule = lambda method, path: None
    folder = batches.dataset(tmp_path / "data", tmp_path / "scratch")
    root, objects_ = f"s3://{servers.BUCKET}/batches", Store(folder)
    for name in objects_.list():
        open_store(root).put(name, objects_.read(name))
    config = batches.config(root, energy_probability=0.0)
    makers = []
    for where in (folder, root):
        data = config.data.model_copy(update={"dataset": where, "node_cache": str(tmp_path / "cache")})
        makers.append(BatchMaker(config.model_copy(update={"data": data}), 0, 1, None))
    at_home, remote = (maker(0) for maker in makers)
    assert at_home.keys == remote.keys
    assert all((a == b).all() for a, b in zip(at_home.crops, remote.crops, strict=True))
    monkeypatch.setattr(objects, "_LONGEST_WAIT", 0.001)
    shutil.rmtree(tmp_path / "cache")
    bucket.rule = servers.first(999, "503", lambda method, path: ".tar" in path)
    with pytest.raises(UserError, match=r"^shard .*it answered 503 SlowDown, 7 tries in"):
        makers[1](1)
