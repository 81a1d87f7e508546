"""A folder of generated chest radiographs as DICOM, with the tables of their findings: the task `findings`.

    truth.csv        what was put into the images
    strict.csv       what two of three generated readers marked (chest_readers)
    any_reader.csv   what any of them marked
    PATIENT/...      DICOM files

A table has the columns file, SOPInstanceUID, label, x0, y0, x1, y1: a row a box, in px of the DICOM image
(chest_findings says how they count). An image without findings has one row whose label and box are empty.
Ingest reduces radiographs above xr_max_side; `ingest label --kind boxes` scales the boxes with them.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.uid import ComputedRadiographyImageStorage

from ingest.synthetic.chest_findings import exposures
from ingest.synthetic.chest_readers import Labelled, read
from ingest.synthetic.identity import header, make_person, uid
from ingest.synthetic.syntaxes import GREY, save, set_pixels
from ingest.synthetic.workers import in_order
from ingest.synthetic.xr import to_bits
from shards.errors import UserError

TABLES = ("truth", "strict", "any_reader")
COLUMNS = ("file", "SOPInstanceUID", "label", "x0", "y0", "x1", "y1")
IMAGES = 2  # exposures of a patient
_BITS = 12

Image = tuple[str, str, dict[str, list[Labelled]]]  # file, SOPInstanceUID, boxes by table


@dataclass(frozen=True)
class _Patient:
    folder: Path
    seed: int
    index: int


def build(
    folder: Path,
    patients: int,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the patients and the tables into an empty or new folder; the number of images. Equal arguments
    give equal bytes. progress is told (done, total) patients. Raises UserError."""
    if patients < 1:
        raise UserError(f"{patients} patients are none: ask for 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError("the folder for the generated patients is not empty: give an empty or new one")
    images: list[Image] = []
    every_one = [_Patient(folder, seed, i) for i in range(patients)]
    for done, written in enumerate(in_order(_write, every_one, workers), 1):
        images += written
        if progress is not None:
            progress(done, patients)
    for name in TABLES:
        (folder / f"{name}.csv").write_text(_table(name, images))
    return len(images)


def _write(patient: _Patient) -> list[Image]:
    """The files of one patient. Three streams: look, file formats and readers do not change one another."""
    where = ("chest", patient.seed, patient.index)
    look, formats, readers = (np.random.default_rng([patient.seed, patient.index, 7, s]) for s in range(3))
    person = make_person(formats, f"CX{patient.seed:02d}{patient.index:04d}-{formats.integers(10**6)}")
    images: list[Image] = []
    for number, exposure in enumerate(exposures(look, IMAGES), start=1):
        stored = to_bits(exposure.image, _BITS)
        photometric = "MONOCHROME1" if formats.random() < 0.3 else "MONOCHROME2"
        if photometric == "MONOCHROME1":
            stored = (2**_BITS - 1 - stored).astype(np.uint16)
        instance = uid(*where, number, 1)
        data = header(
            person, "CR", ComputedRadiographyImageStorage, uid(*where), uid(*where, number), instance
        )
        set_pixels(data, stored[None], _BITS, GREY[int(formats.integers(len(GREY)))], photometric)
        data.SeriesNumber, data.InstanceNumber = number, 1
        data.ImagerPixelSpacing = [round(360 / data.Columns, 4)] * 2
        data.ViewPosition, data.BodyPartExamined = "PA", "CHEST"
        data.KVP, data.BurnedInAnnotation = 110, "NO"
        name = f"{person.name.replace('^', '_')}_{patient.index:04d}/S{number:02d}/CR0001.dcm"
        save(data, patient.folder / name)
        truth = [(finding.label, finding.box) for finding in exposure.findings]
        images.append((name, str(instance), {"truth": truth, **read(readers, exposure)}))
    return images


def _table(name: str, images: Sequence[Image]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for file, instance, boxes in images:
        rows = [(label, *(f"{n:g}" for n in box)) for label, box in boxes[name]]
        writer.writerows((file, instance, *row) for row in rows or [("",) * 5])
    return text.getvalue()
