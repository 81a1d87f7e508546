"""A dataset in GCS, against an emulator: uploads, reads, listings, and create-if-absent as far as it goes.

The emulator knows no preconditions; the proxy before it answers as GCS documents (see servers.gcs). What is
shown is that this side asks for `ifGenerationMatch=0` and understands the answer, not that GCS keeps it.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest

from shards import catalog
from shards.errors import UserError
from shards.objects import ObjectStore, open_store
from shards.store import Store
from shards.tar import ShardReader
from shards.verify import verify
from tests.shards import servers
from tests.shards.test_object_store import build, contents

_numbers = count()


@pytest.fixture(scope="module")
def server():
    with servers.gcs() as proxy:
        yield proxy


@pytest.fixture
def root(server, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    yield f"gs://{servers.BUCKET}/tests/{next(_numbers)}"
    server.rule = lambda method, path: None


def test_objects_in_gcs_are_read_listed_and_deleted(root):
    objects = open_store(root)
    assert objects.is_empty()
    assert objects.put("a/one", b"0123456789") == hashlib.sha256(b"0123456789").hexdigest()
    assert (
        not objects.is_empty()
        and objects.list() == objects.list("a") == ["a/one"]
        and objects.list("b") == []
    )
    assert (objects.read("a/one", 3, 4), objects.read("a/one", 8, 9)) == (b"3456", b"89")
    assert objects.read("a/one", 10, 1) == b"" and objects.size("a/one") == 10
    assert objects.exists("a/one") and not objects.exists("a") and objects.age_seconds("a/one") < 60
    with pytest.raises(FileNotFoundError):
        objects.read("z")
    objects.delete("a/one")
    objects.delete("a/one")
    assert objects.list() == []


def test_large_files_go_to_gcs_in_parts(root, tmp_path):
    path = tmp_path / "big"
    path.write_bytes(np.random.default_rng(0).bytes(6 << 20))
    objects = ObjectStore(root, part_bytes=1 << 20)
    assert objects.put("big", path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert objects.read("big") == path.read_bytes()


def test_exactly_one_of_many_creators_wins_in_gcs(server, root):
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda n: open_store(root).create("commit", b"%d" % n), range(4)))
    assert won.count(True) == 1
    assert open_store(root).read("commit") == b"%d" % won.index(True)


def test_a_lost_answer_of_gcs_is_no_lost_commit(server, root):
    server.rule = servers.first(1, "lose", lambda method, path: method == "POST")
    assert open_store(root).create("commit", b"mine") is True
    assert open_store(root).create("commit", b"mine") is False


def test_forbidden_is_one_clear_line(server, root):
    server.rule = lambda method, path: "403"
    with pytest.raises(UserError, match="access denied"):
        open_store(root).read("a")


def test_a_unit_in_gcs_has_the_bytes_of_a_folder(root, tmp_path):
    for where in (root, root, tmp_path / "folder"):
        build(open_store(where), tmp_path / "scratch")
    assert contents(open_store(root)) == contents(Store(tmp_path / "folder"))
    assert verify(root, deep=True).clean
    row = catalog.load(root).to_pylist()[0]
    place = (row["modality"], row["shard"], row["offset"], row["size"])
    assert ShardReader(root).read(*place) == ShardReader(tmp_path / "folder").read(*place)
