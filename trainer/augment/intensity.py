"""Intensities: stored pixels to [0, 1], and the point-wise augmentations (method.md section 3-B)."""

import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.config import IntensityConfig

Levels = tuple[str, float, float]  # function, centre, width; as in DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3


def to_unit(pixels: NDArray, row: Mapping[str, Any], config: IntensityConfig) -> NDArray[np.float32]:
    """Stored pixels [H, W] (uint8, uint16, int16) to f32[H, W] in [0, 1].

    row: the catalogue's window_center, window_width, window_function, p005, p995, minimum and maximum.
    `recorded` falls back to the percentiles where the row has no usable window; an image without contrast
    between them uses minimum and maximum, and a constant image becomes 0.
    """
    window = _window(row, config)
    if pixels.dtype == np.uint8:
        table = _apply(np.arange(256, dtype=np.float32), window)
        return np.asarray(cv2.LUT(np.ascontiguousarray(pixels), table))
    return _apply(pixels.astype(np.float32), window)


def apply_intensity(
    stack: NDArray[np.float32],
    gamma: NDArray[np.float64],
    gain: NDArray[np.float64],
    offset: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """clip(gain * max(x, 0)^gamma + offset, 0, 1) per image of a stack f32[n, S, S], as uint8 [n, S, S].

    The energy augmentation may leave [0, 1]; a power needs x >= 0, everything else waits for the one clip
    at the end, which the conversion to uint8 is: linear, rounded and saturated in one pass. gamma, gain,
    offset: [n]; 1, 1, 0 is the identity. The stack is used as scratch.
    """
    done = np.empty(stack.shape, np.uint8)
    for i, (exponent, a, b) in enumerate(zip(gamma.tolist(), gain.tolist(), offset.tolist(), strict=True)):
        image = stack[i]
        cv2.threshold(image, 0, 0, cv2.THRESH_TOZERO, dst=image)
        if exponent != 1.0:
            cv2.pow(image, exponent, dst=image)
        cv2.addWeighted(image, 255 * a, image, 0, 255 * b, dst=done[i], dtype=cv2.CV_8U)
    return done


def _window(row: Mapping[str, Any], config: IntensityConfig) -> Levels:
    if config.mode == "fixed":
        assert config.center is not None and config.width is not None  # held by IntensityConfig
        return "LINEAR_EXACT", config.center, config.width
    if config.mode == "recorded":
        center, width = row.get("window_center"), row.get("window_width")
        function = row.get("window_function") or "LINEAR"
        if _usable(center, width, function):
            return function, float(center), float(width)  # type: ignore[arg-type]
    low, high = float(row["p005"]), float(row["p995"])
    if not high > low:
        low, high = float(row["minimum"]), float(row["maximum"])
    return "LINEAR_EXACT", (low + high) / 2, high - low


def _usable(center: float | None, width: float | None, function: str) -> bool:
    if center is None or width is None or not (math.isfinite(center) and math.isfinite(width)):
        return False
    return width >= 1 if function == "LINEAR" else width > 0


def _apply(values: NDArray[np.float32], window: Levels) -> NDArray[np.float32]:
    function, center, width = window
    if function == "SIGMOID":
        exponent = np.clip((values - np.float32(center)) * np.float32(-4 / width), -80, 80)
        return np.asarray(1 / (1 + np.exp(exponent)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width <= 0:  # LINEAR of width 1 is a threshold; a constant image has no contrast
        return (values > np.float32(center)).astype(np.float32)
    low = np.float32(center - width / 2)
    values -= low
    values *= np.float32(1 / width)
    return np.clip(values, 0, 1, out=values)
