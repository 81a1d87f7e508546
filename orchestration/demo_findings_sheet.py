"""A picture of test images with their boxes: what was to be found, and what was."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer import files

_ZOOM, _SHOWN = 3, 5  # screen px of an image px; detections of an image
_TRUE, _FOUND = ((80, 220, 80), (220, 200, 60)), ((60, 140, 255), (255, 90, 200))  # BGR of the findings


def write_sheet(
    path: Path,
    inputs: Sequence[NDArray[np.float32]],
    targets: Sequence[Any],
    arms: Mapping[str, Sequence[Any]],
    findings: Sequence[str],
    most: int,
) -> None:
    """A row an image with a finding, `most` of them: its true boxes (those of the first ground truth), then
    the best detections of each arm with their scores. inputs f32 [1, H, W]; targets, arms: findings.Target
    and Found."""
    chosen = [i for i, target in enumerate(targets) if len(target.boxes[0])][:most]
    rows = []
    for i in chosen:
        tiles = [_tile(inputs[i], "truth", targets[i].boxes[0], targets[i].findings[0], None, _TRUE)]
        for arm, predictions in arms.items():
            one = predictions[i]
            best = slice(0, _SHOWN)
            tiles.append(_tile(inputs[i], arm, one.boxes[best], one.findings[best], one.scores[best], _FOUND))
        rows.append(np.concatenate(tiles, axis=1))
    legend = np.zeros((24, rows[0].shape[1] if rows else 400, 3), np.uint8)
    for k, finding in enumerate(findings[:2]):
        cv2.putText(
            legend, finding, (6 + 160 * k, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, _TRUE[k], 1, cv2.LINE_AA
        )
        cv2.putText(
            legend,
            f"found: {finding}",
            (360 + 220 * k, 17),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.5,
            _FOUND[k],
            1,
            cv2.LINE_AA,
        )
    files.replace_file(path, cv2.imencode(".png", np.concatenate([legend, *rows]))[1].tobytes())


def _tile(
    image: NDArray[np.float32],
    name: str,
    boxes: NDArray[np.float64],
    findings: NDArray[np.int64],
    scores: NDArray[np.float64] | None,
    colours: Sequence[tuple[int, int, int]],
) -> NDArray[np.uint8]:
    grey = np.round(255 * image[0]).astype(np.uint8)
    side = (grey.shape[1] * _ZOOM, grey.shape[0] * _ZOOM)
    tile = cv2.cvtColor(cv2.resize(grey, side, interpolation=cv2.INTER_CUBIC), cv2.COLOR_GRAY2BGR)
    for k, (box, finding) in enumerate(zip(boxes, findings, strict=True)):
        x0, y0, x1, y1 = np.round(box * _ZOOM).astype(int).tolist()
        colour = colours[int(finding) % len(colours)]
        cv2.rectangle(tile, (x0, y0), (x1, y1), colour, 1)
        if scores is not None:
            text = f"{scores[k]:.2f}"
            cv2.putText(
                tile, text, (x0, max(y0 - 2, 9)), cv2.FONT_HERSHEY_SIMPLEX, 0.35, colour, 1, cv2.LINE_AA
            )
    cv2.putText(tile, name, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return np.asarray(tile, np.uint8)
