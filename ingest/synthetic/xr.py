"""Chest radiographs: attenuation along the beam through ribs, lungs, heart and diaphragm."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import (
    Image,
    Random,
    blur,
    coordinates,
    ellipse,
    finding,
    noise,
    pick,
    ramp,
    streaks,
)


def radiographs(rng: Random, positive: bool, images: int) -> list[Image]:
    """Exposures of one patient, [H, W] in [0, 1], larger = more attenuation; each has its own position."""
    chest = Chest.draw(rng)
    seed = int(rng.integers(2**31))
    return [_exposure(np.random.default_rng([seed, i]), chest, positive) for i in range(images)]


@dataclass(frozen=True)
class Chest:
    """A patient's build; lengths as in fields.coordinates."""

    width: float
    lung_height: float
    lung_width: float
    heart: float
    ribs: float
    rib_pitch: float
    spine: float
    burden: float
    radius: float

    @staticmethod
    def draw(rng: Random) -> "Chest":
        u = rng.uniform
        return Chest(
            width=u(0.85, 1.05),
            lung_height=u(0.68, 0.82),
            lung_width=u(0.34, 0.41),
            heart=u(0.75, 1.25),
            ribs=u(0.02, 0.05),
            rib_pitch=u(0.17, 0.23),
            spine=u(0.08, 0.2),
            burden=u(0.12, 0.15),
            radius=u(0.03, 0.044),
        )


def _exposure(rng: Random, chest: Chest, positive: bool) -> Image:
    width = int(rng.integers(112, 185))
    shape = (int(width * rng.uniform(0.95, 1.15)), width)
    image, lungs = anatomy(rng, chest, shape)
    image += chest.burden * finding(rng, lungs, positive, 20, chest.radius * width, mix=0.05)
    return film(rng, image.astype(np.float32), shape)


def anatomy(rng: Random, chest: Chest, shape: tuple[int, int]) -> tuple[Image, Image]:
    """Attenuation of a chest without findings, and its lungs (0 to 1); both [H, W]."""
    width = shape[1]
    y, x = coordinates(rng, shape, rng.uniform(-0.12, 0.12), 0.08, rng.uniform(1.0, 1.2), 0.02)
    breath = rng.uniform(-0.08, 0.08)  # how deeply the patient breathed in
    body = ellipse(y, x, (0.25, 0), (1.35, chest.width))
    lungs = _lungs(y, x, chest, breath)
    image = 0.62 * body - 0.34 * lungs
    image += 0.1 * body * ellipse(y, x, (0.95, 0), (0.45, 0.9), edge=0.15)
    heart = ellipse(y, x, (0.25 + breath, 0.14), (0.32 * chest.heart, 0.27 * chest.heart), 0.5, edge=0.06)
    image += 0.2 * heart * (0.4 + 0.6 * lungs)
    image += chest.spine * ramp((0.1 - np.abs(x)) / 0.04) * body
    ribs = _ribs(y, x, chest)
    image += chest.ribs * ribs * body
    for side in (-1, 1):
        image += 0.07 * ellipse(y, x, (-0.72 - 0.02 * side, side * 0.4), (0.03, 0.33), side * 0.25)
    vessels = streaks(rng, shape, pick(rng, lungs * (np.abs(x) < 0.5), 10), 0.15 * width, 0.012 * width)
    image += 0.03 * vessels * lungs
    return image, lungs


def _lungs(y: Image, x: Image, chest: Chest, breath: float) -> Image:
    masks = [
        ellipse(y, x, (-0.08, side * 0.42), (chest.lung_height, chest.lung_width), side * 0.12, edge=0.06)
        * ramp((0.46 + 0.06 * side + breath - 0.35 * (np.abs(x) - 0.4) ** 2 - y) / 0.05)
        for side in (-1, 1)
    ]
    return np.maximum(masks[0], masks[1])


def _ribs(y: Image, x: Image, chest: Chest) -> Image:
    """Posterior ribs fall to the sides, anterior ones the other way."""
    back = y - 0.45 * np.abs(x) ** 1.5
    front = y + 0.75 * np.abs(x) - 0.35
    bands = np.maximum(
        np.cos(2 * np.pi * back / chest.rib_pitch) - 0.2,
        0.6 * np.cos(2 * np.pi * front / (1.2 * chest.rib_pitch)) - 0.3,
    )
    cage = ellipse(y, x, (0.05, 0), (0.95, 0.86), edge=0.1) * ramp((np.abs(x) - 0.12) / 0.05)
    return np.asarray(np.maximum(bands, 0) * cage, np.float32)


def film(rng: Random, image: Image, shape: tuple[int, int]) -> Image:
    """Exposure, scatter, focal blur, quantum noise, and collimator shutters on some."""
    image = blur(image, rng.uniform(0.4, 0.7))
    image = image * (1 + 0.08 * noise(rng, shape, 0.5 * min(shape)))
    image = np.clip(image, 0, None) ** rng.uniform(0.85, 1.2)
    image = rng.uniform(0.55, 1.0) * image + rng.uniform(0.02, 0.2)
    image = image + rng.uniform(0.004, 0.01) * noise(rng, shape, 0.4)
    if rng.random() < 0.15:
        edge = int(rng.integers(2, 7))
        frame = np.zeros(shape, np.float32)
        frame[edge:-edge, edge:-edge] = 1
        image = image * frame + 0.97 * (1 - frame)
    return np.asarray(np.clip(image, 0, 1), np.float32)


def to_bits(image: Image, bits: int) -> NDArray[np.uint16]:
    """[0, 1] to unsigned integers of `bits` bits."""
    return np.asarray(np.round(image * (2**bits - 1)), np.uint16)
