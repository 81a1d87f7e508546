"""Augmentation of a volume that is trained on with labels: what a bleeding or a lesion stays one under.

Mirrored left to right, turned, scaled and shifted in the plane, brightness and contrast, noise. Slices stay
where they are, so labels of slices hold. No torch.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.config_data import Strict

Volume = NDArray[np.float32]
_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


class BoxAugmentConfig(Strict):
    """Each of them is drawn uniformly in its range. mirror, move, shade: probabilities; move is rotation,
    scale and shift, shade is gamma, `gain * x + bias` and noise, where x is in [0, 1]. Shades are slight: HU
    are calibrated, and fresh blood is .1 to .2 brighter than brain in a window of 200 HU."""

    mirror: float = Field(default=0.5, ge=0, le=1)
    move: float = Field(default=0.8, ge=0, le=1)
    rotation_degrees: float = Field(default=10, ge=0, le=180)
    scale: tuple[float, float] = (0.9, 1.1)
    shift: float = Field(default=0.05, ge=0, le=1)  # of the side
    shade: float = Field(default=0.8, ge=0, le=1)
    gamma: tuple[float, float] = (0.95, 1.05)
    gain: tuple[float, float] = (0.97, 1.03)
    bias: tuple[float, float] = (-0.015, 0.015)
    noise: float = Field(default=0.02, ge=0)  # the largest standard deviation


NO_AUGMENT = BoxAugmentConfig(mirror=0, move=0, shade=0)


def augmented(box: Volume, config: BoxAugmentConfig, random: np.random.Generator) -> Volume:
    """[Z, Y, X] in [0, 1], another array of the same shape."""
    mirror, move, shade = random.random(3) < (config.mirror, config.move, config.shade)
    out = box[:, :, ::-1] if mirror else box
    if move:
        matrix = _matrix(box.shape[1], box.shape[2], config, random)
        size = (box.shape[2], box.shape[1])
        out = np.stack(
            [cv2.warpAffine(np.ascontiguousarray(plane), matrix, size, flags=_WARP) for plane in out]
        )
    if shade:
        gamma = np.exp(random.uniform(*np.log(config.gamma)))
        noise = random.uniform(0, config.noise) * random.standard_normal(box.shape, np.float32)
        out = random.uniform(*config.gain) * out**gamma + random.uniform(*config.bias) + noise
    return np.ascontiguousarray(np.clip(out, 0, 1), np.float32)


def _matrix(
    rows: int, columns: int, config: BoxAugmentConfig, random: np.random.Generator
) -> NDArray[np.float64]:
    """[2, 3], about the middle of the plane."""
    angle = random.uniform(-config.rotation_degrees, config.rotation_degrees)
    middle = ((columns - 1) / 2, (rows - 1) / 2)
    matrix = np.asarray(cv2.getRotationMatrix2D(middle, angle, random.uniform(*config.scale)), np.float64)
    matrix[:, 2] += random.uniform(-config.shift, config.shift, 2) * np.array([columns, rows])
    return matrix
