"""Images of one size with their boxes, and augmentation that moves both. Boxes are x0, y0, x1, y1 in px, f64
[t, 4]. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shards.tar import ShardReader
from trainer.batches import whole_image
from trainer.config import IntensityConfig
from trainer.config_data import Probability, Range, Strict

MULTIPLE = 32  # px: the side of an input

Image = NDArray[np.float32]
Places = NDArray[np.float64]


class AugmentConfig(Strict):
    """flip: the chance of a mirror image (left-right). zoom: the size, drawn from a range. shift: at most
    this share of the side, in x and in y. gain: the contrast, about the middle grey; offset: the brightness,
    at most +-. A box of which less than `least_visible` stays in the image is left out."""

    flip: Probability = Field(default=0.5, ge=0, le=1)
    zoom: Range = (0.9, 1.15)
    shift: float = Field(default=0.06, ge=0, le=0.5)
    gain: Range = (0.8, 1.25)
    offset: float = Field(default=0.1, ge=0, le=1)
    least_visible: float = Field(default=0.4, gt=0, le=1)


@dataclass(frozen=True)
class Placement:
    """How a stored image lies in the input: scaled (in x and in y), then moved by `left` and `top` px."""

    scale_x: float
    scale_y: float
    left: float
    top: float

    def place(self, boxes: Places) -> Places:
        """px of the stored image to px of the input."""
        scale = np.array([self.scale_x, self.scale_y] * 2)
        return np.asarray(boxes * scale + np.array([self.left, self.top] * 2))

    def back(self, boxes: Places) -> Places:
        """px of the input to px of the stored image."""
        scale = np.array([self.scale_x, self.scale_y] * 2)
        return np.asarray((boxes - np.array([self.left, self.top] * 2)) / scale)


class Images:
    """The images of catalogue rows as f32 [size, size] in [0, 1]: shrunk until their longer side is `size`
    and centred on black (trainer.batches.whole_image), or, with size "full", the stored pixels at the upper
    left of the smallest common square.

    `cache_bytes` of them are kept in memory, as float16 (11 bits): the first ones that are asked for. What is
    given has this precision whether it was kept or not.
    """

    def __init__(
        self,
        dataset: Path | str,
        modality: str,
        rows: Sequence[dict[str, Any]],
        size: int | str,
        intensity: IntensityConfig,
        cache_bytes: int,
    ) -> None:
        self._reader, self._modality, self._rows, self._intensity = (
            ShardReader(dataset),
            modality,
            rows,
            intensity,
        )
        longest = max((max(row["rows"], row["columns"]) for row in rows), default=1)
        self._full = isinstance(size, str)
        self.size = -(-longest // MULTIPLE) * MULTIPLE if isinstance(size, str) else size
        self._left, self._kept = cache_bytes, dict[int, NDArray[np.float16]]()

    def __getitem__(self, index: int) -> Image:
        found = self._kept.get(index)
        if found is None:
            found = self._read(index).astype(np.float16)
            if found.nbytes <= self._left:
                self._kept[index], self._left = found, self._left - found.nbytes
        return found.astype(np.float32)

    def placement(self, index: int) -> Placement:
        rows, columns = self._rows[index]["rows"], self._rows[index]["columns"]
        if self._full:
            return Placement(1, 1, 0, 0)
        scale = self.size / max(rows, columns)
        height, width = (min(max(round(s * scale), 1), self.size) for s in (rows, columns))
        return Placement(width / columns, height / rows, (self.size - width) // 2, (self.size - height) // 2)

    def _read(self, index: int) -> Image:
        row = self._rows[index]
        if not self._full:
            return whole_image(self._reader, self._modality, row, self.size, self._intensity)
        side = max(row["rows"], row["columns"])
        square = whole_image(self._reader, self._modality, row, side, self._intensity)
        top, left = (side - row["rows"]) // 2, (side - row["columns"]) // 2
        whole = np.zeros((self.size, self.size), np.float32)
        whole[: row["rows"], : row["columns"]] = square[top : top + row["rows"], left : left + row["columns"]]
        return whole


def augment(
    image: Image, boxes: Places, random: np.random.Generator, config: AugmentConfig
) -> tuple[Image, Places, NDArray[np.int64]]:
    """The image changed at random, the boxes that stay, clipped to it, and which they are (int64 [kept])."""
    side = image.shape[1]
    zoom = random.uniform(*config.zoom)
    x, y = random.uniform(-config.shift, config.shift, 2) * side
    mirror = -1.0 if random.random() < config.flip else 1.0
    middle = side / 2
    # Continuous coordinates: about the middle of the image, which is that of no pixel where the side is even.
    scale = np.array([mirror * zoom, zoom])
    offset = middle - scale * middle + (x, y)
    image = _moved(image, scale, offset)
    gain, add = random.uniform(*config.gain), random.uniform(-config.offset, config.offset)
    image = np.clip((image - 0.5) * gain + 0.5 + add, 0, 1, dtype=np.float32)
    corners = boxes.reshape(-1, 2, 2) * scale + offset
    moved = np.concatenate([corners.min(1), corners.max(1)], 1)
    clipped = moved.clip(0, side)
    share = np.prod(clipped[:, 2:] - clipped[:, :2], 1) / np.prod(moved[:, 2:] - moved[:, :2], 1)
    kept = np.flatnonzero(share >= config.least_visible)
    return image, clipped[kept], kept


def _moved(image: Image, scale: NDArray[np.float64], offset: NDArray[np.float64]) -> Image:
    """x -> scale x + offset in continuous coordinates; in those of OpenCV the centre of pixel i is i."""
    shift = scale * 0.5 + offset - 0.5
    matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
    side = (image.shape[1], image.shape[0])
    return np.asarray(cv2.warpAffine(image, matrix, side, flags=cv2.INTER_LINEAR), np.float32)
