"""Archives are read as streams within bounds; what is unsafe in them is a refusal with a reason."""

import io
import shutil
import tarfile
import zipfile

import pytest

from ingest.discover import inventory, unchanged
from shards import catalog
from tests.ingest.files import config, grey, ingest, write

SUFFIXES = ["zip", "tar", "gztar", "bztar", "xztar"]
WHERE = {"key", "source", "unit", "shard", "offset", "size", "split"}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "plain"
    for number in range(4):
        write(root / "Mustermann^Eva" / f"m{number}", grey(seed=number), number=number)
    write(root / "c", grey("int16", 12), "CT", number=7, patient="P2")
    (root / "note.txt").write_text("x")
    return root


def packed(folder, kind, name="x"):
    target = folder.parent / kind
    target.mkdir(exist_ok=True)
    shutil.make_archive(str(target / name), kind, folder)
    return target


def rows(out):
    wanted = sorted(catalog.load(out).to_pylist(), key=lambda row: row["pixel_digest"])
    return [{k: v for k, v in row.items() if k not in WHERE} for row in wanted]


@pytest.mark.parametrize("kind", SUFFIXES)
def test_an_archive_gives_the_samples_of_the_folder_it_was_made_of(folder, tmp_path, kind):
    ingest(folder, tmp_path / "a")
    ingest(packed(folder, kind), tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert len(rows(tmp_path / "a")) == 5
    reasons = [row["reason"] for row in catalog.quarantine(tmp_path / "b").to_pylist()]
    assert reasons == ["not_an_image"]
    for path in (tmp_path / "b").rglob("*"):
        assert "Mustermann" not in path.name
        assert path.is_dir() or b"Mustermann" not in path.read_bytes()


def test_the_decoder_process_reads_members(folder, tmp_path):
    source = packed(folder, "gztar")
    ingest(source, tmp_path / "a", sandbox="process")
    assert len(rows(tmp_path / "a")) == 5


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_changed_member_is_noticed(folder, kind, tmp_path):
    source = packed(folder, kind)
    entries = inventory(config(source, tmp_path / "out"))
    assert all(unchanged(entry) for entry in entries)
    write(folder / "c", grey("int16", 12, seed=9), "CT", number=77, patient="P3")
    packed(folder, kind)
    assert not all(unchanged(entry) for entry in entries)


def hints(source, tmp_path, **settings):
    write(source / "good", number=99)
    found = inventory(config(source, tmp_path / "out", **settings))
    return sorted(entry.hint for entry in found if entry.member)


def test_unsafe_members_of_a_tar_are_refused_by_reason(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    with tarfile.open(source / "x.tar", "w") as tar:
        for name, kind in (
            ("../up", tarfile.REGTYPE),
            ("/etc/passwd", tarfile.REGTYPE),
            ("link", tarfile.SYMTYPE),
            ("hard", tarfile.LNKTYPE),
            ("null", tarfile.CHRTYPE),
            ("pipe", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert hints(source, tmp_path) == ["unsafe_member"] * 6


def test_unsafe_encrypted_and_nested_members_of_a_zip_are_refused_by_reason(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a", b"a")
    with zipfile.ZipFile(source / "x", "w") as archive:
        archive.writestr("../up", b"a")
        archive.writestr("inner.zip", inner.getvalue())
        archive.writestr("secret", b"s" * 20)
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    data = bytearray((source / "x").read_bytes())
    at = data.rindex(b"secret") - 46
    data[at + 8] |= 1
    (source / "x").write_bytes(data)
    assert hints(source, tmp_path) == ["encrypted", "nested_archive", "unsafe_member", "unsafe_member"]


def test_bombs_are_refused_by_size_ratio_and_number(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(source / "z", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("f", "w") as file:
        for _ in range(100):
            file.write(zeros)
    assert hints(source, tmp_path) == ["too_large"]
    (source / "z").unlink()
    with tarfile.open(source / "t", "w:gz") as tar:
        info = tarfile.TarInfo("f")
        info.size = 100 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    assert "too_large" in hints(source, tmp_path)
    (source / "t").unlink()
    with zipfile.ZipFile(source / "n", "w") as archive:
        for number in range(30):
            archive.writestr(str(number), b"x")
    assert hints(source, tmp_path, max_members=20) == ["too_large"]


@pytest.mark.parametrize("kind", SUFFIXES)
def test_an_archive_cut_anywhere_is_a_refusal_and_never_an_error(folder, kind, tmp_path):
    source = packed(folder, kind)
    path = next(source.iterdir())
    data = path.read_bytes()
    write(source / "good", number=99)
    for part in range(1, 24):
        path.write_bytes(data[: len(data) * part // 24])
        found = inventory(config(source, tmp_path / "out"))
        assert any(entry.hint for entry in found if entry.relative != "good")
