"""The baseline of the detector without a network: spots of the size of the findings, brighter or darker than
what is around them (a difference of two Gaussians). Size and sign come from the training images."""

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.downstream.findings import Config, Found, Target, matched
from trainer.downstream.task import Dataset
from trainer.evaluate import froc

_MOST = 20  # detections of an image and finding
_WIDER = 1.6  # the second Gaussian


def blob_detections(config: Config, train: Dataset, data: Dataset) -> tuple[list[Found], list[Target]]:
    """Detections and targets of a split, as finetune.predict gives them of a network."""
    sizes = _sizes(config, train)
    signs = [_sign(config, train, finding, sizes[finding]) for finding in range(len(config.findings))]
    found, targets = [], []
    for index in range(len(data)):
        sample = data.sample(index, None)
        parts = [_spots(sample.input[0], sizes[k], signs[k], k) for k in range(len(sizes))]
        found.append(
            Found(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("boxes", "scores", "findings")))
        )
        targets.append(sample.target)
    return found, targets


def _sizes(config: Config, train: Dataset) -> list[tuple[float, float]]:
    """Median width and height of each finding, px."""
    targets = [train.sample(i, None).target for i in range(len(train))]
    boxes = np.concatenate([t.boxes[0] for t in targets])
    findings = np.concatenate([t.findings[0] for t in targets])
    sizes = []
    for k in range(len(config.findings)):
        mine = boxes[findings == k]
        middle = np.median(mine[:, 2:] - mine[:, :2], axis=0) if len(mine) else np.full(2, 8.0)
        sizes.append((float(middle[0]), float(middle[1])))
    return sizes


def _sign(config: Config, train: Dataset, finding: int, size: tuple[float, float]) -> int:
    """Whether bright (1) or dark (-1) spots find more in the training images."""
    samples = [train.sample(i, None) for i in range(len(train))]
    targets = [sample.target for sample in samples]

    def value(sign: int) -> float:
        found = [_spots(sample.input[0], size, sign, finding) for sample in samples]
        return froc.froc(matched(config, 0, found, targets)[config.findings[finding]]).mean()

    return max((1, -1), key=value)


def _spots(image: NDArray[np.float32], size: tuple[float, float], sign: int, finding: int) -> Found:
    """The strongest local maxima of the difference; score: its height, 0 to 1."""
    width, height = size
    sigma = 0.25 * (width * height) ** 0.5
    response = sign * (
        cv2.GaussianBlur(image, (0, 0), sigma) - cv2.GaussianBlur(image, (0, 0), _WIDER * sigma)
    )
    side = 2 * max(1, round(sigma)) + 1
    peak = (response >= cv2.dilate(response, np.ones((side, side), np.uint8))) & (response > 0)
    rows, columns = np.nonzero(peak)
    order = np.argsort(-response[rows, columns], kind="stable")[:_MOST]
    centre = np.stack([columns[order], rows[order]], 1) + 0.5
    half = np.array([width, height]) / 2
    boxes = np.concatenate([centre - half, centre + half], 1)
    scores = response[rows[order], columns[order]].astype(np.float64)
    return Found(boxes.astype(np.float64), scores, np.full(len(boxes), finding, np.int64))
