"""Bleedings in and around the brain: the five types, each in its own place and shape.

epidural          a lens between skull and dura, within 22 to 36 mm of its centre
subdural          a crescent along one hemisphere, thin and wide, that does not cross the midline
subarachnoid      blood instead of fluid: in the sulci of a region, a fissure, or the basal cisterns
intraventricular  in the ventricles, fallen to their lowest place at the back, or a cast of one of them
intraparenchymal  a lump in the brain, with a dark rim of oedema
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import Random, ramp
from ingest.synthetic.head_anatomy import Head, Volume, smooth_field

TYPES = ("subarachnoid", "subdural", "epidural", "intraventricular", "intraparenchymal")
_LEAST_MM3, _LEAST_MM2 = 500.0, 30.0
_TRIES = 12


def bleeding(rng: Random, head: Head, kind: str) -> tuple[Volume, Volume]:
    """The share of blood and of oedema in each voxel, 0 to 1; drawn again where hardly any is in the head."""
    shape: Callable[[Random, Head], tuple[Volume, Volume]] = _SHAPES[kind]
    for _ in range(_TRIES):
        blood, oedema = shape(rng, head)
        amount = blood.sum() * head.grid.spacing_mm**2 * head.grid.thickness_mm
        if amount > _LEAST_MM3 and present(head, blood).any():
            break
    return blood, oedema


def present(head: Head, blood: Volume) -> NDArray[np.bool_]:
    """Which slices show it, [Z]: those with _LEAST_MM2 of blood or more."""
    area = (blood > 0.5).sum((1, 2)) * head.grid.spacing_mm**2
    return np.asarray(area >= _LEAST_MM2, np.bool_)


def put(rng: Random, head: Head, hu: Volume, blood: Volume, oedema: Volume) -> Volume:
    """HU with the bleeding: most are bright (acute), some nearly as the brain (subacute, anaemia)."""
    u, grid = rng.uniform, head.grid
    level = u(58, 78) if rng.random() < 0.85 else u(46, 58)
    clot = level + u(1, 6) * smooth_field(rng, grid, 8)
    hu = hu - oedema * u(4, 10)
    return np.asarray(hu + blood * (clot - hu), np.float32)


def _surface(rng: Random, head: Head, lowest_mm: float) -> tuple[Volume, float, float]:
    """A place on the vault: distance of each voxel to it, in mm along the skull; its side (x) and radius."""
    side = float(rng.choice([-1, 1]))
    up, around = rng.uniform(np.arcsin(lowest_mm / 68), 0.85), rng.uniform(-1.15, 1.15)
    way = np.array([np.sin(up), np.cos(up) * np.sin(around), side * np.cos(up) * np.cos(around)])
    parts = [c / h for c, h in zip((head.z, head.y, head.x), head.axes_mm, strict=True)]
    length = np.sqrt(parts[0] ** 2 + parts[1] ** 2 + parts[2] ** 2) + 1e-3
    cosine = (way[0] * parts[0] + way[1] * parts[1] + way[2] * parts[2]) / length
    radius = float(np.mean(head.axes_mm))
    return np.arccos(np.clip(cosine, -1, 1)) * radius, side, radius


def _epidural(rng: Random, head: Head) -> tuple[Volume, Volume]:
    far, _, _ = _surface(rng, head, -12)
    wide, thick = rng.uniform(22, 36), rng.uniform(10, 22)
    lens = thick * (1 - (far / wide) ** 2)
    return _within(head, ramp((lens - head.outside) / 1.2)), np.zeros_like(far)


def _subdural(rng: Random, head: Head) -> tuple[Volume, Volume]:
    far, side, _ = _surface(rng, head, 0)
    wide, thick = rng.uniform(50, 80), rng.uniform(6, 13)
    crescent = thick * np.clip(1 - (far / wide) ** 4, -2, 1) * (1 + 0.15 * smooth_field(rng, head.grid, 25))
    blood: Any = ramp((crescent - head.outside) / 1.2) * ramp((side * head.x - 3) / 1.5)
    return _within(head, blood), np.zeros_like(far)


def _subarachnoid(rng: Random, head: Head) -> tuple[Volume, Volume]:
    if rng.random() < 0.5:  # an aneurysm: cisterns and fissures of the base
        region: Any = head.ball((-26, -6, rng.uniform(-12, 12)), (20, 32, 48))
        share = rng.uniform(0.8, 1.0)
    else:  # of an injury: sulci of a convexity
        far, side, _ = _surface(rng, head, 0)
        region = ramp((rng.uniform(32, 55) - far) / 6) * ramp((side * head.x + 2) / 2)
        share = rng.uniform(0.75, 1.0)
    blood: Any = region * np.clip(2 * head.fluid, 0, 1) * (1 - head.ventricles) * share
    return _within(head, blood), np.zeros_like(blood)


def _intraventricular(rng: Random, head: Head) -> tuple[Volume, Volume]:
    if rng.random() < 0.65:  # a level in the occipital horns
        level = rng.uniform(2, 22)
        part: Any = ramp((head.y - level) / 1.5)
    else:
        side = float(rng.choice([-1, 1]))
        part = ramp((side * head.x + 1) / 1.5) * ramp((smooth_field(rng, head.grid, 18) + 0.6) * 3)
    blood = np.asarray(head.ventricles * part, np.float32)
    return blood, np.zeros_like(blood)


def _intraparenchymal(rng: Random, head: Head) -> tuple[Volume, Volume]:
    deep = rng.random() < 0.5
    side = float(rng.choice([-1, 1]))
    if deep:  # basal ganglia and thalamus
        center = (rng.uniform(-4, 12), rng.uniform(-16, 14), side * rng.uniform(14, 30))
    else:
        center = (rng.uniform(-6, 42), rng.uniform(-50, 50), side * rng.uniform(16, 42))
    size = rng.uniform(8, 19)
    radii = size * rng.uniform(0.75, 1.35, 3)
    far: Any = np.sqrt(
        sum(((c - m) / r) ** 2 for c, m, r in zip((head.z, head.y, head.x), center, radii, strict=True))
    )
    far = far + 0.14 * smooth_field(rng, head.grid, 9)
    blood = ramp((1 - far) * size / 1.5) * ramp((head.depth - 5) / 1.5)
    oedema = ramp((1 + rng.uniform(3, 8) / size - far) * size / 3) * (1 - blood)
    return _within(head, blood), _within(head, oedema)


def _within(head: Head, share: Any) -> Volume:
    return np.asarray(share * head.inside, np.float32)


_SHAPES = {
    "subarachnoid": _subarachnoid,
    "subdural": _subdural,
    "epidural": _epidural,
    "intraventricular": _intraventricular,
    "intraparenchymal": _intraparenchymal,
}
