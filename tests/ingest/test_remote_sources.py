"""A bucket as a source is what its local copy is: the same dataset, the same refusals, nothing lost."""

import os
import shutil
import tempfile
from itertools import count
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest

from ingest import copies, sources
from ingest.convert import SourceChangedError, run_unit
from ingest.discover import inventory
from ingest.limits import Meter
from ingest.places import check_output
from orchestration.cli import ingest_main
from shards import catalog
from shards.errors import UserError
from shards.objects import ObjectStore
from tests.ingest.files import NAMES, config, grey, ingest, tree, units, write
from tests.shards import servers

_numbers = count()


@pytest.fixture(scope="module")
def server():
    with servers.moto() as (proxy, client):
        yield proxy, client


@pytest.fixture
def proxy(server, monkeypatch):
    servers.choose(monkeypatch, server[0].url)
    # The same number of attempts, without the pauses.
    stores: dict[str, ObjectStore] = {}
    quick = lambda root: stores.setdefault(root, ObjectStore(root, first_wait=0.001))  # noqa: E731
    monkeypatch.setattr(sources, "bucket_store", quick)
    yield server[0]
    server[0].rule = lambda method, path: None
    server[0].requests.clear()


@pytest.fixture
def url(proxy):
    return f"s3://{servers.BUCKET}/from/{next(_numbers)}"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Every kind of input: DICOM with a short and a long header, NIfTI, listed images, archives, no image."""
    root = tmp_path / "source"
    for number in range(3):
        write(root / "Mustermann^Eva" / f"m{number}", grey(seed=number, size=(200, 150)), number=number)
    write(root / "long", number=9, patient="P3", AdditionalPatientHistory="x" * 60_000)
    nibabel.save(nibabel.Nifti1Image(grey("int16", 12, (90, 90, 80)), np.eye(4)), root / "v.nii")
    nibabel.save(nibabel.Nifti1Pair(grey("int16", 12, (80, 90, 10)), np.eye(4)), root / "w.img")
    cv2.imwrite(str(root / "p.png"), grey("uint8", 8))
    cv2.imwrite(str(root / "unlisted.png"), grey("uint8", 8))
    (root / "images.csv").write_text("file,modality,patient\np.png,CR,P1\n./gone.png,CR,P1\n")
    (root / "note.txt").write_bytes(b"no image" * 6000)
    for number in range(3):
        write(tmp_path / "more" / f"c{number}", grey("int16", 12, seed=number), "CT", number=20 + number)
    for kind in ("zip", "gztar", "tar"):
        shutil.make_archive(str(root / f"of_{kind}"), kind, tmp_path / "more")
    return root


def upload(folder: Path, url: str) -> None:
    store = ObjectStore(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path)


def of_bucket(url: str, out: Path, **settings):
    return config(Path("/"), out, **(settings | {"sources": [url]}))


def run(url: str, out: Path, **settings) -> None:
    chosen = of_bucket(url, out, **settings)
    for unit in units(chosen):
        run_unit(unit, chosen, NAMES, out, out.parent / "scratch")


@pytest.mark.parametrize("sandbox", ["inline", "process"])
def test_a_bucket_makes_the_dataset_of_its_local_copy(folder, url, tmp_path, sandbox, monkeypatch):
    monkeypatch.setattr(copies, "_MEMORY_BYTES", 30_000)  # some copies in memory, some on the disk
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    upload(folder, url)
    ingest(folder, tmp_path / "local")
    run(url, tmp_path / "remote", sandbox=sandbox)
    assert tree(tmp_path / "local") == tree(tmp_path / "remote")
    assert catalog.load(tmp_path / "remote").num_rows == 98
    assert not list((tmp_path / "temporary").iterdir())
    held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in held if "memfd:input" in name or str(tmp_path / "temporary") in name]


def test_a_bucket_of_gcs_makes_the_dataset_of_its_local_copy(tmp_path, monkeypatch):
    for number in range(2):
        write(tmp_path / "s" / "a" / f"f{number}", grey(seed=number), number=number)
    with servers.gcs() as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        upload(tmp_path / "s", f"gs://{servers.BUCKET}/export")
        ingest(tmp_path / "s", tmp_path / "local")
        run(f"gs://{servers.BUCKET}/export", tmp_path / "remote")
    assert tree(tmp_path / "local") == tree(tmp_path / "remote")


def test_the_header_scan_takes_only_the_first_bytes_of_an_object_at_once(url, proxy, tmp_path):
    for number in range(5):
        write(tmp_path / "s" / f"f{number}", grey(size=(400, 400), seed=number), number=number)
    upload(tmp_path / "s", url)
    proxy.requests.clear()
    read = []
    with sources.limited(Meter(lambda n: read.append(n) or 0.0, 256 * 4096)):
        assert len(inventory(of_bucket(url, tmp_path / "out"))) == 5
    assert sum(read) <= 5 * (40 << 10) < 5 * 320_000
    proxy.requests.clear()
    inventory(of_bucket(url, tmp_path / "out"))
    gets = [path for method, path in proxy.requests if method == "GET" and "list-type" not in path]
    assert len(gets) == 5


@pytest.mark.parametrize("action", ["503", "500", "drop", "lose"])
def test_errors_that_pass_change_nothing(folder, url, proxy, tmp_path, action):
    upload(folder, url)
    ingest(folder, tmp_path / "local")
    proxy.rule = servers.first(4, action, lambda method, path: method == "GET")
    run(url, tmp_path / "remote")
    assert tree(tmp_path / "local") == tree(tmp_path / "remote")


@pytest.mark.parametrize(("action", "words"), [("503", "does not answer"), ("403", "access denied")])
@pytest.mark.parametrize("late", [False, True])
def test_errors_that_stay_are_one_clear_line_and_commit_nothing(url, proxy, tmp_path, action, words, late):
    write(tmp_path / "s" / "Mustermann" / "f")
    upload(tmp_path / "s", url)
    settings = of_bucket(url, tmp_path / "out")
    todo = units(settings) if late else []
    proxy.rule = servers.first(-1, action)
    with pytest.raises(UserError, match=words) as raised:
        for unit in todo:
            run_unit(unit, settings, NAMES, settings.output, tmp_path / "scratch")
        inventory(settings)
    assert "Mustermann" not in str(raised.value)
    assert not list((tmp_path / "out").glob("commits/*"))


@pytest.mark.parametrize("change", ["gone", "other"])
def test_an_object_that_goes_or_changes_leaves_its_unit_uncommitted(url, proxy, tmp_path, change):
    write(tmp_path / "s" / "f")
    upload(tmp_path / "s", url)
    settings = of_bucket(url, tmp_path / "out")
    (unit,) = units(settings)
    if change == "gone":
        ObjectStore(url).delete("f")
    else:
        ObjectStore(url).put("f", write(tmp_path / "other", number=5))
    with pytest.raises(SourceChangedError):
        run_unit(unit, settings, NAMES, settings.output, tmp_path / "scratch")
    assert not list((tmp_path / "out").glob("commits/*"))


def test_an_object_replaced_in_the_middle_of_its_copy_is_no_image(url, proxy, tmp_path):
    path = write(tmp_path / "s" / "f", grey(size=(300, 300)))
    upload(tmp_path / "s", url)
    settings = of_bucket(url, tmp_path / "out")
    (unit,) = units(settings)
    data = path.read_bytes()
    replaced = []

    def lease(number: int) -> float:
        if len(replaced) == 3:
            ObjectStore(url).put("f", data[:-4096] + bytes(4096))  # the same head and size
        replaced.append(number)
        return 0.0

    with sources.limited(Meter(lease, 4096)), pytest.raises(SourceChangedError):
        run_unit(unit, settings, NAMES, settings.output, tmp_path / "scratch")


def test_keys_that_are_no_paths_are_refused_and_not_lost(url, server, proxy, tmp_path):
    write(tmp_path / "s" / "f")
    upload(tmp_path / "s", url)
    key = url.removeprefix(f"s3://{servers.BUCKET}/")
    for odd in ("a//b", "/c"):
        server[1].put_object(Bucket=servers.BUCKET, Key=f"{key}/{odd}", Body=b"x")
    server[1].put_object(Bucket=servers.BUCKET, Key=f"{key}/folder/", Body=b"")
    run(url, tmp_path / "out")
    reasons = [row["reason"] for row in catalog.quarantine(tmp_path / "out").to_pylist()]
    assert reasons == ["unreadable"] * 2 and catalog.load(tmp_path / "out").num_rows == 1


def test_a_source_may_be_one_object_and_a_listing_has_many_pages(url, server, proxy, tmp_path, monkeypatch):
    write(tmp_path / "s" / "a" / "f")
    upload(tmp_path / "s", url)
    assert [e.relative for e in inventory(of_bucket(f"{url}/a/f", tmp_path / "out"))] == ["f"]
    key = url.removeprefix(f"s3://{servers.BUCKET}/")
    monkeypatch.setattr("shards.objects._PAGE", 3)
    for number in range(7):
        server[1].put_object(Bucket=servers.BUCKET, Key=f"{key}/many/{number}", Body=b"x")
    assert len(list(sources.objects(url, ""))) == 8


def test_the_output_is_never_read_and_never_around_a_source(url, proxy, tmp_path):
    write(tmp_path / "s" / "f")
    upload(tmp_path / "s", url)
    ObjectStore(f"{url}/out").put("dataset.json", b"{}")
    settings = of_bucket(url, Path("x"), output=f"{url}/out")
    assert [entry.relative for entry in inventory(settings)] == ["f"]
    with pytest.raises(UserError, match="source"):
        check_output(of_bucket(f"{url}/out", Path("x"), output=url))


def test_the_command_takes_buckets_and_names_what_is_wrong_with_them(url, proxy, tmp_path, capsys):
    write(tmp_path / "s" / "f")
    upload(tmp_path / "s", url)
    assert ingest_main(["plan", url]) == 0
    assert "about 1 images" in capsys.readouterr().out
    for given, words in (("s3://nosuchbucket/x", "no such bucket"), (f"{url}/nothing", "empty")):
        assert ingest_main(["plan", given]) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert ingest_main(["watch", url, str(tmp_path / "out"), "--key", os.devnull]) == 2
    assert "cron" in capsys.readouterr().err
