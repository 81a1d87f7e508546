"""Generated head CT series with bleedings of five types, as DICOM files, and the truth about them as tables.

    FOLDER/heads/...        one series a patient; file names, numbers and order say nothing
    FOLDER/volumes.csv      SeriesInstanceUID, haemorrhage and the five types: 1 or 0
    FOLDER/slices.csv       SOPInstanceUID, slice (from the feet up), haemorrhage and the types in it

    ingest run FOLDER/heads DATASET --as slices,volumes
    ingest label DATASET FOLDER/volumes.csv --of volumes --name haemorrhage --kind multi \\
        --column haemorrhage --column subarachnoid --column subdural ...
    ingest label DATASET FOLDER/slices.csv --name haemorrhage_slices --kind classes --column haemorrhage

Half of the patients bleed. Calcifications, dense sinuses and dura, beam hardening, old infarcts, tumours,
noise and the patient's pose are drawn without regard to that.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage

from ingest.synthetic.fields import Random, blur, noise
from ingest.synthetic.head_anatomy import Grid, Head, Volume, anatomy, draw_grid, draw_head
from ingest.synthetic.head_bleeds import TYPES, bleeding, present, put
from ingest.synthetic.identity import Person, header, make_person, uid
from ingest.synthetic.series import store_hu
from ingest.synthetic.syntaxes import GREY, save, set_pixels
from ingest.synthetic.workers import in_order
from shards.errors import UserError

FINDING = "haemorrhage"
COLUMNS = (FINDING, *TYPES)
FILES, VOLUMES, SLICES = "heads", "volumes.csv", "slices.csv"
_SHARES = (0.6, 0.3, 0.1)  # of the bleeding patients: one type, two, three


@dataclass(frozen=True)
class HeadSize:
    """Lowest and highest number of slices and of pixels along a side."""

    slices: tuple[int, int] = (24, 34)
    side: tuple[int, int] = (96, 120)


@dataclass(frozen=True)
class HeadTask:
    """One patient: the files depend on nothing else. kinds: the types of bleeding."""

    folder: Path
    seed: int
    index: int
    kinds: tuple[str, ...]
    size: HeadSize = field(default_factory=HeadSize)


@dataclass(frozen=True)
class Written:
    """series: UID; slices: of each its SOP instance UID and the types in it, from the feet up."""

    series: str
    kinds: tuple[str, ...]
    slices: tuple[tuple[str, tuple[str, ...]], ...]
    identities: tuple[str, ...]


def build_heads(
    folder: Path,
    patients: int,
    seed: int = 0,
    size: HeadSize | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Write `patients` series and the tables of their truth. Equal arguments give equal bytes. `progress` is
    told (done, total). Raises UserError."""
    if patients < 2:
        raise UserError(f"{patients} patients cannot be with and without a bleeding: ask for 2 or more")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError("the folder for the generated heads is not empty: give an empty or new one")
    tasks = plan(folder, patients, seed, size or HeadSize())
    written = []
    for done, one in enumerate(in_order(write_head, tasks, workers), start=1):
        written.append(one)
        if progress is not None:
            progress(done, len(tasks))
    _write_tables(folder, written)
    return written


def plan(folder: Path, patients: int, seed: int, size: HeadSize) -> list[HeadTask]:
    """Half of the patients bleed; each type is the first of as many of them as any other."""
    rng = np.random.default_rng([seed, 5, 999_999])
    bleeds = rng.permutation(np.arange(patients) % 2 == 0)
    first = iter(rng.permutation(np.arange(int(bleeds.sum())) % len(TYPES)).tolist())
    tasks = []
    for index in range(patients):
        kinds: tuple[str, ...] = ()
        if bleeds[index]:
            count, one = 1 + int(rng.choice(len(_SHARES), p=_SHARES)), next(first)
            others = [n for n in rng.permutation(len(TYPES)).tolist() if n != one][: count - 1]
            kinds = tuple(TYPES[n] for n in sorted([one, *others]))
        tasks.append(HeadTask(folder, seed, index, kinds, size))
    return tasks


def head_series(rng: Random, kinds: Sequence[str], size: HeadSize) -> tuple[Grid, Volume, dict[str, NDArray]]:
    """Grid, HU [Z, Y, X], and for each type which slices show it, bool [Z]."""
    grid = draw_grid(rng, size.slices, size.side)
    head = draw_head(rng, grid)
    hu = anatomy(rng, head)
    shown = {}
    for kind in kinds:
        blood, oedema = bleeding(rng, head, kind)
        hu = put(rng, head, hu, blood, oedema)
        shown[kind] = present(head, blood)
    return grid, _scanned(rng, head, hu), shown


def _scanned(rng: Random, head: Head, hu: Volume) -> Volume:
    """The head rest, the scanner's resolution and noise, and how far its water is from 0 HU."""
    u, grid = rng.uniform, head.grid
    _, y, x = grid.axes()
    rest = np.abs(np.hypot(y[0] - u(-4, 4), x[0]) - u(101, 106)) < 1.6
    rest = (rest & (y[0] > u(20, 50))).astype(np.float32)
    hu = np.maximum(hu, -1000 + rest * u(850, 1150))
    sharp, level, offset = u(0.35, 0.6), u(3, 7), rng.normal(0, 1.5)
    grain = u(0.5, 0.9)
    slices = [blur(s, sharp) + level * noise(rng, (grid.side, grid.side), grain) + offset for s in hu]
    return np.asarray(np.stack(slices), np.float32)


def write_head(task: HeadTask) -> Written:
    """Write the series of one patient. Pure but for that: equal tasks, equal bytes."""
    look, formats, people = (np.random.default_rng([task.seed, 77, task.index, s]) for s in range(3))
    person = make_person(people, f"HD{task.seed:02d}{task.index:05d}-{people.integers(10**6)}")
    grid, hu, shown = head_series(look, task.kinds, task.size)
    syntax, coding = GREY[int(formats.integers(len(GREY)))], int(formats.integers(4))
    numbers = np.arange(1, grid.slices + 1)
    if formats.random() < 0.5:
        numbers = numbers[::-1]  # many scanners count from the top
    names = formats.permutation(grid.slices)
    rows = []
    for index, plane in enumerate(hu):
        data = _instance(task, person, grid, plane, index, int(numbers[index]), syntax, coding)
        place = f"{FILES}/{person.name.replace('^', '_')}_{task.index:05d}/S1/IM{names[index]:04d}"
        save(data, task.folder / place)
        rows.append((str(data.SOPInstanceUID), tuple(kind for kind in task.kinds if shown[kind][index])))
    return Written(str(uid(task.seed, "head", task.index, 1)), task.kinds, tuple(rows), person.texts())


def _instance(
    task: HeadTask, person: Person, grid: Grid, hu: Volume, index: int, number: int, syntax: UID, coding: int
) -> Dataset:
    where = (task.seed, "head", task.index)
    data = header(person, "CT", CTImageStorage, uid(*where), uid(*where, 1), uid(*where, 1, index))
    stored, bits, slope, intercept = store_hu(hu, coding)
    set_pixels(data, stored[None], bits, syntax, "MONOCHROME2")
    data.SeriesNumber, data.InstanceNumber = 1, number
    data.FrameOfReferenceUID = uid(*where, "frame")
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = slope, intercept, "HU"
    data.WindowCenter, data.WindowWidth = 40, 80
    data.KVP, data.BodyPartExamined = 120, "HEAD"
    data.PixelSpacing = [grid.spacing_mm, grid.spacing_mm]
    data.SliceThickness = grid.thickness_mm
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    corner = round(-grid.spacing_mm * (grid.side - 1) / 2, 4)
    data.ImagePositionPatient = [corner, corner, round(index * grid.thickness_mm, 4)]
    return data


def _write_tables(folder: Path, written: Sequence[Written]) -> None:
    volumes = [(one.series, *_cells(one.kinds)) for one in written]
    slices = [
        (instance, index, *_cells(kinds))
        for one in written
        for index, (instance, kinds) in enumerate(one.slices)
    ]
    (folder / VOLUMES).write_text(_csv(("SeriesInstanceUID", *COLUMNS), volumes))
    (folder / SLICES).write_text(_csv(("SOPInstanceUID", "slice", *COLUMNS), slices))


def _cells(kinds: Sequence[str]) -> tuple[int, ...]:
    return (int(bool(kinds)), *(int(kind in kinds) for kind in TYPES))


def _csv(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()
