"""The head without a bleeding, in Hounsfield units: skull and its base, brain, fluid, what mimics blood.

Everything is f32 [Z, Y, X] on a grid of voxel centres; anatomical places are in mm from the middle of the
head: x to the patient's left, y to the back, z to the top.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.fields import Random, ramp

Volume = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """Where voxels lie. slices from the feet to the head, thickness_mm apart."""

    slices: int
    side: int  # px, of a square slice
    thickness_mm: float
    spacing_mm: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.slices, self.side, self.side

    def axes(self) -> tuple[Volume, Volume, Volume]:
        """mm of z [Z, 1, 1], y [1, Y, 1] and x [1, 1, X]; the lowest slice is 58 mm below the middle."""
        z = -58 + (np.arange(self.slices, dtype=np.float32) + 0.5) * self.thickness_mm
        across = (np.arange(self.side, dtype=np.float32) + 0.5 - self.side / 2) * self.spacing_mm
        return z[:, None, None], across[None, :, None], across[None, None, :]


def draw_grid(rng: Random, slices: tuple[int, int], side: tuple[int, int]) -> Grid:
    """slices, side: lowest and highest number. About 145 mm from the skull base to above the vertex."""
    count, width = (int(rng.integers(low, high + 1)) for low, high in (slices, side))
    return Grid(count, width, round(146 / count, 3), round(float(rng.uniform(215, 250)) / width, 4))


def smooth_field(rng: Random, grid: Grid, cell_mm: float) -> Volume:
    """Noise of zero mean and unit variance that is smooth over about cell_mm, [Z, Y, X]."""
    axes = [axis.ravel() for axis in grid.axes()]
    counts = [int(np.ptp(axis) / cell_mm) + 5 for axis in axes]
    field = rng.standard_normal(counts, dtype=np.float32)
    for number, axis in enumerate(axes):
        place = (axis - axis[0]) / cell_mm + 2
        weights = np.exp(-((place[:, None] - np.arange(counts[number], dtype=np.float32)) ** 2))
        weights /= np.sqrt((weights**2).sum(1, keepdims=True))
        field = np.moveaxis(np.tensordot(weights, field, (1, number)), 0, number)
    return np.ascontiguousarray(field, np.float32)


@dataclass(frozen=True)
class Head:
    """Coordinates and spaces that anatomy and bleedings share."""

    grid: Grid
    x: Volume
    y: Volume
    z: Volume
    axes_mm: tuple[float, float, float]  # half axes of the inner skull: z, y, x
    outside: Volume  # mm below the inner table of the vault: negative in the bone and outside
    above_base: Volume  # mm above the floor of the skull
    ventricles: Volume  # 0 to 1
    fluid: Volume  # 0 to 1: sulci, cisterns, fissures, the space below the vault

    @cached_property
    def depth(self) -> Volume:
        """mm below the inner surface of the skull, vault or base."""
        return np.minimum(self.outside, self.above_base)

    @cached_property
    def inside(self) -> Volume:
        return ramp(self.depth / 1.2)

    def ball(self, center: tuple[float, float, float], radii: tuple[float, float, float]) -> Volume:
        """A soft ellipsoid, 0 to 1; center and radii in mm: z, y, x."""
        z, y, x = center
        far = np.sqrt(
            ((self.z - z) / radii[0]) ** 2 + ((self.y - y) / radii[1]) ** 2 + ((self.x - x) / radii[2]) ** 2
        )
        return ramp((1 - far) * (min(radii) / 2.0))


def draw_head(rng: Random, grid: Grid) -> Head:
    """A head in a random pose: turned and tilted, off the centre, its outline and symmetry disturbed."""
    u = rng.uniform
    z, y, x = _posed(rng, grid)
    half = (u(64, 72), u(76, 88), u(60, 70))
    down = np.where(z < 0, np.float32(1.7), np.float32(1.0))  # below the middle the vault goes on, as a neck
    far = np.sqrt((z / (half[0] * down)) ** 2 + (y / half[1]) ** 2 + (x / half[2]) ** 2)
    outside = np.asarray((1 - far) * np.mean(half), np.float32)
    floor = -22 - 17 * ramp((y + 28) / 5) - 16 * ramp((y - 22) / 7) + 2.0 * np.abs(np.sin(x / 9))
    head = Head(grid, x, y, z, half, outside, np.asarray(z - floor, np.float32), x, x)
    ventricles = _ventricles(rng, head) * head.inside
    fluid = _fluid(rng, head) * head.inside
    return Head(grid, x, y, z, half, outside, head.above_base, ventricles, fluid)


def anatomy(rng: Random, head: Head) -> Volume:
    """HU of the head without bleeding, table and scanner."""
    u, grid = rng.uniform, head.grid
    bone = u(5, 8.5) * (1 + 0.15 * smooth_field(rng, grid, 30))
    scalp = u(4, 9)
    hu = -1000 + ramp((head.outside + bone + scalp) / 1.2) * (1000 + u(-40, 40))
    hu += head.ball((-48, -62, 0), (30, 20, 40)) * ramp((head.outside + bone + scalp) / 1.2) * 30
    inside = head.inside
    brain = _brain(rng, head)
    hu += inside * (brain - hu)
    hu = _skull(rng, head, hu, bone)
    return np.asarray(_artefacts(rng, head, hu), np.float32)


def _posed(rng: Random, grid: Grid) -> tuple[Volume, Volume, Volume]:
    """Anatomical z, y, x of each voxel: rotation, shift, size and a smooth warp."""
    gz, gy, gx = grid.axes()
    tilt, roll, turn = np.radians(rng.normal(0, (7, 3.5, 6)))  # about x, y and z
    shift = rng.normal(0, (4, 5, 5))
    size = rng.uniform(0.93, 1.06)
    rot = _rotation(0, 1, tilt) @ _rotation(0, 2, roll) @ _rotation(1, 2, turn)
    given = [(axis - move) / size for axis, move in zip((gz, gy, gx), shift, strict=True)]
    out = []
    for row in rot:
        place = row[0] * given[0] + row[1] * given[1] + row[2] * given[2]
        out.append(np.asarray(place + 1.6 * smooth_field(rng, grid, 38), np.float32))
    return out[0], out[1], out[2]


def _rotation(a: int, b: int, angle: float) -> NDArray[np.float64]:
    found = np.eye(3)
    found[a, a] = found[b, b] = np.cos(angle)
    found[a, b], found[b, a] = -np.sin(angle), np.sin(angle)
    return found


def _ventricles(rng: Random, head: Head) -> Volume:
    """Lateral ventricles (frontal horn, body, trigone and occipital horn), third and fourth."""
    size = rng.uniform(0.75, 1.6)  # atrophy widens them
    parts = []
    for side in (-1, 1):
        own = size * rng.uniform(0.85, 1.15)
        bend = side * (9 + 0.16 * np.abs(head.y + 8) + 0.1 * np.maximum(head.y, 0)) * (0.8 + 0.2 * size)
        across = (head.x - bend) / (4.2 * own)
        arch = 12 - 0.006 * (head.y - 4) ** 2
        up = (head.z - arch) / (6.5 * own)
        along = (head.y - 6) / 42
        far = np.sqrt(across**2 + up**2 + along**4)
        parts.append(ramp((1 - far) * 2.2 * own))
    third = head.ball((-4, -2, 0), (11, 13, 1.8 * size + 0.8))
    fourth = head.ball((-34, 30, 0), (8, 6, 6 * min(size, 1.2)))
    return np.asarray(np.maximum.reduce([*parts, third, fourth]), np.float32)


def _fluid(rng: Random, head: Head) -> Volume:
    """The subarachnoid space: under the vault, sulci, Sylvian and interhemispheric fissures, cisterns."""
    age = rng.uniform(0, 1)
    rim = ramp((1.0 + 2.6 * age - head.depth) / 1.0)
    folds = smooth_field(rng, head.grid, 9)
    sulci = ramp((0.12 + 0.2 * age - np.abs(folds)) * 7) * ramp((10 + 8 * age - head.depth) / 3)
    side = np.abs(head.x)
    sylvian = head.ball((-2, -12, 0), (22, 20, 200)) * ramp((1.4 + 1.6 * age - np.abs(
        side - 42 - 0.35 * (head.y + 12) + 4 * folds)) / 1.2) * ramp((side - 30) / 4)  # fmt: skip
    suprasellar = head.ball((-30, -14, 0), (8, 10 + 3 * age, 12 + 3 * age))
    around = np.abs(np.sqrt((head.y - 12) ** 2 + head.x**2) - 19 - 1.5 * folds)
    ambient = ramp((1.8 + 1.5 * age - around) / 1.2) * ramp((9 - np.abs(head.z + 24)) / 3)
    between = ramp((0.9 + 0.8 * age - np.abs(head.x)) / 1.0) * ramp((22 - head.depth) / 4) * ramp(head.z / 8)
    return np.asarray(
        np.maximum.reduce([rim, 0.8 * sulci, sylvian, suprasellar, ambient, between]), np.float32
    )


def _brain(rng: Random, head: Head) -> Volume:
    """Grey and white matter, fluid, falx and tentorium, sinuses, and findings that are no blood."""
    u, grid = rng.uniform, head.grid
    white = u(25, 31)
    cortex = ramp((u(4.5, 7) + 2.5 * smooth_field(rng, grid, 10) - head.depth) / 1.5)
    grey = np.maximum(cortex, 0.9 * sum(head.ball((4, -4, s * 21), (13, 20, 8)) for s in (-1, 1)))
    hu = white + u(5, 9) * grey + 1.3 * smooth_field(rng, grid, 6) + 1.5 * smooth_field(rng, grid, 45)
    if rng.random() < 0.3:  # an old infarct
        hu -= _somewhere(rng, head, (8, 24)) * u(6, 16)
    if rng.random() < 0.2:  # a dense tumour with oedema: a mass, and no blood
        radius, place = u(6, 13), _place(rng, head, 14)
        hu -= head.ball(place, (1.8 * radius, 1.7 * radius, 1.7 * radius)) * u(4, 9)
        hu += head.ball(place, (radius, radius, radius)) * u(9, 19)
    fluid = np.maximum(head.fluid, head.ventricles)
    hu += fluid * (u(4, 11) - hu)
    sheet = ramp((u(0.7, 1.3) - np.abs(head.x + 0.8 * smooth_field(rng, grid, 40))) / 0.9)
    falx = sheet * ramp((head.z + 2) / 6) * ramp((u(22, 34) - head.depth) / 4)
    slope = -20 + 0.32 * np.abs(head.x) - 0.1 * (head.y - 30)
    tentorium = ramp((1.1 - np.abs(head.z - slope)) / 1.0) * ramp((head.y - 14) / 4)
    hu += np.maximum(falx, 0.7 * tentorium) * (u(42, 62) - hu)
    back = ramp((head.y - 25) / 20)
    sinus = ramp((u(3, 4.5) - np.hypot(head.x, head.outside - 3)) / 1.2) * (0.4 + 0.6 * back)
    transverse = ramp((3.2 - np.hypot(head.outside - 3, head.z - slope)) / 1.2) * ramp((head.y - 20) / 6)
    hu += np.maximum(sinus, transverse) * (u(44, 64) - hu)
    return np.asarray(_calcified(rng, head, hu), np.float32)


def _calcified(rng: Random, head: Head, hu: Volume) -> Volume:
    """Calcifications of every day: choroid plexus, pineal gland, basal ganglia, falx, anywhere."""
    u = rng.uniform
    places: list[tuple[tuple[float, float, float], float]] = []
    for side in (-1, 1):
        if rng.random() < 0.55:
            places.append(((u(4, 10), u(24, 32), side * u(16, 24)), u(1.6, 4.2)))
        if rng.random() < 0.15:
            places.append(((u(0, 8), u(-10, 4), side * u(17, 22)), u(2.5, 5.5)))
    if rng.random() < 0.6:
        places.append(((u(-6, 0), u(12, 17), u(-1, 1)), u(1.5, 3.2)))
    if rng.random() < 0.3:
        places.append(((u(25, 55), u(-45, 20), 0.0), u(1.8, 4.5)))
    places += [(_place(rng, head, 6), u(1.2, 3.0)) for _ in range(int(rng.integers(0, 3)))]
    for place, radius in places:
        hu = hu + head.ball(place, (radius, radius, radius)) * u(45, 260)
    return hu


def _skull(rng: Random, head: Head, hu: Volume, bone: Volume) -> Volume:
    """Vault with diploe, floor, petrous bones with air cells, sinuses, orbits."""
    u, grid = rng.uniform, head.grid
    shell = ramp((head.outside + bone) / 0.9) * ramp((-head.outside) / 0.9)
    middle = ramp((0.22 * bone - np.abs(head.outside + 0.5 * bone)) / 1.0)
    vault = u(850, 1250) - u(250, 550) * middle + 60 * smooth_field(rng, grid, 8)
    hu = hu + shell * (vault - hu)
    within = ramp((head.outside + 2) / 1.0)
    plate = within * ramp((4.5 - np.abs(head.above_base + 4)) / 1.2)
    holes = ramp((smooth_field(rng, grid, 11) - 0.9) * 4)
    hu += plate * (1 - holes) * (u(450, 800) - hu)
    for side in (-1, 1):
        along = (head.y - 16 + 0.55 * (np.abs(head.x) - 35)) / 9
        petrous = np.sqrt(along**2 + ((head.z + 40) / 9) ** 2 + ((head.x - side * 38) / 24) ** 2)
        wedge = ramp((1 - petrous) * 6)
        hu += wedge * (u(900, 1400) - hu)
        cells = ramp((smooth_field(rng, grid, 5) - 0.5) * 3) * head.ball((-44, 28, side * 52), (10, 13, 10))
        hu += cells * (-800 - hu)
        orbit = head.ball((-40, -66, side * 30), (14, 16, 15)) * within * ramp(-head.above_base - 2)
        hu += orbit * (-75 - hu)
        globe = head.ball((-40, -74, side * 30), (10, 10, 10)) * within
        hu += globe * ramp(-head.above_base - 2) * (12 - hu)
    if rng.random() < 0.8:
        air = head.ball((u(-20, -12), -head.axes_mm[1] - 2, u(-6, 6)), (9, 5, u(10, 22)))
        hu += air * (-900 - hu)
    nose = head.ball((-52, -50, 0), (16, 24, 14)) * ramp(-head.above_base - 4) * within
    return np.asarray(
        hu + nose * (-850 - hu) * (0.55 + 0.2 * np.sign(smooth_field(rng, grid, 9))), np.float32
    )


def _artefacts(rng: Random, head: Head, hu: Volume) -> Volume:
    """Beam hardening: a bright rim below the vault, dark and bright bands between the petrous bones."""
    u = rng.uniform
    rim = u(0, 11) * np.exp(-np.maximum(head.outside, 0) / u(3, 7))
    bands = np.sin(head.y / u(3, 6) + 0.04 * head.x + u(0, 6)) * np.exp(-(((head.z + 34) / 10) ** 2))
    return np.asarray(hu + head.inside * (rim + u(2, 13) * bands - u(0, 6) * np.abs(bands)), np.float32)


def _place(rng: Random, head: Head, least_mm: float) -> tuple[float, float, float]:
    """A place (z, y, x) in the brain, at least so deep below the skull where there is one."""
    deep = np.flatnonzero(head.depth.ravel() > least_mm)
    if not len(deep):
        return 10.0, 0.0, 20.0
    at = int(deep[rng.integers(len(deep))])
    return float(head.z.flat[at]), float(head.y.flat[at]), float(head.x.flat[at])


def _somewhere(rng: Random, head: Head, radii_mm: tuple[float, float]) -> Volume:
    size = rng.uniform(*radii_mm, 3)
    return head.ball(_place(rng, head, 8), (float(size[0]), float(size[1]), float(size[2])))
