"""Golden test G13: fROC, AUC, mAP, accuracy at .6 and the convergence epoch on cases worked out by hand."""

import numpy as np
import pytest

from trainer.evaluate import convergence, froc, roc

LABELS = np.array([1, 0, 1, 1, 0, 0])
SCORES = np.array([0.9, 0.8, 0.6, 0.6, 0.6, 0.1])


def test_g13_auc_counts_pairs():
    # .9 beats all 3 negatives; each .6 beats .1, ties .6 and loses to .8: 1.5 each. (3 + 1.5 + 1.5) / 9
    assert roc.auc(LABELS, SCORES) == pytest.approx(6 / 9)


def test_g13_average_precision_sums_steps_of_recall():
    # thresholds .9 (recall 1/3, precision 1), .8 (no step), .6 (three at once: recall 1, precision 3/5)
    assert roc.average_precision(LABELS, SCORES) == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 5)


def test_g13_accuracy_at_six_tenths_calls_six_tenths_positive():
    # called positive: .9 .8 .6 .6 .6; right: three positives and the negative at .1
    assert roc.accuracy(LABELS, SCORES) == pytest.approx(4 / 6)
    assert roc.sensitivity(LABELS, SCORES) == 1 and roc.specificity(LABELS, SCORES) == pytest.approx(1 / 3)
    assert roc.accuracy(LABELS, SCORES, 0.61) == pytest.approx(3 / 6)


def image(truth, *detections):
    boxes = np.array([d[:4] for d in detections], float).reshape(-1, 4)
    return froc.ImageBoxes(np.array(truth, float).reshape(-1, 4), boxes, np.array([d[4] for d in detections]))


IMAGES = [
    # two findings; .9 finds the first, .8 hits it again (false), .3 finds the second
    image([(0, 0, 10, 10), (50, 50, 60, 60)], (1, 1, 9, 9, 0.9), (0, 0, 10, 10, 0.8), (52, 52, 70, 58, 0.3)),
    image([], (5, 5, 8, 8, 0.5)),  # healthy, one false positive
    image([(20, 20, 40, 40)], (0, 0, 4, 4, 0.6), (22, 24, 38, 44, 0.4)),  # .6 false, .4 finds it
    image([(0, 0, 4, 4)]),  # missed
]


def test_g13_froc_by_hand():
    # from the top: .9 hit, .8 false, .6 false, .5 false, .4 hit, .3: the centre (61, 55) lies outside, false
    curve = froc.froc(froc.matched(IMAGES))
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.6, 0.5, 0.4, 0.3]
    assert curve.false_positives.tolist() == [0, 0.25, 0.5, 0.75, 0.75, 1.0]
    assert curve.sensitivity.tolist() == [0.25, 0.25, 0.25, 0.25, 0.5, 0.5]
    # at .01 .05 .125 .25 .5 of four images: a quarter; from .75 on: a half
    assert curve.at().tolist() == [0.25, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert curve.mean() == pytest.approx((5 * 0.25 + 4 * 0.5) / 9)


def test_g13_froc_with_overlap_instead_of_the_centre():
    # (52, 52, 70, 58) and (50, 50, 60, 60): 8 x 6 = 48 of 108 + 100 - 48 = 160, IoU .3: a hit of both rules
    assert froc.iou(IMAGES[0].boxes[2:], IMAGES[0].truth[1:])[0, 0] == pytest.approx(0.3)
    for least in (0.1, 0.3):
        curve = froc.froc(froc.matched(IMAGES, least))
        assert curve.false_positives.tolist() == [0, 0.25, 0.5, 0.75, 0.75, 0.75]
        assert curve.sensitivity.tolist() == [0.25, 0.25, 0.25, 0.25, 0.5, 0.75]
    assert froc.froc(froc.matched(IMAGES, 0.31)).sensitivity[-1] == 0.5


def test_g13_image_level_scores_are_the_maximum():
    labels, scores = froc.image_scores(froc.matched(IMAGES))
    assert labels.tolist() == [True, False, True, True] and scores.tolist() == [0.9, 0.5, 0.6, 0]
    assert roc.auc(labels, scores) == pytest.approx(2 / 3)


def test_g13_convergence_is_the_earliest_epoch_at_98_percent_of_the_final_best():
    curve = [0.5, 0.7, 0.88, 0.87, 0.9, 0.89]  # 98 % of .9 is .882
    assert convergence.convergence_epoch(curve) == 5
    assert convergence.convergence_epoch([0.5, 0.7, 0.882, 0.87, 0.9, 0.89]) == 3
    assert convergence.percent_faster(28, 100) == pytest.approx(72)
