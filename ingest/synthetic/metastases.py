"""Generated brain MR series with small bright lesions: DICOM files, and tables of what is in which slice.

    FOLDER/mr/<patient>/S01/IM....dcm    24 to 32 axial slices of 96 to 128 px
    FOLDER/slices.csv    SOPInstanceUID, label: 1 where the slice shows a lesion, else 0
    FOLDER/masks.csv     SOPInstanceUID, mask: its pixels as run lengths (ingest.run_lengths)
    FOLDER/lesions.csv   SOPInstanceUID, lesion, pixels: each lesion in each slice, for figures by size

Two thirds of the patients have 1 to 7 lesions. `ingest label`, with `--kind masks` for the second, joins the
first two tables.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from ingest import run_lengths
from ingest.synthetic.brain_mr import BrainSeries, brain
from ingest.synthetic.identity import Person, header, make_person, uid
from ingest.synthetic.syntaxes import GREY, save, set_pixels
from ingest.synthetic.workers import in_order
from shards.errors import UserError

PATIENTS = 72
SLICES_CSV, MASKS_CSV, LESIONS_CSV = "slices.csv", "masks.csv", "lesions.csv"
_MOST_LESIONS = 7
_STREAM = 77  # keeps these patients apart from those of other generated sets


@dataclass(frozen=True)
class Patient:
    """What a worker needs to write one patient. slices, side: ranges, the last one excluded."""

    folder: Path
    seed: int
    index: int
    lesions: int
    slices: tuple[int, int] = (24, 33)
    side: tuple[int, int] = (96, 129)


@dataclass(frozen=True)
class Slice:
    """One file: instance UID, mask as run lengths, pixels of each lesion in it by its number."""

    file: str
    instance: str
    mask: str
    lesions: tuple[tuple[int, int], ...]


def build(
    folder: Path,
    patients: int = PATIENTS,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    slices: tuple[int, int] = (24, 33),
    side: tuple[int, int] = (96, 129),
) -> list[Slice]:
    """Write the patients and the tables into a new or empty folder. Equal arguments give equal bytes.

    `progress` is told (done, total) patients. Raises UserError.
    """
    if patients < 3:
        raise UserError(f"{patients} patients are too few for some with and some without: ask for 3 or more")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError("the folder for the generated patients is not empty: give an empty or new one")
    rng = np.random.default_rng([seed, _STREAM])
    counts = rng.integers(1, _MOST_LESIONS + 1, patients) * (rng.permutation(patients) % 3 != 0)
    tasks = [Patient(folder, seed, i, int(n), slices, side) for i, n in enumerate(counts)]
    found: list[Slice] = []
    for done, written in enumerate(in_order(write_patient, tasks, workers, chunk=2), start=1):
        found.extend(written)
        if progress is not None:
            progress(done, patients)
    tables: dict[str, list[tuple[object, ...]]] = {
        SLICES_CSV: [("SOPInstanceUID", "label"), *((s.instance, int(bool(s.lesions))) for s in found)],
        MASKS_CSV: [("SOPInstanceUID", "mask"), *((s.instance, s.mask) for s in found)],
        LESIONS_CSV: [
            ("SOPInstanceUID", "lesion", "pixels"),
            *((s.instance, lesion, pixels) for s in found for lesion, pixels in s.lesions),
        ],
    }
    for name, rows in tables.items():
        (folder / name).write_text(_csv(rows))
    return found


def write_patient(task: Patient) -> list[Slice]:
    """Write one series. Pure but for that: equal tasks, equal bytes."""
    look, formats, people = (
        np.random.default_rng([task.seed, _STREAM, task.index, stream]) for stream in range(3)
    )
    person = make_person(people, f"MET{task.seed:02d}{task.index:04d}-{people.integers(10**6)}")
    series = brain(look, task.lesions, int(look.integers(*task.slices)), int(look.integers(*task.side)))
    syntax = GREY[int(formats.integers(len(GREY)))]
    # Names and instance numbers say nothing of the order.
    names = formats.permutation(len(series.signal))
    found = []
    for index, (signal, lesions) in enumerate(zip(series.signal, series.lesions, strict=True)):
        number = int(names[index]) + 1
        data = _data_set(task, person, series, index, number, signal.shape)
        set_pixels(data, np.clip(np.rint(signal), 0, 4095).astype(np.uint16)[None], 12, syntax, "MONOCHROME2")
        name = f"mr/{person.name.replace('^', '_')}_{task.index:04d}/S01/IM{number:04d}.dcm"
        save(data, task.folder / name)
        sizes = [(int(n), int((lesions == n).sum())) for n in np.unique(lesions) if n]
        found.append(Slice(name, str(data.SOPInstanceUID), run_lengths.encode(lesions), tuple(sizes)))
    return found


def _data_set(
    task: Patient, person: Person, series: BrainSeries, index: int, number: int, shape: Sequence[int]
) -> Dataset:
    where = (task.seed, "metastases", task.index)
    data = header(person, "MR", MRImageStorage, uid(*where), uid(*where, 1), uid(*where, 1, number))
    data.SeriesNumber, data.InstanceNumber = 1, number
    data.FrameOfReferenceUID = uid(*where, "frame")
    data.Manufacturer = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips")[task.index % 3]
    data.PixelSpacing = [series.spacing_mm, series.spacing_mm]
    data.SliceThickness = series.step_mm
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    left, top = (round(-series.spacing_mm * side / 2, 4) for side in (shape[1], shape[0]))
    data.ImagePositionPatient = [left, top, round(index * series.step_mm, 4)]
    data.EchoNumbers, data.EchoTime, data.RepetitionTime = 1, 4.2, 1800
    data.MagneticFieldStrength, data.BodyPartExamined = (1.5, 3.0)[task.index % 2], "HEAD"
    data.ScanningSequence, data.SequenceVariant = "GR", "SP"
    return data


def _csv(rows: Sequence[tuple[object, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
