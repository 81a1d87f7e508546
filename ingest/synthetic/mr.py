"""Head MR: skull, ventricles, grey and white matter at two echoes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import Image, Random, coordinates, ellipse, finding, noise, ramp

# Signal of (scalp, bone, fluid, grey, white, lesion) at the two echoes: proton density and T2 weighting.
_SIGNAL = np.array([[0.95, 0.12, 0.72, 0.82, 0.66, 0.2], [0.75, 0.08, 1.1, 0.62, 0.46, 0.3]])


@dataclass(frozen=True)
class MrSeries:
    signal: NDArray[np.float32]  # [echoes, slices, H, W], arbitrary units, >= 0
    spacing_mm: float
    step_mm: float
    echo_times_ms: tuple[float, float]
    field_t: float


def head(rng: Random, positive: bool, slices: int) -> MrSeries:
    """One patient's slices at two echoes; every slice of a positive patient shows the foci."""
    side = int(rng.integers(104, 169))
    shape = (side, int(side * rng.uniform(0.86, 1.0)))
    brain = _Head.draw(rng)
    seed = int(rng.integers(2**31))
    signal = np.stack(
        [
            _slice(np.random.default_rng([seed, i]), seed, brain, shape, i, slices, positive)
            for i in range(slices)
        ],
        axis=1,
    )
    return MrSeries(
        signal=signal * float(rng.uniform(300, 1500)),
        spacing_mm=round(float(rng.uniform(215, 250) / side), 4),
        step_mm=float(rng.choice([4.0, 5.0, 6.0])),
        echo_times_ms=(float(rng.choice([12.0, 15.0, 20.0])), float(rng.choice([80.0, 90.0, 105.0]))),
        field_t=float(rng.choice([1.5, 3.0])),
    )


@dataclass(frozen=True)
class _Head:
    height: float
    width: float
    ventricle: float
    folds: float
    fold_size: float
    turn: float
    scale: float
    bias: float
    noise: float
    tissue: NDArray[np.float64]  # per-patient factor on each row of _SIGNAL
    burden: float
    radius: float

    @staticmethod
    def draw(rng: Random) -> "_Head":
        u = rng.uniform
        return _Head(
            height=u(0.84, 0.95),
            width=u(0.72, 0.84),
            ventricle=u(0.6, 1.5),
            folds=u(0.04, 0.07),
            fold_size=u(0.02, 0.035),
            turn=u(-0.25, 0.25),
            scale=u(0.9, 1.05),
            bias=u(0.05, 0.15),
            noise=u(0.01, 0.025),
            tissue=rng.uniform(0.95, 1.05, (2, 6)),
            burden=u(1.5, 2.0),
            radius=u(0.032, 0.042),
        )


def _slice(
    rng: Random, seed: int, brain: _Head, shape: tuple[int, int], index: int, slices: int, positive: bool
) -> Image:
    """[2, H, W]: the slice at both echoes, with the same anatomy."""
    level = 2 * (index + 0.5) / slices - 1
    y, x = coordinates(np.random.default_rng(seed), shape, brain.turn, 0.05, brain.scale, 0.02)
    size = 1 - 0.12 * level**2
    high, wide = brain.height * size, brain.width * size
    scalp = ellipse(y, x, (0, 0), (high, wide))
    bone = ellipse(y, x, (0, 0), (high - 0.06, wide - 0.06))
    inside = ellipse(y, x, (0, 0), (high - 0.13, wide - 0.13))
    radius = np.sqrt((y / (high - 0.15)) ** 2 + (x / (wide - 0.15)) ** 2)
    folds = noise(rng, shape, brain.fold_size * shape[0])
    brain_mask = inside * ramp((0.98 - radius + 0.5 * brain.folds * folds) / 0.06)
    white = ramp((0.8 - radius + 1.5 * brain.folds * folds) / 0.06) * (
        1 - ellipse(y, x, (0, 0), (high, 0.012))
    )
    deep = _union(ellipse(y, x, (0.02, s * 0.2), (0.16, 0.08), s * 0.3) for s in (-1, 1))
    grow = brain.ventricle * (1 - 0.3 * abs(level))
    fluid = _union(
        ellipse(y, x, (cy, s * 0.09), (0.2 * grow, 0.055 * grow), s * t)
        for s in (-1, 1)
        for cy, t in ((-0.17, 0.35), (0.2, -0.45))
    )
    tissue = np.clip(brain_mask - fluid, 0, 1)
    pattern = finding(rng, tissue * (radius < 0.9), positive, 18, brain.radius * shape[0])
    return np.stack(
        [
            _echo(
                rng,
                brain,
                _SIGNAL[e] * brain.tissue[e],
                scalp,
                bone,
                inside,
                tissue,
                white * (1 - 0.7 * deep),
                pattern,
            )
            for e in range(2)
        ]
    )


def _echo(
    rng: Random,
    brain: _Head,
    signal: NDArray[np.float64],
    scalp: Image,
    bone: Image,
    inside: Image,
    tissue: Image,
    white: Image,
    pattern: Image,
) -> Image:
    shape = (scalp.shape[0], scalp.shape[1])
    fat, skull, csf, grey, pale, lesion = signal
    image = scalp * fat + bone * (skull - fat) + inside * (csf - skull)
    image = image * (1 - tissue) + tissue * (grey + (pale - grey) * white)
    image = image + brain.burden * 0.5 * lesion * pattern
    image *= np.exp(brain.bias * noise(rng, shape, 0.4 * min(shape)))
    # Magnitude of complex noise: Rician, as in MR.
    real = image + brain.noise * noise(rng, shape, 0.5)
    imaginary = brain.noise * noise(rng, shape, 0.5)
    return np.asarray(np.hypot(np.maximum(real, 0), imaginary), np.float32)


def _union(parts: Iterable[Image]) -> Image:
    return reduce(np.maximum, parts)
