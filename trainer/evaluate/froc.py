"""Detections against boxes: instance fROC (method.md section 7), and the score of a whole image.

The fROC is the sensitivity over the findings of all images against false positives per image, as the score
threshold falls. One finding is found once: detections are matched in the order of their scores, each to the
free box that it hits (of several, the one that it overlaps most); a further hit of a box that is taken is a
false positive. So the matching at a threshold does not depend on what scores lower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from trainer.evaluate.bootstrap import Indices, Interval, patient_interval

RATES = (0.01, 0.05, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per image

Boxes = NDArray[np.float64]
Hit = Literal["centre"] | float  # the centre lies in the box (its border counts), or the least IoU


@dataclass(frozen=True)
class ImageBoxes:
    """One image. truth f64 [t, 4] and boxes f64 [d, 4]: x0, y0, x1, y1 in px; scores f64 [d]."""

    truth: Boxes
    boxes: Boxes
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Matched:
    """What is left of an image for the curve: scores [d], which of them found something, and how many
    findings there are."""

    scores: NDArray[np.float64]
    found: NDArray[np.bool_]
    findings: int


@dataclass(frozen=True)
class Froc:
    """From the highest threshold down. At each: false positives per image, sensitivity (0 to 1; nan where the
    images have no findings at all)."""

    findings: int
    thresholds: NDArray[np.float64]
    false_positives: NDArray[np.float64]
    sensitivity: NDArray[np.float64]

    def at(self, rates: Sequence[float] = RATES) -> NDArray[np.float64]:
        """The highest sensitivity at no more false positives than each rate; not interpolated. 0 where even
        the highest threshold has more. At a rate r, n images allow floor(r n) false positives in all."""
        reached = np.searchsorted(self.false_positives, np.asarray(rates) + 1e-9, side="right")
        return np.append(0.0 if self.findings else np.nan, self.sensitivity)[reached]

    def mean(self, rates: Sequence[float] = RATES) -> float:
        """The paper's one number: the mean of the sensitivities at the rates."""
        return float(np.mean(self.at(rates)))


def match(truth: Boxes, boxes: Boxes, scores: NDArray[np.float64], hit: Hit = "centre") -> Indices:
    """Which box of the truth each detection has found, or -1; int64 [d]. Equal scores: the first comes
    first."""
    found = np.full(len(boxes), -1, np.int64)
    if not len(truth) or not len(boxes):
        return found
    overlap = iou(boxes, truth)
    hits = _centre_inside(boxes, truth) if hit == "centre" else overlap >= _least(hit)
    free = np.ones(len(truth), bool)
    for one in np.argsort(-scores, kind="stable"):
        possible = hits[one] & free
        if possible.any():
            found[one] = np.argmax(np.where(possible, overlap[one], -1.0))
            free[found[one]] = False
    return found


def iou(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Area of the intersection over that of the union, f64 [d, t]; 0 for two boxes without area."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    union = _area(boxes)[:, None] + _area(others)[None] - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0))


def matched(images: Sequence[ImageBoxes], hit: Hit = "centre") -> list[Matched]:
    """Match each image for itself. Raises ValueError for arrays that do not fit together."""
    out = []
    for image in images:
        truth, boxes = (np.asarray(b, np.float64).reshape(-1, 4) for b in (image.truth, image.boxes))
        scores = np.asarray(image.scores, np.float64)
        if scores.shape != (len(boxes),) or not np.isfinite(scores).all():
            raise ValueError(f"scores {scores.shape} must be finite, one for each of {len(boxes)} boxes")
        out.append(Matched(scores, match(truth, boxes, scores, hit) >= 0, len(truth)))
    return out


def froc(images: Sequence[Matched]) -> Froc:
    """The curve of images that are matched. Detections of equal score come together."""
    if not images:
        raise ValueError("no images: there are no false positives per image")
    scores = np.concatenate([image.scores for image in images])
    found = np.concatenate([image.found for image in images])
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) if len(scores) else order
    hits = np.cumsum(found[order])[last]
    findings = sum(image.findings for image in images)
    return Froc(
        findings=findings,
        thresholds=scores[order][last],
        false_positives=(last + 1 - hits) / len(images),
        sensitivity=hits / findings if findings else np.full(len(last), np.nan),
    )


def froc_interval(
    images: Sequence[Matched],
    patients: NDArray[np.str_],
    rates: Sequence[float] = RATES,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean sensitivity at the rates, with an interval by patient. patients: of each image."""
    of_images = partial(_mean_of, images, rates)
    return patient_interval(of_images, patients, draws=draws, level=level, seed=seed)


def image_scores(images: Sequence[Matched]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of each image: whether it has a finding, and its highest score (0 without a detection), for the
    image-level AUC."""
    labels = np.array([image.findings > 0 for image in images], bool)
    return labels, np.array([image.scores.max(initial=0.0) for image in images], np.float64)


def check_boxes(boxes: Boxes, height: int, width: int, where: str) -> None:
    """Boxes of a label table must have an area and lie in their image. Raises UserError that names
    `where`."""
    for x0, y0, x1, y1 in np.asarray(boxes, np.float64).reshape(-1, 4).tolist():
        text = f"{where}: the box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if not (x0 < x1 and y0 < y1):
            raise UserError(f"{text} has no area: boxes are x0, y0, x1, y1 in px, x0 < x1 and y0 < y1")
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            raise UserError(
                f"{text} does not lie in its image of {width} x {height} px: mend the label table, or give "
                "boxes in px of the stored image"
            )


def _mean_of(images: Sequence[Matched], rates: Sequence[float], chosen: Indices) -> float:
    return froc([images[i] for i in chosen]).mean(rates)


def _least(hit: float) -> float:
    if not 0 < hit <= 1:
        raise ValueError(f"hit={hit} must be 'centre' or an IoU above 0, up to 1")
    return hit


def _area(boxes: Boxes) -> NDArray[np.float64]:
    return np.asarray(np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1))


def _centre_inside(boxes: Boxes, truth: Boxes) -> NDArray[np.bool_]:
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    return np.asarray(((centre >= truth[None, :, :2]) & (centre <= truth[None, :, 2:])).all(axis=2))
