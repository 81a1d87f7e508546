"""Build a folder of generated patients: the archive that the demo and the tests ingest."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ingest.synthetic.manifest import OK, Manifest, ManifestFile
from ingest.synthetic.refused import write_refused
from ingest.synthetic.series import MODALITIES, Task, write_patient
from ingest.synthetic.workers import in_order
from shards.errors import UserError

PATIENTS = 160  # of each modality
LABELS = "labels.csv"
IMAGES = "images/images.csv"


def build(
    folder: Path,
    patients: int = PATIENTS,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write `patients` patients of each of the four modalities, half of them with a finding, and some
    files that must be refused. Equal arguments give equal bytes. `progress` is told (done, total) patients.

    labels.csv (file, label, modality, patient) names every accepted file; images/images.csv
    (file, modality, patient, label) lists the PNG radiographs of its folder. Raises UserError.
    """
    if patients < 2:
        raise UserError(f"{patients} patients cannot be with and without a finding: ask for 2 or more")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError("the folder for the generated patients is not empty: give an empty or new one")
    tasks = plan(folder, patients, seed)
    files: list[ManifestFile] = []
    identities: set[str] = set()
    for done, written in enumerate(in_order(write_patient, tasks, workers), start=1):
        files.extend(written.files)
        identities.update(written.identities)
        if progress is not None:
            progress(done, len(tasks))
    twin = next((f for f in files if f.modality == "ct"), None)
    refused, texts = write_refused(folder, seed, twin)
    files.extend(refused)
    _write_tables(folder, files)
    return Manifest(tuple(files), (LABELS, IMAGES), tuple(sorted(identities | set(texts))))


def plan(folder: Path, patients: int, seed: int) -> list[Task]:
    """One task a patient; half of each modality positive, drawn by the seed."""
    tasks = []
    for code, modality in enumerate(MODALITIES):
        rng = np.random.default_rng([seed, code, 999_999])
        positive = rng.permutation(np.arange(patients) % 2 == 0)
        # A sixth of the MR and X-ray patients are no DICOM, drawn without regard to the label.
        special = set(rng.permutation(patients)[: max(1, patients // 6)].tolist())
        form = {"mr": "nifti", "xr": "png"}.get(modality, "dicom")
        tasks += [
            Task(folder, seed, modality, i, bool(positive[i]), form if i in special else "dicom")
            for i in range(patients)
        ]
    return tasks


def _write_tables(folder: Path, files: list[ManifestFile]) -> None:
    # The duplicate is in the table too: either copy may be the one that is kept.
    labelled = [f for f in files if f.label is not None]
    rows = [(f.file, f.label, f.modality, f.patient) for f in labelled]
    (folder / LABELS).write_text(_csv(("file", "label", "modality", "patient"), rows))
    films = [f for f in labelled if f.syntax == "png" and f.expected == OK]
    pictures = [(Path(f.file).name, f.modality, f.patient, f.label) for f in films]
    (folder / IMAGES).parent.mkdir(exist_ok=True)
    (folder / IMAGES).write_text(_csv(("file", "modality", "patient", "label"), pictures))


def _csv(names: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()
