"""Spacing, position and orientation of a frame are those that highdicom finds."""

import csv
import os
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ingest.frames import Frame
from tests.ingest.files import read, write

highdicom = pytest.importorskip("highdicom")
DATA = Path(os.environ.get("MEDSWAV_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "dicom"


def affine(columns) -> np.ndarray:
    """(0, row, column) -> mm, as highdicom has it: 4 x 3 without the slice direction."""
    along, down = np.reshape(columns["orientation"], (2, 3))
    rows, cols = columns["spacing_row_mm"], columns["spacing_column_mm"]
    return np.stack([down * rows, along * cols, columns["position_mm"]], -1)


def theirs(path: Path, frame: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = highdicom.imread(path)
        if image.number_of_frames == 1:
            found = image.get_volume_geometry().affine
        else:
            plane = highdicom.spatial.ImageToReferenceTransformer.for_image(image, frame_number=frame + 1)
            # Its matrix takes (column, row) of corners; the centre of the first pixel lies half a pixel in.
            matrix = plane.affine
            origin = matrix[:3, 3] + (matrix[:3, 0] + matrix[:3, 1]) / 2
            return np.stack([matrix[:3, 1], matrix[:3, 0], origin], -1)
    return found[:3, 1:]


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, 0, 0), (10, -35, 70), (90, 0, 180)])
def test_an_oblique_frame_lies_where_highdicom_puts_it(tmp_path, degrees):
    a, b, c = np.radians(degrees)
    turn = (
        np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        @ np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        @ np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    )
    path = write(
        tmp_path / "f",
        modality="MR",
        PixelSpacing=[0.75, 0.5],
        SliceThickness=3,
        ImagePositionPatient=[-12.5, 40.25, 7],
        ImageOrientationPatient=[round(float(v), 8) for v in (*turn[:, 0], *turn[:, 1])],
        FrameOfReferenceUID="1.2.3.9",
    )
    assert np.allclose(affine(read(path)[0].columns), theirs(path, 0), atol=1e-6)


@pytest.mark.skipif(not DATA.exists(), reason="the folder of real test data is absent")
def test_real_frames_lie_where_highdicom_puts_them():
    compared = 0
    with open(DATA / "MANIFEST.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["expected"] == "ok" and r["modality"] in ("CT", "MR")]
    for row in rows:
        path = DATA / row["file"]
        frames = [i for i in read(path, allow_burned_in=True, frames_per_cine=2) if isinstance(i, Frame)][:3]
        for frame in frames:
            complete = all(frame.columns.get(n) for n in ("orientation", "position_mm", "spacing_row_mm"))
            if not complete:
                continue
            try:
                expected = theirs(path, frame.index)
            except Exception:  # noqa: BLE001 - highdicom reads standard files only: nothing to hold this one to
                assert pydicom.dcmread(path, stop_before_pixels=True)
                continue
            assert np.allclose(affine(frame.columns), expected, atol=1e-4), row["file"]
            compared += 1
    assert compared > 40
