"""Tars are byte-reproducible, their index is exact, and a cut one is never taken for a shorter one."""

import hashlib
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from shards.tar import ShardReader, ShardWriter, list_members, scan_members

SAMPLES = {f"key{n}": {"j2c": bytes([n]) * (700 * n + 1), "json": b'{"n":%d}\n' % n} for n in range(4)}


def write(path):
    with ShardWriter(path) as writer:
        return {key: writer.add(key, files) for key, files in SAMPLES.items()}


def test_golden_shard_is_byte_identical(tmp_path):
    write(tmp_path / "a.tar")
    assert (
        hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
        == "f19fa79a7c8981728845056b2bcb63f884d2764e9af266e3eb05935e0d3d0e9f"
    )


def test_places_lead_to_the_data_and_agree_with_the_index_and_with_tarfile(tmp_path):
    places = write(tmp_path / "a.tar")
    raw = (tmp_path / "a.tar").read_bytes()
    index = {name: (offset, size) for name, offset, size in list_members(tmp_path / "a.tar")}
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == list(index)
        assert all(m.mtime == m.uid == m.gid == 0 for m in tar.getmembers())
        for key, files in SAMPLES.items():
            for extension, data in files.items():
                offset, size = places[key][extension]
                assert raw[offset : offset + size] == data == tar.extractfile(f"{key}.{extension}").read()
                assert index[f"{key}.{extension}"] == (offset, size)


@pytest.mark.parametrize("length", [1, 26, 95])
def test_headers_are_those_of_tarfile(tmp_path, length):
    for size in (0, 1, 511, 512, 5000):
        with ShardWriter(tmp_path / f"{size}.tar") as writer:
            writer.add("k" * length, {"json": bytes(size)})
        info = tarfile.TarInfo("k" * length + ".json")
        info.size = size
        assert (tmp_path / f"{size}.tar").read_bytes()[:512] == info.tobuf(tarfile.USTAR_FORMAT)
        assert list_members(tmp_path / f"{size}.tar") == [(info.name, 512, size)]


def test_a_name_that_no_header_holds_is_an_error(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer, pytest.raises(ValueError, match="too long"):
        writer.add("k" * 150, {"json": b""})


def test_a_header_with_a_bit_changed_is_refused_or_read_as_it_was(tmp_path):
    write(tmp_path / "a.tar")
    raw, expected = (tmp_path / "a.tar").read_bytes(), list_members(tmp_path / "a.tar")
    refused = 0
    for place in range(512):
        for bit in (1, 16, 128):
            changed = bytearray(raw)
            changed[place] ^= bit
            try:
                assert scan_members(io.BytesIO(changed)) == expected
            except ValueError:
                refused += 1
    assert refused > 1400  # all but some spellings of the check sum


@pytest.mark.parametrize("key", ["1.2.840.10008", "a/b", "", "..", "a b", "ä"])
def test_keys_that_webdataset_would_cut_or_merge_are_refused(tmp_path, key):
    with ShardWriter(tmp_path / "a.tar") as writer, pytest.raises(ValueError, match="sample key"):
        writer.add(key, {"j2c": b""})


def test_a_key_twice_is_refused(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("a", {"j2c": b""})
        with pytest.raises(ValueError, match="twice"):
            writer.add("a", {"j2c": b""})


def test_a_tar_cut_at_any_block_is_refused(tmp_path):
    write(tmp_path / "a.tar")
    raw = (tmp_path / "a.tar").read_bytes()
    for end in [*range(0, len(raw), 512), len(raw) - 1]:
        (tmp_path / "cut.tar").write_bytes(raw[:end])
        with pytest.raises(ValueError, match="cut off"):
            list_members(tmp_path / "cut.tar")


def test_a_tar_left_by_an_exception_is_refused(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("a", {"j2c": b"x"})
        raise RuntimeError
    with pytest.raises(ValueError, match="cut off"):
        list_members(tmp_path / "a.tar")


def test_links_and_damaged_headers_are_refused(tmp_path):
    link = tarfile.TarInfo("a.j2c")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(link)
    for raw, words in [(buffer.getvalue(), "regular"), (b"x" * 2048, "damaged header")]:
        (tmp_path / "bad.tar").write_bytes(raw)
        with pytest.raises(ValueError, match=words):
            list_members(tmp_path / "bad.tar")


def test_the_reader_reads_by_offset_with_few_open_files_from_many_threads(tmp_path):
    folder = tmp_path / "shards" / "ct"
    folder.mkdir(parents=True)
    places = {name: write(folder / name) for name in ("a.tar", "b.tar", "c.tar")}
    reader = ShardReader(tmp_path, open_files=1)
    wrong = []

    def work():
        for _ in range(50):
            for name, keys in places.items():
                for key, files in keys.items():
                    if reader.read("ct", name, *files["j2c"]) != SAMPLES[key]["j2c"]:
                        wrong.append((name, key))

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(work) for _ in range(4)]:
            future.result()  # raises what the thread raised
    reader.close()
    assert not wrong
    with pytest.raises(ValueError, match="shorter"):
        reader.read("ct", "a.tar", 0, 10**6)
    with pytest.raises(FileNotFoundError):
        reader.read("ct", "none.tar", 0, 1)
