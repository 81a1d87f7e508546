"""A dataset in S3: the promises of a folder hold, and those that only a network can break (moto's server)."""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from ingest.config import load_config
from ingest.convert import run_unit
from ingest.places import check_output
from orchestration import keys
from orchestration.cli_ingest import build_config
from shards import catalog, store
from shards.commit import commit_unit, committed_sources, list_commits, orphans, sweep
from shards.dataset import NAME, open_or_create
from shards.errors import UserError
from shards.ids import digest
from shards.objects import ObjectStore, is_url, location, open_store
from shards.store import Store
from shards.tar import ShardReader
from shards.verify import verify
from tests.ingest import files
from tests.shards import make, servers

UNIT = digest("unit", "object store")
_numbers = count()


@pytest.fixture(scope="module")
def server():
    with servers.moto() as (proxy, client):
        yield proxy, client


@pytest.fixture
def proxy(server, monkeypatch):
    servers.choose(monkeypatch, server[0].url)
    yield server[0]
    server[0].rule = lambda method, path: None
    server[0].requests.clear()


@pytest.fixture
def root(proxy):
    """A prefix that nobody has used."""
    return f"s3://{servers.BUCKET}/tests/{next(_numbers)}"


def quick(root, attempts=5, **options) -> ObjectStore:
    return ObjectStore(root, attempts=attempts, first_wait=0.001, **options)


def contents(files: Store) -> dict[str, bytes]:
    return {name: files.read(name) for name in files.list()}


def build(where: Store, scratch: Path, number: int = 4):
    open_or_create(where, make.info())
    samples = make.samples(UNIT, "ct", 0, number) + make.samples(UNIT, "xr", 10, number)
    return commit_unit(where, UNIT, samples, make.refused(), scratch, 9)


@pytest.fixture(params=["folder", "s3"])
def either(request, tmp_path):
    if request.param == "folder":
        return open_store(tmp_path / "root")
    return open_store(request.getfixturevalue("root"))


def test_folder_and_s3_have_the_same_methods_and_results(either, tmp_path):
    local = tmp_path / "data"
    local.write_bytes(b"0123456789")
    assert either.put("a/one", local) == hashlib.sha256(b"0123456789").hexdigest()
    assert either.put("a/empty", b"") == hashlib.sha256(b"").hexdigest()
    assert either.create("b", b"first") and not either.create("b", b"second")
    assert [
        either.read("a/one", *place) for place in ((), (3,), (3, 4), (8, 9), (10, 1), (20, 1), (0, 0))
    ] == [
        b"0123456789",
        b"3456789",
        b"3456",
        b"89",
        b"",
        b"",
        b"",
    ]
    assert either.read("a/empty") == b"" and either.read("b") == b"first"
    assert (either.list(), either.list("a"), either.list("none")) == (
        ["a/empty", "a/one", "b"],
        ["a/empty", "a/one"],
        [],
    )
    assert either.exists("b") and not either.exists("a") and not either.exists("z")
    assert either.size("a/one") == 10 and either.age_seconds("b") < 60 and either.temporaries() == []
    with either.open("a/one") as file:
        assert (file.seek(-3, 2), file.read(), file.seek(1), file.read(2)) == (7, b"789", 1, b"12")
    for gone in (either.read, either.size, either.open, either.age_seconds):
        with pytest.raises(FileNotFoundError):
            gone("z")
    for name in ("../x", "/x", ""):
        with pytest.raises(ValueError):
            either.read(name)
    either.delete("b")
    either.delete("b")
    assert either.list() == ["a/empty", "a/one"]


def test_exactly_one_of_many_creators_wins(root):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: open_store(root).create("commit", b"%d" % n), range(8)))
    assert won.count(True) == 1
    assert open_store(root).read("commit") == b"%d" % won.index(True)


def test_a_creator_whose_answer_was_lost_still_knows_that_it_won(proxy, root):
    proxy.rule = servers.first(1, "lose", lambda method, path: method == "PUT")
    assert quick(root).create("commit", b"mine") is True
    proxy.rule = servers.first(1, "lose", lambda method, path: method == "PUT")
    assert quick(root).create("commit", b"mine") is False  # equal bytes, another writer


def test_a_conflict_of_two_conditional_writes_is_tried_again(proxy, root):
    proxy.rule = servers.first(2, "409", lambda method, path: method == "PUT")
    assert quick(root).create("commit", b"mine") is True


@pytest.mark.parametrize("fault", ["500", "503", "drop"])
def test_passing_faults_of_the_store_are_waited_out(proxy, root, fault):
    objects = quick(root)
    for call in (
        lambda: objects.put("a", b"data"),
        lambda: objects.create("b", b"data"),
        lambda: objects.read("a", 1, 2),
        lambda: objects.list(),
        lambda: objects.size("a"),
        lambda: objects.delete("b"),
    ):
        proxy.rule = servers.first(3, fault)
        call()
    assert contents(objects) == {"a": b"data"}


def test_retries_end_with_one_clear_line(proxy, root):
    proxy.rule = lambda method, path: "503"
    with pytest.raises(UserError, match="does not answer or is overloaded"):
        quick(root, attempts=3).read("a")
    assert len(proxy.requests) == 3
    proxy.rule = lambda method, path: "403"
    with pytest.raises(UserError, match="access denied"):
        quick(root).read("a")
    proxy.rule = lambda method, path: None
    for call in (
        lambda s: s.read("a"),
        lambda s: s.put("a", b"x"),
        lambda s: s.list(),
        lambda s: s.is_empty(),
    ):
        with pytest.raises(UserError, match="no such bucket"):
            call(quick("s3://nowhere-at-all/x"))


@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_a_failing_upload_leaves_no_object_and_no_parts(server, proxy, root, tmp_path, kind):
    path = tmp_path / "big"
    path.write_bytes(np.random.default_rng(0).bytes(12 << 20))
    data = path if kind == "file" else path.read_bytes()
    objects = quick(root, part_bytes=5 << 20, attempts=2)
    proxy.rule = lambda method, path: "503" if method == "PUT" and "partNumber=2" in path else None
    with pytest.raises(UserError):
        objects.put("shard.tar", data)
    assert objects.list() == [] and not objects.exists("shard.tar")
    assert "Uploads" not in server[1].list_multipart_uploads(Bucket=servers.BUCKET)
    proxy.rule = servers.first(1, "503", lambda method, path: "partNumber=2" in path)
    assert objects.put("shard.tar", data) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert objects.read("shard.tar") == path.read_bytes()


def test_put_notices_bytes_that_changed_on_the_way(proxy, root):
    proxy.rule = servers.first(1, "damage", lambda method, path: method == "PUT")
    objects = quick(root)
    objects.put("a", b"data")
    assert objects.read("a") == b"data"
    proxy.rule = lambda method, path: "damage" if method == "PUT" else None
    with pytest.raises((UserError, OSError)):
        objects.put("b", b"data")


def test_a_unit_committed_twice_is_one_commit_and_the_bytes_of_a_folder(root, tmp_path):
    folder, objects = Store(tmp_path / "folder"), open_store(root)
    with ThreadPoolExecutor(2) as pool:
        commits = list(pool.map(lambda _: build(open_store(root), tmp_path / "scratch"), range(2)))
    assert commits[0] == commits[1] == build(folder, tmp_path / "scratch")
    assert contents(objects) == contents(folder)
    assert orphans(objects) == [] and verify(root, deep=True).clean
    assert committed_sources(objects) == committed_sources(folder)


def test_readers_see_in_s3_what_they_see_in_a_folder(root, tmp_path):
    folder = tmp_path / "folder"
    build(Store(folder), tmp_path / "scratch")
    build(open_store(root), tmp_path / "scratch")
    for arguments in ({}, {"modality": "ct"}, {"split": "train"}, {"columns": ["patient"], "split": "val"}):
        assert catalog.load(root, **arguments).equals(catalog.load(folder, **arguments))
    assert catalog.counts(root) == catalog.counts(folder)
    assert catalog.quarantine(root).equals(catalog.quarantine(folder))
    row = catalog.load(root).to_pylist()[0]
    place = (row["modality"], row["shard"], row["offset"], row["size"])
    assert ShardReader(root).read(*place) == ShardReader(folder).read(*place)
    with pytest.raises(FileNotFoundError):
        ShardReader(root).read(row["modality"], "gone.tar", 0, 1)
    with pytest.raises(ValueError, match="shorter"):
        ShardReader(root).read(*place[:2], row["offset"], 1 << 20)


def test_verify_finds_damage_in_s3(root, tmp_path):
    objects = open_store(root)
    commit = build(objects, tmp_path / "scratch")
    shard = commit.shards[0].path
    data = objects.read(shard)
    objects.put(shard, data[:700] + bytes([data[700] ^ 1]) + data[701:])
    assert verify(root).clean
    assert {p.code for p in verify(root, deep=True).problems} >= {"sha256_differs"}
    objects.put(shard, data[: -2 * 512])
    assert {p.code for p in verify(root).problems} == {"size_differs", "tar_damaged"}
    objects.delete(shard)
    assert [p.code for p in verify(root).problems] == ["file_missing"]


def test_a_writer_that_fails_at_any_call_loses_nothing_and_doubles_nothing(proxy, tmp_path, monkeypatch):
    build(Store(tmp_path / "folder"), tmp_path / "scratch", 1)
    expected = contents(Store(tmp_path / "folder"))
    for fail_at in count():
        root = f"s3://{servers.BUCKET}/crash/{fail_at}"
        calls = count()

        def before(operation, calls=calls, fail_at=fail_at):
            # "answer" comes after a request that the store has carried out
            if operation in ("put", "create", "answer") and next(calls) == fail_at:
                raise ConnectionError("killed here")

        monkeypatch.setattr(store.OPS, "before", before)
        try:
            build(open_store(root), tmp_path / "scratch", 1)
            break
        except ConnectionError:
            monkeypatch.setattr(store.OPS, "before", lambda operation: None)
        objects = open_store(root)  # another than the killed one
        if objects.exists(NAME):
            assert verify(objects, deep=True).clean  # before the rerun too: all of a unit, or nothing
        build(objects, tmp_path / "scratch", 1)
        assert contents(objects) == expected
        assert verify(objects, deep=True).clean and sweep(objects) == []
    assert fail_at == 2 * (1 + 5 + 1)  # dataset.json; two tars, two catalogues, a quarantine; the commit


def test_dicom_files_to_s3_and_back(root, tmp_path, monkeypatch):
    for number in range(3):
        files.write(tmp_path / "in" / f"{number}.dcm", files.grey(seed=number), number=number, patient="P1")
    (tmp_path / "in" / "notes.txt").write_bytes(b"no image")
    results = {}
    for where in (root, str(tmp_path / "out")):
        settings = files.config(tmp_path / "in", where)
        check_output(settings)
        planned = files.units(settings)
        results[where] = [run_unit(u, settings, files.NAMES, where, tmp_path / "scratch") for u in planned]
        again = [run_unit(u, settings, files.NAMES, where, tmp_path / "scratch") for u in planned]
        assert [r.samples for r in again] == [r.samples for r in results[where]]
        assert files.units(settings) == []  # nothing is left to do
    report = verify(root, deep=True)
    assert report.clean and report.samples == 3 and not report.orphans
    assert contents(open_store(root)) == contents(Store(tmp_path / "out"))
    assert len(list_commits(open_store(root))) == len(results[root])
    for row in catalog.load(root).to_pylist():
        assert (
            len(ShardReader(root).read(row["modality"], row["shard"], row["offset"], row["size"]))
            == row["size"]
        )


def test_an_output_prefix_of_somebody_else_is_refused(root, tmp_path):
    open_store(root).put("theirs", b"x")
    with pytest.raises(UserError, match="not empty and no dataset"):
        check_output(load_config({"sources": [str(tmp_path)], "output": root}))


def test_urls_survive_pathlib_and_the_command_line(tmp_path, monkeypatch):
    assert location(Path("s3://bucket/a/b/")) == location("s3:/bucket/a/b") == "s3://bucket/a/b"
    assert location("gcs://bucket") == "gs://bucket"
    assert is_url("s3://b/x") and is_url(Path("gs://b")) and not is_url("/data/s3:/x") and not is_url("a:b/c")
    assert location("x") == str(Path("x").absolute())
    for bad in ("s3://", "http://host/x", "s3://b/../x", "s3://b//x", "memory://x", "s3://b/x?versionId=1"):
        with pytest.raises(UserError, match="s3://BUCKET/PREFIX"):
            location(bad)
    assert build_config([tmp_path], Path("s3://bucket/out")).output == "s3://bucket/out"


def test_a_dataset_in_a_store_needs_a_key_that_is_given(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDSWAV_KEY", raising=False)
    assert not keys.must_be_made(None, "s3://bucket/out")
    with pytest.raises(UserError, match="--key FILE or MEDSWAV_KEY"):
        keys.read(None, "s3://bucket/out")


@pytest.mark.parametrize(
    ("module", "root", "extra"), [("s3fs", "s3://b/x", "s3"), ("gcsfs", "gs://b/x", "gcs")]
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, root, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'medswav\[{extra}\]'"):
        open_store(root)
