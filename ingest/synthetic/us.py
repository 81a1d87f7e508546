"""Ultrasound: a sector of speckled layers on a screen with a text banner and a grey scale."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import Image, Random, finding, noise

Screen = NDArray[np.uint8]


@dataclass(frozen=True)
class UsImage:
    frames: NDArray[np.uint8]  # [frames, H, W, 3], RGB
    region: tuple[int, int, int, int]  # x0, y0, x1, y1, inclusive, px: where the sector lies
    spacing_mm: float


def scans(rng: Random, positive: bool, frame_counts: list[int], banner: tuple[str, ...]) -> list[UsImage]:
    """Screens of one patient, one a number of frames; `banner` is burned in outside the region."""
    probe = _Probe.draw(rng)
    seed = int(rng.integers(2**31))
    return [
        _scan(np.random.default_rng([seed, i]), probe, positive, count, banner)
        for i, count in enumerate(frame_counts)
    ]


@dataclass(frozen=True)
class _Probe:
    angle: float  # half the opening of the sector, rad
    near: float  # radius of the probe, as a share of the depth
    tint: tuple[float, float, float]
    speckle: float
    layers: float
    burden: float
    radius: float

    @staticmethod
    def draw(rng: Random) -> "_Probe":
        u = rng.uniform
        return _Probe(
            angle=u(0.5, 0.8),
            near=u(0.15, 0.5),
            tint=(u(0.9, 1), u(0.92, 1), u(0.88, 1)),
            speckle=u(0.9, 1.6),
            layers=u(0.3, 0.8),
            burden=u(0.55, 0.9),
            radius=u(0.035, 0.052),
        )


def _scan(rng: Random, probe: _Probe, positive: bool, count: int, banner: tuple[str, ...]) -> UsImage:
    height, width = int(rng.integers(104, 161)), int(rng.integers(112, 177))
    tissue = _tissue(rng, probe, positive, (height, width))
    rows, columns, cover = _sector(probe, (height, width))
    gain, contrast = rng.uniform(-0.12, 0.12), rng.uniform(0.75, 1.2)
    decay = rng.uniform(0.1, 0.5)  # what time-gain compensation leaves of the attenuation
    x0, y0 = int(rng.integers(6, 16)), int(rng.integers(26, 36))
    screen = _screen(rng, (height + y0 + 12, width + x0 + 24), banner)
    frames = []
    depth = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    for index in range(count):
        moved = np.roll(tissue, index, axis=1) if index else tissue
        echo = _speckle(rng, probe, moved) - decay * depth
        echo = np.clip(0.5 + gain + contrast * echo, 0, 1)
        fan = cv2.remap(echo.astype(np.float32), columns, rows, cv2.INTER_LINEAR) * cover
        frame = screen.copy()
        frame[y0 : y0 + height, x0 : x0 + width] = np.round(255 * fan[..., None] * np.array(probe.tint))
        frames.append(frame)
    return UsImage(
        np.stack(frames),
        (x0, y0, x0 + width - 1, y0 + height - 1),
        round(float(rng.uniform(60, 140)) / height, 4),
    )


def _tissue(rng: Random, probe: _Probe, positive: bool, shape: tuple[int, int]) -> Image:
    """Log echogenicity in probe coordinates (depth, angle): layers, and foci or strands."""
    wave = 0.04 * noise(rng, shape, 0.3 * shape[1])
    depth = np.linspace(0, 1, shape[0], dtype=np.float32)[:, None] + wave
    layers = 0.3 * np.sin(2 * np.pi * depth * rng.uniform(2, 4.5) + rng.uniform(0, 6))
    layers += 0.2 * noise(rng, shape, 0.12 * shape[0])
    region = np.ones(shape, np.float32)
    pattern = finding(rng, region, positive, 18, probe.radius * shape[0])
    foci = np.maximum(pattern, 0)
    # Sound passes fluid almost unweakened: brighter below a hypo-echoic focus.
    behind = cv2.blur(foci, (3, int(0.16 * shape[0]) | 1), anchor=(1, (int(0.16 * shape[0]) | 1) - 1))
    return np.asarray(
        0.25 * probe.layers * layers - 0.28 * probe.burden * (pattern - 0.4 * behind), np.float32
    )


def _speckle(rng: Random, probe: _Probe, tissue: Image) -> Image:
    """Log-compressed magnitude of correlated complex noise (fully developed speckle)."""
    shape = (tissue.shape[0], tissue.shape[1])
    real, imaginary = (noise(rng, shape, probe.speckle) for _ in range(2))
    return np.asarray(tissue + 0.08 * np.log(real**2 + imaginary**2 + 0.05), np.float32)


def _sector(probe: _Probe, shape: tuple[int, int]) -> tuple[Image, Image, Image]:
    """Where each screen pixel lies in probe coordinates (rows, columns), and the sector's mask."""
    height, width = shape
    y, x = np.meshgrid(
        np.linspace(0, 1, height, dtype=np.float32),
        np.linspace(-1, 1, width, dtype=np.float32),
        indexing="ij",
    )
    top = probe.near * np.cos(probe.angle)
    y = top + y * (1 + probe.near - top)
    x = x * (1 + probe.near) * np.sin(probe.angle)
    radius, angle = np.hypot(x, y), np.arctan2(x, y)
    rows = (radius - probe.near) * (height - 1)
    columns = (angle / probe.angle + 1) / 2 * (width - 1)
    cover = (rows >= 0) & (rows <= height - 1) & (np.abs(angle) <= probe.angle)
    return rows.astype(np.float32), columns.astype(np.float32), cover.astype(np.float32)


def _screen(rng: Random, shape: tuple[int, int], banner: tuple[str, ...]) -> Screen:
    """A black screen with the banner above and a grey scale at the right."""
    screen = np.zeros((*shape, 3), np.uint8)
    for line, text in enumerate(banner[:2]):
        cv2.putText(
            screen, text, (3, 10 + 11 * line), cv2.FONT_HERSHEY_PLAIN, 0.6, (235, 235, 160), 1, cv2.LINE_AA
        )
    bar = np.linspace(255, 0, shape[0] - 44).astype(np.uint8)
    screen[38 : 38 + len(bar), -10:-5] = bar[:, None, None]
    return screen
