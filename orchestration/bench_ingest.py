"""`medswav bench ingest`: conversion of one worker, against what a quick script would do.

The baseline is a plain loop: pydicom reads, webdataset.TarWriter encodes PNG (16 or 8 bit) as it does, by
Pillow, and writes one tar. A second one is tuned by hand: OpenCV encodes the PNG, at its fast default. Both
check nothing, remove no identifier, compute no digest or statistics, give CT no HU and sync nothing to disk.
A worker is two processes of which one waits for the other: rates are for a second of CPU of both together,
which is what a core does in a second, whatever else the machine does.
"""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ingest.config import IngestConfig, load_config
from ingest.convert import dataset_info, run_unit
from ingest.discover import inventory
from ingest.plan import Unit, make_units
from ingest.sandbox import InlineReader, ProcessReader, Reader, process_usage
from ingest.synthetic import build
from ingest.synthetic.ct import chest
from ingest.synthetic.syntaxes import save, set_pixels
from orchestration.bench import Figure, figure, take_turns
from shards.dataset import open_or_create
from shards.errors import UserError
from shards.ids import Pseudonymizer
from shards.store import Store

PATIENTS = 12
CT_SLICES = 64
_RENDERED = 8  # slices of which the others are made by another noise
_LINKS = 16  # names of each CT file for the header scan
_GOAL_PEAK = 600e6
VERSUS = "pydicom and PNG by webdataset.TarWriter itself: no checks, digests, statistics or fsync"
TUNED = "the same with PNG by OpenCV at its fast default"
_PLAIN_FILES = 8  # of the files, for the slow baseline: what it takes does not depend on their number


def measure(seconds: float, patients: int = PATIENTS, slices: int = CT_SLICES) -> Iterator[Figure]:
    """Rates of one worker over CT slices and over files of four modalities; header scan; memory."""
    try:
        import webdataset  # noqa: F401 - here before minutes of work
    except ModuleNotFoundError:
        raise UserError("the baseline needs webdataset: run pip install 'medswav[test]'") from None
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:
        base = Path(folder)
        paths = write_slices(base / "ct", slices)
        detail = f"{slices} uncompressed 512 x 512 CT slices of 16 bits"
        yield from _case(base, "ct", "slices", paths, seconds * 0.5, detail)
        yield _headers(base, paths, seconds * 0.1)
        manifest = build(base / "mixed", patients, workers=2)
        taken = [f.file for f in manifest.accepted if f.syntax not in ("nifti", "png")]
        _keep_only(base / "mixed", taken)
        mixed = [base / "mixed" / name for name in taken]
        detail = f"{len(mixed)} generated DICOM files of four modalities"
        yield from _case(base, "mixed", "files", mixed, seconds * 0.4, detail)


def write_slices(folder: Path, count: int) -> list[Path]:
    """CT slices as scanners write them: 512 x 512, 16 bits allocated, 12 stored, about 40 header elements."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    volume = chest(rng, True, _RENDERED, side=512)
    paths = []
    for number in range(count):
        hu = volume.hu[number % _RENDERED] + (number >= _RENDERED) * rng.normal(0, 5, (512, 512))
        stored = np.clip(np.rint(hu) + 1024, 0, 4095).astype(np.uint16)
        path = folder / f"{number:04d}.dcm"
        dataset = _slice_header(number, volume.spacing_mm)
        set_pixels(dataset, stored[None], 12, ExplicitVRLittleEndian, "MONOCHROME2")
        save(dataset, path)
        paths.append(path)
    return paths


def _slice_header(number: int, spacing: float) -> Dataset:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    values: dict[str, Any] = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": f"1.2.826.0.1.3680043.8.498.9.{number + 1}",
        "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.7.1",
        "SeriesInstanceUID": f"1.2.826.0.1.3680043.8.498.8.{number // 32 + 1}",
        "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.6.1",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientID": "BENCH-1",
        "PatientName": "Bench^Mark",
        "PatientSex": "F",
        "PatientAge": "061Y",
        "PatientBirthDate": "19600101",
        "StudyDate": "20210304",
        "StudyTime": "101112",
        "AccessionNumber": "A1",
        "Manufacturer": "SIEMENS",
        "BodyPartExamined": "CHEST",
        "KVP": "120",
        "SliceThickness": "3",
        "ConvolutionKernel": "B30f",
        "PatientPosition": "HFS",
        "InstanceNumber": str(number + 1),
        "ImagePositionPatient": [-180.0, -180.0, 3.0 * number],
        "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        "PixelSpacing": [spacing, spacing],
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
        "RescaleType": "HU",
        "WindowCenter": "40",
        "WindowWidth": "400",
    }
    for name, value in values.items():
        setattr(data, name, value)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


def _keep_only(folder: Path, names: Sequence[str]) -> None:
    """Both sides get the same files: the DICOM files that are to be accepted."""
    kept = {folder / name for name in names}
    for path in [p for p in folder.rglob("*") if p.is_file() and p not in kept]:
        path.unlink()


@dataclass
class _Side:
    """What the last turn of a side gave."""

    images: int = 0
    size: int = 0
    wall: float = 0.0
    peak: int = 0


def _case(
    base: Path, case: str, what: str, paths: Sequence[Path], seconds: float, detail: str
) -> Iterator[Figure]:
    root, scratch, tar = base / "dataset", base / "scratch", base / "baseline.tar"
    config = load_config({"sources": [str(base / case)], "output": str(root)})
    names = Pseudonymizer(b"benchmark benchmark")
    units = make_units(inventory(config), config, names)
    ours, theirs, plain = _Side(), _Side(), paths[:: max(len(paths) // _PLAIN_FILES, 1)]

    def convert(reader: Reader, side: _Side) -> float:
        shutil.rmtree(root, ignore_errors=True)
        _forget_peak()
        cpu, start = _cpu(reader), time.perf_counter()
        side.images, side.size = _convert(units, config, names, root, scratch, reader)
        side.wall, used = time.perf_counter() - start, _cpu(reader) - cpu
        child = reader.usage()[1] if isinstance(reader, ProcessReader) else 0
        side.peak = process_usage(os.getpid())[1] + child
        return used

    def script(files: Sequence[Path], tuned: bool) -> float:
        start = time.process_time()
        theirs.images = _script(files, tar, config.frames_per_cine, tuned)
        theirs.size = tar.stat().st_size
        return (time.process_time() - start) * len(paths) / len(files)

    rules = config.rules()
    sandboxed = ProcessReader(rules, config.file_seconds, config.memory_mib)
    inline = InlineReader(rules)
    try:
        took, turns = take_turns(
            {
                "ours": lambda: convert(sandboxed, ours),
                "plain": lambda: script(plain, tuned=False),
                "tuned": lambda: script(paths, tuned=True),
                "inline": lambda: convert(inline, _Side()),
            },
            seconds,
        )
    finally:
        sandboxed.close()
    count, megabytes = len(paths), sum(path.stat().st_size for path in paths) / 1e6
    detail += f", {megabytes:.0f} MB, one worker, sandbox and fsync on"
    rate, unit = {side: count / took[side] for side in took}, f"{what}/s and core"
    full = detail + f", {count / ours.wall:.0f} {what}/s by the clock in the last turn"
    yield figure(f"ingest_{case}", rate["ours"], unit, rate["plain"], VERSUS, turns, full)
    yield figure(f"ingest_{case}_tuned", rate["ours"], unit, rate["tuned"], TUNED, turns, detail)
    versus = "the same without the decoder process (sandbox=inline)"
    yield figure(f"ingest_{case}_sandbox", rate["ours"], unit, rate["inline"], versus, turns, detail)
    sizes = ours.size / ours.images, theirs.size / theirs.images
    yield figure(f"ingest_{case}_image", sizes[0], "bytes", sizes[1], "PNG in a tar", turns, detail)
    versus = "the goal; most resident memory of the worker, this bench, and its decoder process together"
    yield figure(f"ingest_{case}_memory", ours.peak, "bytes", _GOAL_PEAK, versus, turns)


def _cpu(reader: Reader) -> float:
    """Seconds of CPU of this process and of the reader's."""
    return time.process_time() + (reader.usage()[0] if isinstance(reader, ProcessReader) else 0.0)


def _forget_peak() -> None:
    with suppress(OSError):  # not every kernel lets: then the peak is that of the whole bench
        Path("/proc/self/clear_refs").write_text("5")


def _headers(base: Path, paths: Sequence[Path], seconds: float) -> Figure:
    """The inventory scan, against pydicom.dcmread up to the pixels."""
    folder = base / "links"
    folder.mkdir()
    links = [folder / f"{n:02d}-{path.name}" for path in paths for n in range(_LINKS)]
    for number, link in enumerate(links):
        link.hardlink_to(paths[number // _LINKS])
    config = load_config({"sources": [str(folder)], "output": str(base / "dataset")})

    def timed(work: Any) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def plain() -> None:
        for link in links:
            pydicom.dcmread(link, stop_before_pixels=True)

    took, turns = take_turns(
        {"ours": lambda: timed(lambda: inventory(config)), "theirs": lambda: timed(plain)}, seconds
    )
    rates = [len(links) / took[side] for side in ("ours", "theirs")]
    detail = f"{len(links)} CT files: walk, identity of the content, admission; page cache warm"
    versus = "pydicom.dcmread without pixels"
    return figure("ingest_headers", rates[0], "files/s and core", rates[1], versus, turns, detail)


def _convert(
    units: Sequence[Unit],
    config: IngestConfig,
    names: Pseudonymizer,
    root: Path,
    scratch: Path,
    reader: Reader,
) -> tuple[int, int]:
    """(images, bytes of the shards) of a new dataset."""
    open_or_create(Store(root), dataset_info(config, names))
    results = [run_unit(unit, config, names, root, scratch, reader) for unit in units]
    size = sum(path.stat().st_size for path in root.glob("shards/*/*.tar"))
    return sum(sum(result.samples.values()) for result in results), size


def _script(paths: Sequence[Path], tar: Path, most_frames: int, tuned: bool) -> int:
    """The baseline; returns the number of images."""
    import webdataset

    count = 0
    with io.FileIO(tar, "w") as stream, webdataset.TarWriter(stream) as archive:
        for path in paths:
            file = pydicom.dcmread(path)
            pixels = np.asarray(file.pixel_array)
            pixels = pixels.astype(np.uint8 if pixels.dtype.itemsize == 1 else np.uint16, copy=False)
            frames = pixels if int(file.get("NumberOfFrames") or 1) > 1 else pixels[None]
            for frame in frames[:most_frames]:
                png = cv2.imencode(".png", frame)[1].tobytes() if tuned else frame
                archive.write({"__key__": f"{count:06d}", "png": png})
                count += 1
    return count
