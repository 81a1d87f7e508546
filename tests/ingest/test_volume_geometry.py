"""Series become volumes with the order, spacing and affine of highdicom, and are broken where it says so."""

import os
import random
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from ingest.dicom.geometry import frame_geometry
from ingest.dicom.volume import Slice, normal_of, volumes

highdicom = pytest.importorskip("highdicom")
DATA = Path(os.environ.get("MEDSWAV_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "dicom"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def turned(a, b, c):
    a, b, c = np.radians((a, b, c))
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return tuple(round(float(v), 8) for v in (x @ y @ z)[:, :2].T.ravel())


def stack(orientation=AXIAL, distances=range(8), step=2.5, shear=0.0, **changes):
    """Slices at `distances` steps along the normal, shifted down the columns by shear mm a step."""
    normal, down = normal_of(orientation), np.array(orientation[3:])
    places = [np.array([-120.5, 33.25, 70.0]) + k * (step * normal + shear * down) for k in distances]
    common = {
        "series": "1.2",
        "frame_of_reference": "1.3",
        "orientation": orientation,
        "spacing": (0.7, 0.6),
        "rows": 64,
        "columns": 48,
    } | changes
    return [Slice(ref=n, position=tuple(float(v) for v in p), **common) for n, p in enumerate(places)]


def theirs(slices):
    """(spacing, index of each slice) of highdicom, None and None for no volume."""
    datasets = []
    for one in slices:
        data = Dataset()
        data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        data.SOPInstanceUID, data.SeriesInstanceUID = f"1.2.{one.ref + 1}", one.series
        data.FrameOfReferenceUID = one.frame_of_reference
        data.Rows, data.Columns, data.PixelSpacing = one.rows, one.columns, list(one.spacing)
        data.ImageOrientationPatient, data.ImagePositionPatient = list(one.orientation), list(one.position)
        datasets.append(data)
    return highdicom.spatial.get_series_volume_positions(
        datasets,
        index_convention="RD",
        perpendicular_tol=5e-5,  # 1 - cos(atan(0.01)): 1 % sideways
    )


def agrees(volume):
    """Hold a volume to highdicom; whether it is a regular one."""
    shuffled = list(volume.slices)
    random.Random(3).shuffle(shuffled)
    spacing, indices = theirs(shuffled)
    assert volume.regularly_spaced_3d_volume == (spacing is not None)
    if spacing is None:
        return False
    assert volume.slice_spacing_mm == pytest.approx(spacing, rel=1e-4)
    assert [shuffled[indices.index(n)].ref for n in range(len(shuffled))] == [s.ref for s in volume.slices]
    first, last = volume.slices[0], volume.slices[-1]
    grid = highdicom.VolumeGeometry.from_attributes(
        image_position=last.position,
        image_orientation=first.orientation,
        rows=first.rows,
        columns=first.columns,
        pixel_spacing=first.spacing,
        spacing_between_slices=spacing,
        number_of_frames=len(volume.slices),
        coordinate_system="PATIENT",
    )
    # Its slices run against the normal; its first is our last.
    expected = grid.flip_spatial(0).affine[:3]
    assert np.allclose(volume.affine[:, :3], expected[:, :3], atol=1e-2)  # real positions have few digits
    corners = np.array([[0, 0, 0, 1], [len(volume.slices) - 1, 0, 0, 1]]).T
    assert np.allclose(volume.affine @ corners, np.stack([first.position, last.position], 1), atol=1e-6)
    return True


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, 0, 0), (10, -35, 70), (90, 0, 180)])
@pytest.mark.parametrize("distances", [range(8), range(7, -1, -1), [3, 0, 6, 1, 5, 2, 4]])
def test_oblique_reversed_and_shuffled_series_are_ordered_as_highdicom_orders_them(degrees, distances):
    (volume,) = volumes(stack(turned(*degrees), distances))
    assert agrees(volume)
    assert volume.gantry_tilt_degrees == pytest.approx(0, abs=1e-4)
    if degrees[1:] == (0, 0):
        assert volume.obliquity_degrees == pytest.approx(degrees[0], abs=1e-4)


def test_a_gap_and_a_repeated_slice_leave_no_affine():
    (gapped,) = volumes(stack(distances=[0, 1, 2, 4, 5]))
    assert not agrees(gapped) and gapped.affine is None
    assert gapped.unique_slice_positions and not gapped.uniform_slice_spacing
    (repeated,) = volumes(stack(distances=[0, 1, 2, 2, 3]))
    assert not agrees(repeated) and repeated.affine is None and not repeated.unique_slice_positions


@pytest.mark.parametrize(("jitter", "sound"), [(0.005, True), (0.03, False)])
def test_one_percent_of_the_spacing_is_tolerated(jitter, sound):
    (volume,) = volumes(stack(distances=[0, 1, 2, 3 + jitter, 4, 5]))
    assert agrees(volume) is sound


def test_a_tilt_is_seen_in_the_vectors_and_keeps_its_sheared_affine():
    slices = stack(shear=2.5 * np.tan(np.radians(12)))
    (volume,) = volumes(slices)
    assert not agrees(volume) and not volume.consistent_in_plane and volume.uniform_slice_spacing
    assert volume.gantry_tilt_degrees == pytest.approx(12, abs=1e-6)
    assert volume.slice_spacing_mm == pytest.approx(2.5)
    assert np.allclose(volume.affine @ (5, 0, 0, 1), slices[5].position)


def test_slices_of_other_orientation_size_spacing_or_echo_are_other_volumes():
    parts = [
        stack(),
        stack(turned(90, 0, 0)),
        stack(rows=32),
        stack(spacing=(0.9, 0.9)),
        stack(phase=(2, 80.0)),
        stack(series="1.9"),
        stack(frame_of_reference="1.8"),
    ]
    mixed = [s for part in parts for s in part]
    random.Random(1).shuffle(mixed)
    found = volumes(mixed)
    assert len(found) == 7 and all(agrees(v) and len(v.slices) == 8 for v in found)
    by_series = {(v.slices[0].series, v.slices[0].frame_of_reference): v for v in found}
    mixture = by_series["1.2", "1.3"]
    assert not (mixture.single_orientation or mixture.consistent_pixel_spacing)
    assert not mixture.consistent_image_dimensions
    assert by_series["1.9", "1.3"].single_orientation and by_series["1.9", "1.3"].consistent_pixel_spacing


def test_repeated_acquisitions_are_volumes_of_their_own_and_step_and_shoot_is_one():
    twice = stack(passes=("x", 1)) + stack(passes=("x", 2))
    assert [len(v.slices) for v in volumes(twice)] == [8, 8]
    each = [s for n in range(4) for s in stack(distances=[n], passes=(n,))]
    (one,) = volumes(each)
    assert agrees(one)


def test_without_position_orientation_or_spacing_there_is_no_affine_and_a_lone_slice_is_no_volume():
    for missing in ("orientation", "spacing"):
        (volume,) = volumes([replace(s, **{missing: None}) for s in stack()])
        assert volume.affine is None and not volume.regularly_spaced_3d_volume
    lost = [replace(s, position=None) for s in stack()]
    assert volumes(lost)[0].affine is None
    parallel = [replace(s, orientation=(1.0, 0, 0, 1.0, 0, 0)) for s in stack()]
    assert volumes(parallel)[0].affine is None
    assert volumes(stack(distances=[0])) == [] == volumes([])


@pytest.mark.skipif(not DATA.exists(), reason="the folder of real test data is absent")
def test_real_series_are_volumes_where_highdicom_says_so():
    series = defaultdict(list)
    for path in sorted(DATA.rglob("*")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                data = pydicom.dcmread(path, stop_before_pixels=True)
                if data.Modality not in ("CT", "MR") or int(data.get("NumberOfFrames") or 1) > 1:
                    continue
                columns = frame_geometry(data, 0)
                spacing = columns["spacing_row_mm"], columns["spacing_column_mm"]
                place, turn = columns["position_mm"], columns["orientation"]
                if None in (*spacing, place, turn):
                    continue
            except Exception:  # noqa: BLE001 - a broken file of the manifest, refused long before this
                continue
        names = (
            path.parent.as_posix(),
            str(data.get("SeriesInstanceUID", "")),
        )  # a series in several syntaxes: folders
        uid = str(data.get("FrameOfReferenceUID", ""))
        phase = (data.get("EchoTime"),)
        series[names].append(
            Slice(
                len(series[names]),
                names[1],
                uid,
                tuple(turn),
                tuple(place),
                spacing,
                data.Rows,
                data.Columns,
                phase,
            )
        )
    found = [v for slices in series.values() for v in volumes(slices)]
    regular = sum(agrees(v) for v in found if len(v.slices) > 1)
    assert regular >= 3 and len(found) > regular, (regular, len(found))
