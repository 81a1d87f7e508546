"""Masks of a table: run lengths, and NIfTI volumes that are cut at the slices by their geometry."""

import cv2
import nibabel as nib
import numpy as np
import pytest

from ingest import run_lengths
from ingest.labels import join_labels
from ingest.synthetic import metastases
from shards import catalog
from tests.ingest.files import NAMES, ingest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three patients with slices of unequal sides, ingested as volumes too; the truth by instance UID."""
    folder = tmp_path_factory.mktemp("masks")
    truth = metastases.build(folder / "source", 3, seed=1, workers=1, slices=(6, 7), side=(84, 88))
    ingest(folder / "source", folder / "out", outputs=("slices", "volumes"))
    return folder, truth


def stored(out, name):
    rows = catalog.labels(out, name).to_pylist()
    return {row["key"]: cv2.imdecode(np.frombuffer(row["mask"], np.uint8), -1) for row in rows}


def test_run_lengths_come_back_and_wrong_ones_are_no_mask():
    random = np.random.default_rng(0)
    for shape in ((1, 1), (3, 4), (17, 9)):
        mask = random.random(shape) < 0.4
        assert (run_lengths.decode(run_lengths.encode(mask)) == mask).all()
    assert run_lengths.encode(np.array([[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]])) == "3x4:5 2 8 1"
    assert run_lengths.decode("3x4:").sum() == 0
    for text in ("3x4:5", "3x4:5 2 6 1", "3x4:11 2", "3x4:5 0", "0x4:", "3x4: 5 2", "m.png", "99999x99999:"):
        assert run_lengths.decode(text) is None, text
    assert run_lengths.decode("9x9:" + "1" * 5000 + "x") is None


def test_run_lengths_of_another_size_are_not_taken(made, tmp_path):
    folder, truth = made
    name = next(s.instance for s in truth if s.lesions)
    table = tmp_path / "m.csv"
    shown = next(s for s in truth if s.lesions and s.instance != name)
    table.write_text(f"SOPInstanceUID,mask\n{name},5x5:3 2\n{shown.instance},{shown.mask}\n")
    result = join_labels(folder / "out", table, NAMES, kind="masks", name="few")
    assert result.num_rows == 1 and result.schema.metadata[b"misplaced"] == b"1"


def test_a_nifti_mask_gives_the_masks_that_the_run_lengths_give(made, tmp_path):
    """Of the same series, with its axes the other way round and in another order."""
    folder, truth = made
    out = folder / "out"
    join_labels(out, folder / "source" / metastases.MASKS_CSV, NAMES, kind="masks", name="masks")
    expected = stored(out, "masks")
    assert len(expected) == len(truth) and sum(m.any() for m in expected.values()) > 2
    lines = ["PatientID,mask"]
    rows = catalog.load(out, "mr_volumes").to_pylist()
    by_key = {row["key"]: row for row in catalog.load(out, "mr").to_pylist()}
    for number, row in enumerate(rows):
        volume = np.stack([expected[key] for key in row["slice_keys"]])  # slice, row, column
        affine = np.vstack([np.reshape(row["affine"], (3, 4)), [0, 0, 0, 1]])
        image = nib.Nifti1Image(volume.astype(np.int16), np.diag([-1, -1, 1, 1]) @ affine)
        turned = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])) if number else image
        nib.save(turned, tmp_path / f"{number}.nii.gz")
        patient = by_key[row["slice_keys"][0]]["patient"]
        name = next(p for p in {f.file.split("/")[1] for f in truth} if patient == _patient(folder, p))
        lines.append(f"{_number(folder, name)},{number}.nii.gz")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    result = join_labels(out, tmp_path / "m.csv", NAMES, kind="masks", name="nifti")
    assert result.schema.metadata[b"misplaced"] == b"0"
    found = stored(out, "nifti")
    assert found.keys() == expected.keys()
    assert all(((found[key] > 0) == (expected[key] > 0)).all() for key in found)

    moved = nib.load(tmp_path / "0.nii.gz")
    shift = moved.affine.copy()
    shift[:3, 3] += 0.4
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), shift), tmp_path / "0.nii.gz")
    result = join_labels(out, tmp_path / "m.csv", NAMES, kind="masks", name="nifti")
    assert result.schema.metadata[b"misplaced"] == b"6"  # the slices of that volume, none guessed


def _number(folder, name):
    import pydicom

    return pydicom.dcmread(next((folder / "source" / "mr" / name).rglob("*.dcm"))).PatientID


def _patient(folder, name):
    return NAMES.id("patient", _number(folder, name))
