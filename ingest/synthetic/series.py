"""One generated patient of one modality: its pictures, its headers, its files."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    MRImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from ingest.synthetic import ct, mr, us, xr
from ingest.synthetic.fields import Random
from ingest.synthetic.identity import Person, header, make_person, uid
from ingest.synthetic.manifest import OK, ManifestFile
from ingest.synthetic.syntaxes import COLOR, GREY, LOSSY, save, set_pixels

MODALITIES = ("ct", "mr", "xr", "us")
_MAKERS = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips", "Canon Medical Systems")


@dataclass(frozen=True)
class Task:
    """What a worker needs to write one patient: the files depend on nothing else."""

    folder: Path
    seed: int
    modality: str
    index: int
    positive: bool
    form: str = "dicom"  # dicom | nifti (mr) | png (xr)


@dataclass(frozen=True)
class Written:
    files: tuple[ManifestFile, ...]
    identities: tuple[str, ...]


def write_patient(task: Task) -> Written:
    """Write the files of one patient below task.folder. Pure but for that: equal tasks, equal bytes."""
    code = MODALITIES.index(task.modality)
    # Three streams: the look, the file formats and the person must not change with one another.
    look, formats, people = (np.random.default_rng([task.seed, code, task.index, s]) for s in range(3))
    person = make_person(
        people, f"{task.modality.upper()}{task.seed:02d}{task.index:04d}-{people.integers(10**6)}"
    )
    writers = {"ct": _ct, "mr": _mr_nifti if task.form == "nifti" else _mr, "us": _us}
    writers["xr"] = _xr_png if task.form == "png" else _xr
    return Written(tuple(writers[task.modality](task, look, formats, person)), person.texts())


def _place(task: Task, person: Person, series: int, name: str) -> str:
    """A path such as archives have: with the patient's name in it."""
    family = person.name.replace("^", "_")
    return f"{task.modality}/{family}_{task.index:04d}/S{series:02d}/{name}"


def _syntax(formats: Random, choices: tuple[UID, ...]) -> UID:
    return choices[int(formats.integers(len(choices)))]


def _dicom(task: Task, person: Person, modality: str, sop_class: str, series: int, instance: int) -> Dataset:
    where = (task.seed, task.modality, task.index)
    data = header(
        person, modality, sop_class, uid(*where), uid(*where, series), uid(*where, series, instance)
    )
    data.SeriesNumber, data.InstanceNumber = series, instance
    data.FrameOfReferenceUID = uid(*where, "frame")
    data.Manufacturer = _MAKERS[task.index % len(_MAKERS)]
    return data


def _record(task: Task, person: Person, file: str, syntax: str, images: int = 1) -> ManifestFile:
    return ManifestFile(file, OK, task.modality, syntax, int(task.positive), person.number, images)


def _geometry(data: Dataset, spacing_mm: float, step_mm: float, index: int) -> None:
    """An axial slice: index counts towards the head (LPS)."""
    data.PixelSpacing = [spacing_mm, spacing_mm]
    data.SliceThickness = step_mm
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [
        round(-spacing_mm * data.Columns / 2, 4),
        round(-spacing_mm * data.Rows / 2, 4),
        round(index * step_mm, 4),
    ]


def _ct(task: Task, look: Random, formats: Random, person: Person) -> list[ManifestFile]:
    series = ct.chest(look, task.positive, 4)
    syntax = _syntax(formats, GREY)
    coding = int(formats.integers(4))
    files = []
    for index, hu in enumerate(series.hu):
        stored, bits, slope, intercept = store_hu(hu, coding)
        data = _dicom(task, person, "CT", CTImageStorage, 1, index + 1)
        set_pixels(data, stored[None], bits, syntax, "MONOCHROME2")
        _geometry(data, series.spacing_mm, series.step_mm, index)
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.RescaleSlope, data.RescaleIntercept, data.RescaleType = slope, intercept, "HU"
        if coding == 1:
            data.add_new(0x00280120, "SS", -2000)  # PixelPaddingValue
        data.WindowCenter, data.WindowWidth = [series.window[0], 40], [series.window[1], 400]
        data.KVP, data.BodyPartExamined = [80, 100, 120, 140][task.index % 4], "CHEST"
        name = _place(task, person, 1, f"IM{index + 1:04d}")  # no extension, as in many archives
        save(data, task.folder / name)
        files.append(_record(task, person, name, str(syntax)))
    return files


def store_hu(hu: NDArray[np.float32], coding: int) -> tuple[NDArray[np.generic], int, float, float]:
    """HU to stored values, bits stored, slope and intercept, the four ways met most."""
    height, width = hu.shape
    if coding == 0:  # unsigned, air at 24
        return np.clip(np.round(hu + 1024), 0, 4095).astype(np.uint16), 12, 1, -1024
    if coding == 1:  # signed, padding outside the reconstruction circle
        y, x = np.ogrid[-1 : 1 : 1j * height, -1 : 1 : 1j * width]
        stored = np.clip(np.round(hu), -1024, 3071)
        return np.where(y**2 + x**2 > 1.02, -2000, stored).astype(np.int16), 16, 1, 0
    if coding == 2:  # a slope that is not 1
        return np.clip(np.round((hu + 1000) / 2), -12, 2047).astype(np.int16), 16, 2, -1000
    return np.clip(np.round(hu + 1024) * 2, 0, 8191).astype(np.uint16), 13, 0.5, -1024


def _mr(task: Task, look: Random, formats: Random, person: Person) -> list[ManifestFile]:
    """Two echoes in one series, as a double-echo sequence writes them."""
    series = mr.head(look, task.positive, 2)
    syntax = _syntax(formats, GREY)
    files = []
    for number, (echo, index) in enumerate(np.ndindex(series.signal.shape[:2])):
        data = _dicom(task, person, "MR", MRImageStorage, 1, number + 1)
        stored = np.clip(np.round(series.signal[echo, index]), 0, 4095).astype(np.uint16)
        set_pixels(data, stored[None], 12, syntax, "MONOCHROME2")
        _geometry(data, series.spacing_mm, series.step_mm, index)
        data.EchoNumbers, data.EchoTime, data.RepetitionTime = echo + 1, series.echo_times_ms[echo], 2600
        data.MagneticFieldStrength, data.BodyPartExamined = series.field_t, "HEAD"
        data.ScanningSequence, data.SequenceVariant = "SE", "SK"
        name = _place(task, person, 1, f"IM{number + 1:04d}.dcm")
        save(data, task.folder / name)
        files.append(_record(task, person, name, str(syntax)))
    return files


def _mr_nifti(task: Task, look: Random, formats: Random, person: Person) -> list[ManifestFile]:
    """The T2-weighted echo as one volume, named as in BIDS; the axes may run either way."""
    series = mr.head(look, task.positive, 4)
    # Rows run to posterior, columns to the patient's left (LPS); NIfTI wants x to the right, y to anterior.
    volume = np.clip(np.round(series.signal[1].transpose(2, 1, 0)), 0, 32767).astype(np.int16)
    x, z = series.spacing_mm, series.step_mm
    affine = np.diag([-x, -x, z, 1.0])
    if formats.random() < 0.5:
        volume, affine = volume[::-1, ::-1], np.diag([x, x, z, 1.0])
    image = nib.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.header["descrip"] = person.name.encode()[:79]
    image.header["db_name"] = person.number.encode()[:17]
    image.header.extensions.append(
        nib.nifti1.Nifti1Extension("comment", f"{person.name} {person.phone}".encode())
    )
    subject = f"sub-{task.seed:02d}{task.index:04d}"
    name = f"mr/{subject}/anat/{subject}_T2w.nii.gz"
    path = task.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), 4, mtime=0))
    return [ManifestFile(name, OK, "mr", "nifti", int(task.positive), subject, volume.shape[2])]


def _xr(task: Task, look: Random, formats: Random, person: Person) -> list[ManifestFile]:
    files = []
    for index, image in enumerate(xr.radiographs(look, task.positive, 4)):
        syntax = _syntax(formats, GREY)
        bits = int(formats.choice([10, 12]))
        stored = xr.to_bits(image, bits)
        photometric = "MONOCHROME1" if formats.random() < 0.5 else "MONOCHROME2"
        if photometric == "MONOCHROME1":
            stored = (2**bits - 1 - stored).astype(np.uint16)
        data = _dicom(task, person, "CR", ComputedRadiographyImageStorage, index + 1, 1)
        set_pixels(data, stored[None], bits, syntax, photometric)
        data.ImagerPixelSpacing = [round(360 / data.Columns, 4)] * 2
        data.ViewPosition, data.BodyPartExamined = ["PA", "AP"][index % 2], "CHEST"
        data.KVP, data.BurnedInAnnotation = 110, "NO"
        name = _place(task, person, index + 1, "CR0001.dcm")
        save(data, task.folder / name)
        files.append(_record(task, person, name, str(syntax)))
    return files


def _xr_png(task: Task, look: Random, formats: Random, person: Person) -> list[ManifestFile]:
    """As in public sets: PNG files in one folder, with a CSV beside them that `build` writes."""
    files = []
    depth = 8 if formats.random() < 0.5 else 16
    for index, image in enumerate(xr.radiographs(look, task.positive, 4)):
        name = f"images/film_{task.index:04d}_{index}.png"
        path = task.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = xr.to_bits(image, depth)
        path.write_bytes(cv2.imencode(".png", pixels.astype(np.uint8) if depth == 8 else pixels)[1].tobytes())
        files.append(ManifestFile(name, OK, "xr", "png", int(task.positive), person.number))
    return files


def _us(task: Task, look: Random, formats: Random, person: Person) -> list[ManifestFile]:
    """Four stills, or two stills and a short cine."""
    counts = [1, 1, 3] if formats.random() < 0.3 else [1, 1, 1, 1]
    banner = (person.name.replace("^", ", "), f"{person.institution} {person.number}")
    files = []
    for index, scan in enumerate(us.scans(look, task.positive, counts, banner)):
        syntax = _syntax(formats, COLOR)
        data = ultrasound(task, person, scan, index + 1, syntax, ybr=formats.random() < 0.4)
        name = _place(task, person, index + 1, "US0001.dcm")
        save(data, task.folder / name)
        files.append(_record(task, person, name, str(syntax), len(scan.frames)))
    return files


def ultrasound(task: Task, person: Person, scan: us.UsImage, series: int, syntax: UID, ybr: bool) -> Dataset:
    """An ultrasound data set, a cine where the scan has several frames, with the region of its sector."""
    cine = len(scan.frames) > 1
    sop_class = UltrasoundMultiFrameImageStorage if cine else UltrasoundImageStorage
    data = _dicom(task, person, "US", sop_class, series, 1)
    frames, photometric = scan.frames, "RGB"
    if ybr and syntax not in LOSSY:
        frames, photometric = to_ybr(frames), "YBR_FULL"
    set_pixels(data, frames, 8, syntax, photometric)
    if cine:
        data.FrameTime, data.FrameIncrementPointer = 33.3, 0x00181063
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
    names = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
    for keyword, value in zip(names, scan.region, strict=True):
        setattr(region, keyword, value)
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # cm
    region.PhysicalDeltaX = region.PhysicalDeltaY = scan.spacing_mm / 10
    data.SequenceOfUltrasoundRegions = Sequence([region])
    data.BodyPartExamined = "ABDOMEN"
    return data


def to_ybr(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB to YBR_FULL, [..., 3] uint8 (PS3.3 C.7.6.3.1.2)."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], np.float32)
    return np.asarray(np.clip(np.round(frames @ matrix.T + [0, 128, 128]), 0, 255), np.uint8)
