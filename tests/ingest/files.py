"""Small DICOM files for the tests of ingest, and an ingest run in this process."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ingest.config import IngestConfig, load_config
from ingest.convert import UnitResult, dataset_info, run_unit
from ingest.discover import inventory
from ingest.plan import Unit, plan_units
from ingest.read import read_file
from ingest.synthetic.syntaxes import save, set_pixels
from shards.dataset import open_or_create
from shards.ids import Pseudonymizer
from shards.objects import open_store

NAMES = Pseudonymizer(b"0123456789abcdef0123456789abcdef", "north")
CLASSES = {"CT": "2", "MR": "4", "US": "6.1", "CR": "1", "DX": "1.1", "SC": "7"}


def grey(dtype="uint16", bits=12, size=(48, 40), seed=0) -> np.ndarray:
    """A noisy ramp that uses the whole range of `bits` bits, extremes included."""
    rng = np.random.default_rng(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype == "int16" else (0, 2**bits)
    values = rng.integers(low, high, size)
    values[0, 0], values[0, 1] = low, high - 1
    return values.astype(dtype)


def dataset(modality="MR", sop_class=None, number=1, patient="P1", **elements) -> Dataset:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{CLASSES[sop_class or modality]}"
    data.SOPInstanceUID = f"1.2.3.{number}"
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.3.100", f"1.2.3.200.{patient[-1:]}"
    data.Modality, data.PatientID = modality, patient
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def write(
    path: Path,
    pixels: np.ndarray | None = None,
    modality="MR",
    bits=12,
    syntax=ExplicitVRLittleEndian,
    photometric="MONOCHROME2",
    **elements,
) -> Path:
    """Write a DICOM file of pixels [H, W], [n, H, W] (frames=True) or [H, W, 3]; elements are set last."""
    frames = elements.pop("frames", False)
    names = ("sop_class", "number", "patient")
    data = dataset(modality, **{name: elements.pop(name) for name in names if name in elements})
    pixels = grey(bits=bits) if pixels is None else pixels
    set_pixels(data, pixels if frames else pixels[None], bits, syntax, photometric)
    for name, value in elements.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    save(data, path)
    return path


def config(source: Path, out: Path, **settings) -> IngestConfig:
    return load_config({"sources": [str(source)], "output": str(out), "sandbox": "inline"} | settings)


def units(settings: IngestConfig) -> list[Unit]:
    """Open the dataset, plan, record the plan: what precedes the units of a run."""
    store = open_store(settings.output)
    open_or_create(store, dataset_info(settings, NAMES))
    return list(plan_units(store, inventory(settings), settings, NAMES).units)


def ingest(source: Path, out: Path, **settings) -> list[UnitResult]:
    chosen = config(source, out, **settings)
    scratch = out.parent / f"{out.name}-scratch"
    return [run_unit(unit, chosen, NAMES, out, scratch) for unit in units(chosen)]


def read(path: Path, kind="dicom", modality="none", **rules):
    """The items of one file, read in this process."""
    return list(read_file(str(path), kind, modality, config(path, path, **rules).rules()))


def one(path: Path, kind="dicom", modality="none", **rules):
    items = read(path, kind, modality, **rules)
    assert len(items) == 1, items
    return items[0]


def tree(root: Path) -> dict[str, bytes]:
    """Every file below root with its bytes."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
