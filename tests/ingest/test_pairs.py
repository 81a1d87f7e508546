"""A NIfTI pair is one input, and what it becomes is what the same volume in one file becomes."""

import gzip
import os
import shutil
import struct

import nibabel
import numpy as np
import pytest

from ingest.convert import SourceChangedError, run_unit
from ingest.discover import NothingToIngestError, inventory, unchanged
from ingest.frames import Frame
from ingest.nifti_file import IN_MEMORY_BYTES
from ingest.sandbox import InlineReader
from ingest.walk import settled_files
from shards import catalog
from shards.schema import Reason
from tests.ingest.files import NAMES, config, ingest, one, read, tree, units

AFFINE = np.array([[0.8, 0, 0, -16], [0, -0.9, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1.0]])


def voxels(seed=0, shape=(40, 48, 6)):
    return np.random.default_rng(seed).integers(-500, 1000, shape).astype(np.int16)


def pair(folder, name="v", seed=0, packed=(), kind=nibabel.Nifti1Pair):
    """NAME.hdr and NAME.img; `packed`: the endings of those that are gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(kind(voxels(seed), AFFINE), folder / f"{name}.img")
    for ending in packed:
        plain = folder / f"{name}{ending}"
        plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        plain.unlink()
    return folder / f"{name}.hdr{'.gz' if '.hdr' in packed else ''}"


def listed(*sources, **settings):
    wanted = config(sources[0], sources[0].parent / "none", **settings)
    return inventory(wanted.model_copy(update={"sources": tuple(map(str, sources))}))


def image_beside(header):
    return next(p for p in header.parent.iterdir() if p.name.startswith("v.img"))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
@pytest.mark.parametrize("packed", [(), (".hdr", ".img"), (".img",), (".hdr",)])
def test_a_pair_reads_as_the_same_volume_in_one_file(tmp_path, packed, kind):
    single = {nibabel.Nifti1Pair: nibabel.Nifti1Image, nibabel.Nifti2Pair: nibabel.Nifti2Image}[kind]
    nibabel.save(single(voxels(), AFFINE), tmp_path / "one.nii")
    header = pair(tmp_path / "s", packed=packed, kind=kind)
    (entry,) = listed(tmp_path / "s")
    assert entry.path == str(header) and entry.partner == str(image_beside(header)) and not entry.hint
    assert entry.size == header.stat().st_size + image_beside(header).stat().st_size
    rules = config(tmp_path / "s", tmp_path / "out").rules()
    found = list(InlineReader(rules).read(entry.path, entry.kind, "mr", partner=entry.partner))
    expected = read(tmp_path / "one.nii", "nifti", "mr")
    assert len(found) == 6 and all(isinstance(frame, Frame) for frame in found)
    for mine, other in zip(found, expected, strict=True):
        assert np.array_equal(mine.pixels, other.pixels) and mine.columns == other.columns


def test_a_large_image_file_is_read_slab_by_slab_from_its_offset(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.nifti_file.IN_MEMORY_BYTES", 1000)
    assert IN_MEMORY_BYTES > 1000
    header = pair(tmp_path / "s")
    plain = listed(tmp_path / "s")[0]
    rules = config(tmp_path / "s", tmp_path / "out").rules()
    before = list(InlineReader(rules).read(plain.path, "nifti", "mr", partner=plain.partner))
    raw = bytearray(header.read_bytes())
    struct.pack_into("<f", raw, 108, 16.0)
    header.write_bytes(raw)
    image = image_beside(header)
    image.write_bytes(b"sixteen bytes in" + image.read_bytes())
    after = list(InlineReader(rules).read(plain.path, "nifti", "mr", partner=plain.partner))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(before, after, strict=True))


def test_the_dataset_holds_a_pair_once_and_says_what_lacks_its_other_half(tmp_path):
    source, out = tmp_path / "s", tmp_path / "out"
    pair(source / "sub-canary" / "anat")
    pair(source, "headless", seed=1).unlink()
    (pair(source, "imageless", seed=2).with_suffix(".img")).unlink()
    pair(tmp_path / "packed", seed=3)
    shutil.make_archive(str(source / "packed"), "zip", tmp_path / "packed")
    (results,) = [ingest(source, out, sandbox="process", outputs=["slices", "volumes"])]
    assert sum(result.inputs for result in results) == 5
    refused = sorted(catalog.quarantine(out)["reason"].to_pylist())
    # In an archive the other file is not looked for; an image alone is bytes of no kind.
    assert refused == ["not_an_image", "not_an_image", "partner_missing", "partner_missing"]
    assert catalog.load(out, "mr").num_rows == 6 and catalog.load(out, "mr_volumes").num_rows == 1
    written = b"".join(name.encode() + data for name, data in tree(out).items())
    assert b"canary" not in written and b"v.img" not in written and bytes(tmp_path) not in written


def test_the_image_file_is_a_part_of_the_input(tmp_path):
    source, out = tmp_path / "s", tmp_path / "out"
    image = image_beside(pair(source))
    (entry,) = listed(source)
    settings = config(source, out)
    (unit,) = units(settings)
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    assert not unchanged(entry)
    with pytest.raises(SourceChangedError):
        run_unit(unit, settings, NAMES, out, tmp_path / "scratch")
    (other,) = listed(source)
    assert other.identity != entry.identity and other.size == entry.size and unchanged(other)
    image.unlink()
    assert not unchanged(other) and listed_reasons(source) == ["partner_missing"]


def listed_reasons(source):
    return [entry.hint for entry in inventory(config(source, source.parent / "none"))]


def test_an_image_file_that_is_written_to_while_it_is_read_leaves_its_unit_open(tmp_path):
    source, out = tmp_path / "s", tmp_path / "out"
    image = image_beside(pair(source))

    class WrittenTo(InlineReader):
        def read(self, *given, **more):
            yield from super().read(*given, **more)
            os.utime(image, ns=(1, 1))

    settings = config(source, out)
    (unit,) = units(settings)
    with pytest.raises(SourceChangedError):
        run_unit(unit, settings, NAMES, out, tmp_path / "scratch", WrittenTo(settings.rules()))


def test_voxels_that_begin_like_a_dicom_file_are_no_input(tmp_path):
    image = image_beside(pair(tmp_path / "s"))
    image.write_bytes(struct.pack("<4h", 8, 5, 10, 0) + image.read_bytes()[8:])
    (entry,) = listed(tmp_path / "s")
    assert entry.kind == "nifti"


def test_either_file_of_a_pair_may_be_listed_or_given_and_it_is_one_input(tmp_path):
    source = tmp_path / "s"
    header = pair(source)
    image = image_beside(header)
    for name in (header.name, image.name):
        (source / "images.csv").write_text(f"file,modality,patient\n{name},CT,P1\n")
        (entry,) = listed(source)
        assert (entry.modality, entry.patient, entry.listed) == ("ct", "P1", True)
    (source / "images.csv").unlink()
    for given in ((header, image), (image, header), (image, source), (header,)):
        assert [(e.path, e.kind) for e in listed(*given)] == [(str(header), "nifti")], given
    with pytest.raises(NothingToIngestError):  # its header is not among the sources
        listed(image)


def test_a_pair_is_settled_when_both_files_are(tmp_path, monkeypatch):
    header = pair(tmp_path / "s")
    settings = config(tmp_path / "s", tmp_path / "out", settle_seconds=60)
    clock = [header.stat().st_ctime + 61]
    monkeypatch.setattr("ingest.walk.time.time", lambda: clock[0])
    assert len(list(settled_files(settings))) == 2
    monkeypatch.setattr("ingest.walk._image_changed", lambda path: clock[0] - 1)
    assert list(settled_files(settings)) == []


def test_a_pipe_in_the_place_of_the_image_file_is_never_opened(tmp_path):
    header = pair(tmp_path / "s")
    image = image_beside(header)
    image.unlink()
    os.mkfifo(image)
    assert listed_reasons(tmp_path / "s") == ["partner_missing", "not_an_image"]
    rules = config(tmp_path / "s", tmp_path / "out").rules()
    (refusal,) = InlineReader(rules).read(str(header), "nifti", "mr", partner=str(image))
    assert refusal.reason == Reason.PARTNER_MISSING
    assert one(header, "nifti", "mr").reason == Reason.PARTNER_MISSING


def test_a_damaged_pair_is_refused(tmp_path):
    header = pair(tmp_path / "s")
    image = image_beside(header)
    rules = config(tmp_path / "s", tmp_path / "out").rules()
    whole = image.read_bytes()
    for content in (whole[:-1], b"", gzip.compress(whole)[:-2000]):
        image.write_bytes(content)
        (refusal,) = InlineReader(rules).read(str(header), "nifti", "mr", partner=str(image))
        assert refusal.reason == Reason.UNREADABLE
