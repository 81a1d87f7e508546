"""Boxes against detections: what is a hit, one finding once, and properties of the curve."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from trainer.evaluate import froc
from trainer.evaluate.froc import ImageBoxes, Matched, check_boxes, iou, match, matched


def array(*boxes):
    return np.array(boxes, float).reshape(-1, 4)


def test_a_detection_takes_the_box_it_overlaps_most_and_leaves_the_other_free():
    truth = array((0, 0, 10, 10), (2, 2, 12, 12))
    boxes = array((3, 3, 11, 11), (0, 0, 9, 9))  # both centres lie in both boxes
    assert match(truth, boxes, np.array([0.9, 0.8])).tolist() == [1, 0]
    # the one with the higher score chooses first, and a third detection comes too late
    three = np.concatenate([boxes, array((3, 3, 11, 11))])
    assert match(truth, three, np.array([0.5, 0.4, 0.6])).tolist() == [0, -1, 1]
    assert match(truth, three, np.array([0.5, 0.5, 0.5])).tolist() == [1, 0, -1]  # equal: the first


def test_the_border_belongs_to_the_box_and_a_box_without_area_overlaps_nothing():
    truth = array((0, 0, 10, 10))
    assert match(truth, array((10, 4, 10, 6)), np.array([1.0])).tolist() == [0]
    assert match(truth, array((10.1, 4, 10.1, 6)), np.array([1.0])).tolist() == [-1]
    assert match(truth, array((10, 4, 10, 6)), np.array([1.0]), 0.1).tolist() == [-1]
    assert iou(array((3, 3, 3, 3)), array((3, 3, 3, 3))).tolist() == [[0]]
    with pytest.raises(ValueError, match="hit=0"):
        match(truth, truth, np.array([1.0]), 0.0)


def test_equal_scores_come_together():
    curve = froc.froc([Matched(np.array([0.5, 0.5, 0.5]), np.array([True, False, True]), 4)])
    assert curve.thresholds.tolist() == [0.5]
    assert curve.sensitivity.tolist() == [0.5] and curve.false_positives.tolist() == [1]
    assert curve.at([0.5, 1]).tolist() == [0, 0.5]


def test_images_without_findings_or_detections_count_as_images():
    nothing = Matched(np.zeros(0), np.zeros(0, bool), 0)
    hit = Matched(np.array([0.9, 0.8]), np.array([True, False]), 1)
    assert froc.froc([hit, nothing, nothing, nothing]).false_positives.tolist() == [0, 0.25]
    assert froc.froc([Matched(np.zeros(0), np.zeros(0, bool), 3)]).at().tolist() == [0] * 9
    assert np.isnan(froc.froc([nothing]).mean())
    assert np.isnan(froc.froc([Matched(np.array([0.5]), np.array([False]), 0)]).mean())
    with pytest.raises(ValueError, match="no images"):
        froc.froc([])
    with pytest.raises(ValueError, match="one for each of 1 boxes"):
        matched([ImageBoxes(array(), array((0, 0, 1, 1)), np.zeros(0))])


side = st.integers(0, 12)
box = st.tuples(side, side, st.integers(1, 6), st.integers(1, 6)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
scene = st.tuples(st.lists(box, max_size=4), st.lists(st.tuples(box, st.integers(1, 9)), max_size=6)).map(
    lambda s: ImageBoxes(array(*s[0]), array(*(b for b, _ in s[1])), np.array([c / 10 for _, c in s[1]]))
)


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(scene, min_size=1, max_size=4), st.sampled_from(["centre", 0.1, 0.3]))
def test_the_curve_rises_and_is_what_counting_at_each_threshold_gives(images, hit):
    ready = matched(images, hit)
    curve = froc.froc(ready)
    assert (np.diff(curve.false_positives) >= 0).all()
    findings = sum(len(image.truth) for image in images)
    for k, threshold in enumerate(curve.thresholds):
        # matched anew with nothing below the threshold there
        kept = [
            ImageBoxes(i.truth, i.boxes[i.scores >= threshold], i.scores[i.scores >= threshold])
            for i in images
        ]
        hits = sum(int((match(i.truth, i.boxes, i.scores, hit) >= 0).sum()) for i in kept)
        assert curve.false_positives[k] == pytest.approx(
            (sum(len(i.boxes) for i in kept) - hits) / len(images)
        )
        if findings:
            assert curve.sensitivity[k] == pytest.approx(hits / findings)
    if findings:
        at = curve.at()
        assert (np.diff(at) >= 0).all() and ((at >= 0) & (at <= 1)).all()
        assert froc.froc(ready + ready).at().tolist() == at.tolist()


@settings(max_examples=30, deadline=None, database=None)
@given(scene, st.sampled_from(["centre", 0.1, 0.3]))
def test_no_box_is_found_twice(image, hit):
    found = match(image.truth, image.boxes, image.scores, hit)
    taken = found[found >= 0]
    assert len(set(taken.tolist())) == len(taken)


def test_detections_that_are_the_truth_are_perfect_and_the_interval_says_so():
    random = np.random.default_rng(0)
    corner = random.integers(0, 50, (20, 1, 2)).astype(float)
    images = [ImageBoxes(b, b, np.array([0.9])) for b in np.concatenate([corner, corner + 5], axis=2)]
    found = froc.froc_interval(matched(images, 0.3), np.arange(20).astype(str), draws=20)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    images[0] = ImageBoxes(images[0].truth, array(), np.zeros(0))
    found = froc.froc_interval(matched(images), np.arange(20).astype(str), draws=50)
    assert found.value == pytest.approx(0.95) and found.low < 0.95 < found.high


def test_boxes_that_cannot_be_are_refused_in_one_line():
    check_boxes(array((0, 0, 20, 10)), 10, 20, "row 4")
    with pytest.raises(
        UserError, match=r"row 4: the box \(0, 0, 20, 11\) does not lie in its image of 20 x 10"
    ):
        check_boxes(array((0, 0, 20, 11)), 10, 20, "row 4")
    for wrong in ((5, 0, 5, 4), (6, 0, 5, 4), (0, 0, np.nan, 4)):
        with pytest.raises(UserError, match="has no area"):
            check_boxes(array(wrong), 10, 20, "row 4")
