"""Three readers mark a generated radiograph, and the two ground truths that are made of their marks.

strict       a box that two or more of the readers have marked
any_reader   a box that any reader has marked, also where it is none
"""

from collections.abc import Sequence

import numpy as np

from ingest.synthetic.chest_findings import NODULE, Box, Exposure
from ingest.synthetic.fields import Random

READERS, AGREED = 3, 2
_SEEN = (0.6, 0.98)  # the chance that a reader marks a finding, of the least and the most visible
_FALSE_MARK = 0.04  # that a reader marks a mimic
_JITTER = 0.08  # of a side of the box

Labelled = tuple[str, Box]


def read(rng: Random, exposure: Exposure) -> dict[str, list[Labelled]]:
    """Ground truth by name: label and box (the mean of the readers'), clipped to the image."""
    marks: list[tuple[str, list[Box]]] = []
    for finding in exposure.findings:
        chance = _SEEN[0] + (_SEEN[1] - _SEEN[0]) * finding.visibility
        marks.append((finding.label, _marks(rng, finding.box, chance)))
    marks += [(NODULE, _marks(rng, box, _FALSE_MARK)) for box in exposure.mimics]
    shape = exposure.image.shape
    return {
        name: [(label, _mean(boxes, shape)) for label, boxes in marks if len(boxes) >= least]
        for name, least in (("strict", AGREED), ("any_reader", 1))
    }


def _marks(rng: Random, box: Box, chance: float) -> list[Box]:
    marked = rng.random(READERS) < chance
    width, height = box[2] - box[0], box[3] - box[1]
    moves = _JITTER * rng.standard_normal((READERS, 4)) * (width, height, width, height)
    return [tuple((np.array(box) + move).tolist()) for move, yes in zip(moves, marked, strict=True) if yes]


def _mean(boxes: Sequence[Box], shape: tuple[int, ...]) -> Box:
    x0, y0, x1, y1 = np.mean(boxes, axis=0).round(1).tolist()
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(shape[1])), min(y1, float(shape[0]))
