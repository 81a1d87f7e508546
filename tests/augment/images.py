"""Made-up images in [0, 1] for the tests of the augmentation."""

import cv2
import numpy as np
from numpy.typing import NDArray


def phantom(rows: int, columns: int | None = None, noise: float = 0.03, seed: int = 0) -> NDArray[np.float32]:
    """A CT-like slice f32[rows, columns]: a body, organs of other density, noise."""
    columns = columns or rows
    y, x = np.mgrid[:rows, :columns] / np.float32(max(rows, columns))

    def disc(cy: float, cx: float, ry: float, rx: float) -> NDArray[np.float32]:
        return (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1).astype(np.float32)

    image = (
        0.1
        + 0.6 * disc(0.5, 0.5, 0.35, 0.4)
        + 0.2 * disc(0.4, 0.6, 0.2, 0.1)
        - 0.3 * disc(0.5, 0.35, 0.2, 0.12)
    )
    image = cv2.GaussianBlur(np.float32(image), (0, 0), 0.7)
    image += noise * np.random.default_rng(seed).standard_normal(image.shape)
    return np.clip(image, 0, 1).astype(np.float32)


def ramp(rows: int, columns: int) -> NDArray[np.float32]:
    """A gradient down the rows: the worst case for a mirrored border."""
    return np.repeat(np.linspace(0, 1, rows, dtype=np.float32)[:, None], columns, axis=1)
