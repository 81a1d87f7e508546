"""Retry, repair and volumes of a dataset in S3: as in a folder, byte for byte."""

import itertools

import numpy as np
import pytest

from ingest.convert import run_unit
from ingest.discover import inventory
from ingest.inventory import Inventory
from ingest.repair import remake, units_of
from ingest.retry import DEFAULT_REASONS, retry_units
from ingest.sandbox import InlineReader
from shards import catalog
from shards.objects import ObjectStore, open_store
from shards.repair import find_broken
from shards.tar import ShardReader
from shards.verify import verify
from shards.volumes import read_slab
from tests.ingest.files import NAMES, config, grey, ingest, tree, units, write
from tests.ingest.test_retry import Without
from tests.ingest.test_volumes import series
from tests.shards import servers

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    with servers.moto() as (proxy, client):
        yield proxy, client


@pytest.fixture
def url(server, monkeypatch):
    servers.choose(monkeypatch, server[0].url)
    return f"s3://{servers.BUCKET}/upkeep/{next(_numbers)}"


@pytest.fixture
def source(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        write(tmp_path / "source" / name, grey(seed=number), number=number)
    (tmp_path / "source" / "text").write_bytes(b"no image")
    return tmp_path / "source"


def objects(store: ObjectStore) -> dict[str, bytes]:
    folders = ("shards", "catalog", "quarantine", "commits", "plans")
    names = [n for folder in folders for n in store.list(folder)] + ["dataset.json"]
    return {name: store.read(name) for name in names}


def run(source, root, scratch, *crash, **settings) -> None:
    chosen = config(source, root, **settings)
    for unit in units(chosen):
        run_unit(unit, chosen, NAMES, root, scratch, Without(chosen, *crash))


def stored(source, root, folder) -> Inventory:
    found = Inventory(folder, NAMES)
    found.append(inventory(config(source, root)))
    found.close()
    return found


def retry(source, root, folder) -> int:
    chosen = config(source, root)
    again, absent = retry_units(open_store(root), stored(source, root, folder), DEFAULT_REASONS)
    assert not absent
    for unit in again:
        run_unit(unit, chosen, NAMES, root, folder / "scratch", InlineReader(chosen.rules()))
    return len(again)


def test_a_retry_in_a_bucket_gives_the_objects_that_one_in_a_folder_gives(source, url, tmp_path):
    for root, folder in ((url, tmp_path / "i"), (tmp_path / "out", tmp_path / "j")):
        run(source, root, folder / "scratch", "/b")
        assert catalog.load(root).num_rows == 2
        assert (retry(source, root, folder), retry(source, root, folder / "again")) == (1, 0)
        assert catalog.load(root).num_rows == 3
        assert catalog.quarantine(root)["reason"].to_pylist() == ["not_an_image"]
        assert verify(root, deep=True).clean
    assert objects(open_store(url)) == tree(tmp_path / "out")


def test_broken_and_missing_objects_are_made_again_byte_for_byte(source, url, tmp_path):
    run(source, url, tmp_path / "scratch")
    store = open_store(url)
    before = objects(store)
    shard, part = store.list("shards")[0], store.list("catalog")[0]
    store.put(shard, bytes(700) + before[shard][700:])
    store.delete(part)
    broken, damaged = find_broken(store)
    assert not damaged and {f.path for b in broken for f in b.files} == {shard, part}
    found, lacking = units_of(store, stored(source, url, tmp_path / "i"), [b.commit for b in broken])
    assert not lacking
    settings = config(source, url)
    by_unit = {b.commit.unit: b for b in broken}
    reader, scratch = InlineReader(settings.rules()), tmp_path / "repair"
    done = [remake(u, by_unit[u.unit], settings, NAMES, store, scratch, reader) for u in found]
    assert sorted(itertools.chain.from_iterable(done)) == sorted([shard, part])
    assert objects(store) == before and verify(store, deep=True).clean


def test_a_slab_of_a_volume_in_a_bucket_is_one_ranged_request(server, url, tmp_path):
    pixels = series(tmp_path / "s", range(5))
    both = {"outputs": ("slices", "volumes")}
    run(tmp_path / "s", url, tmp_path / "scratch", **both)
    ingest(tmp_path / "s", tmp_path / "out", **both)
    assert objects(open_store(url)) == tree(tmp_path / "out")
    (row,) = catalog.load(url, "ct_volumes").to_pylist()
    reader = ShardReader(url)
    read_slab(reader, row, 0, 1)
    server[0].requests.clear()
    assert np.array_equal(read_slab(reader, row, 1, 3), np.stack([pixels[1], pixels[2]]))
    assert [method for method, _ in server[0].requests] == ["GET"]
