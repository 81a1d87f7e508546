"""A store writes all or nothing, creates once, never leaves its root, and names the disk's errors."""

import errno
import os

import pytest

from shards.errors import UserError
from shards.store import OPS, Store
from tests.crash.killer import failing


def test_put_replaces_and_create_does_not(tmp_path):
    store = Store(tmp_path / "root")
    store.put("a/b.bin", b"one")
    store.put("a/b.bin", b"two")
    assert store.create("a/c.bin", b"one") is True
    assert store.create("a/c.bin", b"two") is False
    assert (store.read("a/b.bin"), store.read("a/c.bin")) == (b"two", b"one")
    assert store.list() == store.list("a") == ["a/b.bin", "a/c.bin"]
    assert store.temporaries() == []
    assert store.read("a/b.bin", 1, 1) == b"w"


def test_put_copies_a_local_file_and_returns_its_sha256(tmp_path):
    (tmp_path / "local").write_bytes(b"x" * (20 << 20))
    store = Store(tmp_path / "root")
    assert store.put("f", tmp_path / "local") == store.put("g", b"x" * (20 << 20))
    assert store.size("f") == store.size("g") == 20 << 20


def test_temporary_files_of_others_are_not_listed(tmp_path):
    store = Store(tmp_path)
    store.put("a/b", b"")
    (tmp_path / "a" / ".tmp-1-b").write_bytes(b"half")
    assert store.list() == ["a/b"]
    assert store.temporaries() == ["a/.tmp-1-b"]


def test_a_link_whose_answer_was_lost_counts_as_created(tmp_path, monkeypatch):
    def link(source, target):
        os.link(source, target)
        raise FileExistsError

    monkeypatch.setattr(OPS, "link", link)
    assert Store(tmp_path).create("a", b"x") is True


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", ""])
def test_names_cannot_leave_the_root(tmp_path, name):
    with pytest.raises(ValueError, match="inside a store"):
        Store(tmp_path).read(name)


def test_delete_is_idempotent_and_missing_files_are_file_not_found(tmp_path):
    store = Store(tmp_path)
    store.delete("none")
    with pytest.raises(FileNotFoundError):
        store.read("none")
    assert store.exists("none") is False
    assert store.list("none") == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "hard links"),
        (errno.EIO, "input/output error"),
    ],
)
def test_errors_of_the_disk_are_one_line_with_the_folder(tmp_path, number, words):
    store = Store(tmp_path)
    with failing(0, number), pytest.raises(UserError, match=words) as error:
        store.put("a", b"x")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert store.list() == store.temporaries() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_a_clear_error(tmp_path):
    (tmp_path / "root").mkdir(mode=0o555)
    with pytest.raises(UserError, match="permission denied"):
        Store(tmp_path / "root").put("a/b", b"x")


def test_a_root_below_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        Store(tmp_path / "file").put("a", b"x")
