"""A head CT of any size, at any place, to the box: where the head comes to lie, and what is no head."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.volumes.heads import Head, make
from trainer.augment.head import find_head, largest_component
from trainer.volumes import BOX, affine_of, place_box, resample, to_box

PLAIN = Head()


def extent(box: np.ndarray, level: float = 0.9) -> list[float]:
    """Edges (y0, y1, x0, x1) of what is brighter (the skull) in the middle slices."""
    bright = (box[12:20] > level).mean(axis=0) > 0.5
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return [int(v) for v in (rows[0], rows[-1], columns[0], columns[-1])]


def millimetres(head: Head) -> list[float]:
    """Edges of the box in the plane, from the centre of the head: y0, y1, x0, x1."""
    placement = place_box(*make(head))
    edges = []
    for i in (1, 2):
        low = placement.low[i] * head.spacing[i] - head.centre[i - 1]
        edges += [low, low + placement.step[i] * BOX[i] * head.spacing[i]]
    return edges


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def test_the_head_fills_the_box_in_the_window_of_the_paper():
    volume, affine = make(PLAIN)
    box = to_box(volume, affine)
    assert box.shape == BOX and box.dtype == np.float32 and box.min() == 0 and box.max() == 1
    y0, y1, x0, x1 = extent(box)
    assert 0 <= y0 < 14 and 224 - 14 < y1 < 224  # front to back: the longer side decides
    assert abs((x0 + x1) / 2 - 95.5) < 3 and abs((x1 - x0) / (y1 - y0) - 74 / 92) < 0.03  # its shape is kept
    brain = box[16, 100:120, 20:40]
    assert brain.mean() == pytest.approx((34 + 45) / 200, abs=0.02)
    assert (box[39] < 0.9).all() and (box[0] > 0.9).any()  # the vertex is the top, the neck is left out


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(replace(PLAIN, centre=(136.0, 104.0)), id="shifted"),
        pytest.param(replace(PLAIN, turn=9.0), id="tilted table"),
        pytest.param(replace(PLAIN, table=False), id="no table"),
        pytest.param(replace(PLAIN, height=200.0), id="no chin"),
        pytest.param(replace(PLAIN, spacing=(4.0, 1.1, 1.1), size=(232, 232)), id="finer"),
        pytest.param(replace(PLAIN, spacing=(1.25, 1.6, 1.6)), id="thin slices"),
    ],
)
def test_the_same_head_scanned_otherwise_gives_the_same_box(head):
    box, other = to_box(*make(PLAIN)), to_box(*make(head, seed=1))
    inside = np.zeros(BOX, bool)
    inside[:, 12:-12] = True  # a table may show at the edge
    assert mean_difference(box[inside], other[inside]) < 0.05  # a slice up or down
    assert np.abs(np.subtract(millimetres(PLAIN), millimetres(head))).max() < 6


def test_a_tilted_gantry_is_straightened():
    tilted = to_box(*make(replace(PLAIN, tilt=15.0)))
    assert mean_difference(to_box(*make(PLAIN))[5:35, 12:-12], tilted[5:35, 12:-12]) < 0.035
    volume, affine = make(replace(PLAIN, tilt=15.0))
    affine[1, 0] = 0  # the same pixels, believed to be straight
    assert mean_difference(to_box(*make(PLAIN))[5:35], to_box(volume, affine)[5:35]) > 0.08


def test_a_child_and_an_adult_fill_the_box_alike():
    small = to_box(*make(replace(PLAIN, radii=(80.0, 74.0, 59.0))))
    assert np.abs(np.subtract(extent(to_box(*make(PLAIN))), extent(small))).max() <= 8


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(), (0,), (1, 2)])
def test_the_box_does_not_depend_on_how_the_volume_is_stored(axes, flips):
    volume, affine = make(replace(PLAIN, centre=(112.0, 140.0), spacing=(5.0, 2.0, 2.0), size=(128, 128)))
    expected = to_box(volume, affine)
    for axis in flips:
        affine[:, 3] += affine[:, axis] * (volume.shape[axis] - 1)
        affine[:, axis] *= -1
        volume = np.flip(volume, axis)
    turned = affine[:, [*axes, 3]]
    found = to_box(np.ascontiguousarray(volume.transpose(axes)), turned)
    assert mean_difference(found, expected) < 1e-3


def test_what_was_not_scanned_is_black_and_a_short_volume_is_not_stretched_over_the_box():
    volume, affine = make(replace(PLAIN, height=80.0))  # 60 mm of head below the vertex, and air above it
    box = to_box(volume, affine)
    filled = np.flatnonzero(box.reshape(40, -1).max(axis=1) > 0)
    assert 20 <= len(filled) <= 27 and filled[-1] >= 37  # 4 mm of head are at most 1.6 slices
    middle, affine = make(replace(PLAIN, top=100.0))  # the vertex is missing: the first slice is the top
    assert (to_box(middle, affine)[39] > 0.9).any() and place_box(middle, affine).found


def test_a_volume_without_a_head_is_in_the_box_as_a_whole():
    air = np.full((12, 64, 64), -1000, np.float32)
    affine = np.array([[0, 0, 3.0, 0], [0, 3.0, 0, 0], [5.0, 0, 0, 0]])
    assert not place_box(air, affine).found and not to_box(air, affine).any()
    air[:, 20:24, 20:24] = 60  # 1.2 x 1.2 cm: no head
    box = to_box(air, affine)
    assert not place_box(air, affine).found and (box > 0.5).any(axis=(1, 2)).all()
    one = to_box(air[:1], affine)
    assert one.shape == BOX and (one > 0.5).any()


def test_small_boxes_and_whole_volumes_are_for_the_asking():
    volume, affine = make(PLAIN)
    small = to_box(volume, affine, (20, 56, 48))
    large = to_box(volume, affine)
    shrunk = large.reshape(20, 2, 56, 4, 48, 4).mean(axis=(1, 3, 5))
    assert small.shape == (20, 56, 48) and mean_difference(small, shrunk) < 0.02
    whole = place_box(volume, affine, crop=False)
    assert not whole.found and whole.step[0] == len(volume) / 40 and whole.low[0] == pytest.approx(0)


def test_labels_of_slices_go_to_the_slices_of_the_box_that_show_them():
    volume, affine = make(PLAIN)
    volume, affine[:, 3] = volume[::-1].copy(), affine[:, 3] + affine[:, 0] * (len(volume) - 1)
    affine[:, 0] *= -1  # stored from the head down
    placement = place_box(volume, affine)
    weights = placement.source_weights(len(volume))
    inside = weights.sum(axis=1)
    assert np.all(np.isclose(inside, 1, atol=1e-5) | (inside == 0)) and (weights >= 0).all()
    assert (
        list(np.argmax(weights[[5, 20, 35]], axis=1)) == sorted(np.argmax(weights[[5, 20, 35]], axis=1))[::-1]
    )
    marked = np.zeros_like(volume)
    marked[17] = 1  # a label on one slice, carried as pixels and as weights
    carried = resample(marked, placement).reshape(40, -1).max(axis=1)
    assert np.allclose(carried, weights[:, 17], atol=1e-5) and carried.max() > 0.5


def test_components_are_connected_through_sides_only():
    mask = np.zeros((3, 4, 4), bool)
    mask[0, 0, :3] = mask[1, 0, 2] = mask[2, 0, 2] = True  # 5 in an arch
    mask[0, 3, :] = True  # 4
    mask[1, 1, 3] = True  # touches by an edge
    found = largest_component(mask)
    assert found.sum() == 5 and found[2, 0, 2] and not found[0, 3].any() and not found[1, 1, 3]
    assert not largest_component(np.zeros((2, 3, 3), bool)).any()


def test_two_objects_the_larger_is_the_head():
    volume, _ = make(replace(PLAIN, size=(160, 220)))
    volume[:, 60:85, 190:210] = 60  # a solid block beside the head, 40 x 32 mm
    assert find_head(volume, (5.0, 1.6, 1.6)).high[2] < 190


def test_reading_affines_at_lower_resolution_keeps_the_centres():
    row = {"affine": [0, 0, 0.5, -100, 0, 0.5, 0, -90, 5.0, 0, 0, 7]}
    full, half = affine_of(row), affine_of(row, 1)
    for y, x in ((0, 0), (3, 7)):
        corners = [full @ [2, 2 * y + dy, 2 * x + dx, 1] for dy in (0, 1) for dx in (0, 1)]
        assert half @ [2, y, x, 1] == pytest.approx(np.mean(corners, axis=0))


def test_volumes_need_no_torch():
    import subprocess

    code = "import sys, trainer.volumes; assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
