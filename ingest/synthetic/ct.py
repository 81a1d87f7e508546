"""Chest CT: a body with lungs, heart, spine and ribs in Hounsfield units."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import Image, Random, blur, coordinates, ellipse, finding, noise, pick, streaks


@dataclass(frozen=True)
class CtSeries:
    hu: NDArray[np.float32]  # [slices, H, W], HU
    spacing_mm: float
    step_mm: float
    window: tuple[float, float]  # centre, width


def chest(rng: Random, positive: bool, slices: int, side: int = 0) -> CtSeries:
    """One patient's slices; a positive patient's all show the foci. side: in pixels, 0 draws one."""
    side = side or int(rng.integers(112, 177))
    shape = (side, side)
    body = _Body.draw(rng)
    seed = int(rng.integers(2**31))
    hu = np.stack(
        [
            _slice(np.random.default_rng([seed, i]), seed, body, shape, i, slices, positive)
            for i in range(slices)
        ]
    )
    return CtSeries(
        hu=hu,
        spacing_mm=round(float(body.field_mm / side), 4),
        step_mm=float(rng.choice([3.0, 5.0, 7.5])),
        window=(float(rng.integers(-650, -450)), float(rng.integers(1200, 1700))),
    )


@dataclass(frozen=True)
class _Body:
    height: float
    width: float
    lung: float
    heart: float
    fat: float
    turn: float
    scale: float
    field_mm: float
    lung_hu: float
    contrast_hu: float
    noise_hu: float
    kernel: float
    burden: float
    radius: float

    @staticmethod
    def draw(rng: Random) -> "_Body":
        u = rng.uniform
        return _Body(
            height=u(0.66, 0.8),
            width=u(0.86, 0.97),
            lung=u(1.05, 1.2),
            heart=u(0.75, 1.2),
            fat=u(0.03, 0.12),
            turn=u(-0.1, 0.1),
            scale=u(0.98, 1.14),
            field_mm=u(300, 420),
            lung_hu=u(-860, -800),
            contrast_hu=u(40, 120),
            noise_hu=u(10, 30),
            kernel=u(0.5, 0.8),
            burden=u(280, 360),
            radius=u(0.03, 0.042),
        )


def _slice(
    rng: Random, seed: int, body: _Body, shape: tuple[int, int], index: int, slices: int, positive: bool
) -> Image:
    level = (index + 0.5) / slices  # 0 apex side, 1 base side
    # The same generator for every slice: one warp a patient.
    y, x = coordinates(np.random.default_rng(seed), shape, body.turn, 0.04, body.scale, 0.02)
    skin = ellipse(y, x, (0, 0), (body.height, body.width))
    muscle = ellipse(y, x, (0, 0), (body.height - body.fat, body.width - body.fat))
    lungs = _lungs(y, x, body, level)
    heart = ellipse(
        y, x, (-0.12 + 0.1 * level, 0.12), (0.22 * body.heart, (0.2 + 0.14 * level) * body.heart), 0.5
    )
    lungs = lungs * (1 - heart) * muscle

    hu: Image = -1000 + skin * (900 + 15 * noise(rng, shape, 2.0))
    hu += muscle * (150 + 8 * noise(rng, shape, 3.0))
    hu += heart * muscle * body.contrast_hu * 0.8
    hu += ellipse(y, x, (0.25, 0.07), (0.065, 0.065)) * body.contrast_hu
    hu = hu * (1 - lungs) + lungs * (body.lung_hu + 40 * (y + 0.3))
    hu = _bones(hu, y, x, body, level)
    vessels = streaks(rng, shape, pick(rng, lungs, 14), 0.1 * shape[0], 0.012 * shape[0])
    hu += 120 * vessels * lungs
    hu += body.burden * finding(rng, lungs, positive, 20, body.radius * shape[0], mix=0.05)
    hu += ellipse(y, x, (0.93, 0), (0.02, 0.8)) * 250  # the table
    hu = blur(hu, body.kernel)
    return np.asarray(hu + body.noise_hu * noise(rng, shape, 0.7 * body.kernel), np.float32)


def _lungs(y: Image, x: Image, body: _Body, level: float) -> Image:
    high, wide = (0.5 + 0.08 * level) * body.lung, (0.34 + 0.04 * level) * body.lung
    left = ellipse(y, x, (0.02, 0.47), (high, wide * 0.95), -0.12)
    right = ellipse(y, x, (0.02, -0.46), (high, wide * 1.05), 0.12)
    return np.maximum(left, right)


def _bones(hu: Image, y: Image, x: Image, body: _Body, level: float) -> Image:
    spine = ellipse(y, x, (0.42, 0), (0.12, 0.13))
    canal = ellipse(y, x, (0.56, 0), (0.045, 0.05))
    hu = hu + spine * 260 - canal * 120 + ellipse(y, x, (0.5, 0), (0.17, 0.035)) * 200
    hu += ellipse(y, x, (-body.height + 0.1, 0), (0.035, 0.1)) * 350
    angles = np.linspace(0.35, 2 * np.pi - 0.35, 10) + 0.5 * level
    for angle in angles:
        center = (
            -(body.height - body.fat - 0.07) * np.cos(angle),
            (body.width - body.fat - 0.06) * np.sin(angle),
        )
        hu += ellipse(y, x, center, (0.035, 0.08), angle) * 420
    return hu
