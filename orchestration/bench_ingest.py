"""`medswav bench ingest`: conversion of one process, against what a quick script would do.

The baseline reads the same DICOM files with pydicom, encodes the pixels as PNG (16 or 8 bit) with OpenCV and
writes them to one tar. It checks nothing, removes no identifier, computes no digest or statistics, gives CT
no HU, keeps US in colour, and syncs nothing to disk: the ratio is the price of all that, and may be below 1.
"""

import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pydicom

from ingest.config import IngestConfig, load_config
from ingest.convert import dataset_info, run_unit
from ingest.discover import inventory
from ingest.plan import Unit, make_units
from ingest.synthetic import build
from orchestration.bench import Figure, figure, take_turns
from shards.dataset import open_or_create
from shards.ids import Pseudonymizer
from shards.store import Store

PATIENTS = 12
VERSUS = "pydicom, OpenCV PNG and tarfile: no checks, de-identification, digests, statistics or fsync"


def measure(seconds: float, patients: int = PATIENTS) -> Iterator[Figure]:
    """Files/s and MB/s of one process over generated DICOM files; bytes that an image takes afterwards."""
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as folder:
        base = Path(folder)
        manifest = build(base / "source", patients, workers=2)
        taken = [f.file for f in manifest.accepted if f.syntax not in ("nifti", "png")]
        _keep_only(base / "source", taken)
        paths = [base / "source" / name for name in taken]
        yield from _figures(base, paths, seconds)


def _keep_only(folder: Path, names: Sequence[str]) -> None:
    """Both sides get the same files: the DICOM files that are to be accepted."""
    kept = {folder / name for name in names}
    for path in [p for p in folder.rglob("*") if p.is_file() and p not in kept]:
        path.unlink()


def _figures(base: Path, paths: Sequence[Path], seconds: float) -> Iterator[Figure]:
    root, scratch, tar = base / "dataset", base / "scratch", base / "baseline.tar"
    config = load_config({"sources": [str(base / "source")], "output": str(root)})
    names = Pseudonymizer(b"benchmark benchmark")
    units = make_units(inventory(config), config, names)
    written = {"images": 0, "ours": 0, "images_of_theirs": 0, "theirs": 0}

    def ours() -> None:
        shutil.rmtree(root, ignore_errors=True)
        written["images"], written["ours"] = _convert(units, config, names, root, scratch)

    def theirs() -> None:
        written["images_of_theirs"] = _script(paths, tar, config.frames_per_cine)
        written["theirs"] = tar.stat().st_size

    took, turns = take_turns({"ours": ours, "theirs": theirs}, seconds)
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    detail = f"{len(paths)} generated DICOM files of four modalities, {megabytes:.0f} MB, one process"
    files = [len(paths) / took[side] for side in ("ours", "theirs")]
    yield figure("ingest_files", files[0], "files/s", files[1], VERSUS, turns, detail)
    rates = [megabytes / took[side] for side in ("ours", "theirs")]
    yield figure("ingest_source_bytes", rates[0], "MB/s", rates[1], VERSUS, turns, detail)
    sizes = written["ours"] / written["images"], written["theirs"] / written["images_of_theirs"]
    yield figure("ingest_bytes_of_an_image", sizes[0], "bytes", sizes[1], "PNG in a tar", turns, detail)


def _convert(
    units: Sequence[Unit], config: IngestConfig, names: Pseudonymizer, root: Path, scratch: Path
) -> tuple[int, int]:
    """(images, bytes of the shards) of a new dataset."""
    open_or_create(Store(root), dataset_info(config, names))
    results = [run_unit(unit, config, names, root, scratch) for unit in units]
    size = sum(path.stat().st_size for path in root.glob("shards/*/*.tar"))
    return sum(sum(result.samples.values()) for result in results), size


def _script(paths: Sequence[Path], tar: Path, most_frames: int) -> int:
    """The baseline; returns the number of images."""
    count = 0
    with tarfile.open(tar, "w") as archive:
        for path in paths:
            file = pydicom.dcmread(path)
            pixels = np.asarray(file.pixel_array)
            pixels = pixels.astype(np.uint8 if pixels.dtype.itemsize == 1 else np.uint16, copy=False)
            frames = pixels if int(file.get("NumberOfFrames") or 1) > 1 else pixels[None]
            for frame in frames[:most_frames]:
                data = cv2.imencode(".png", frame)[1]
                info = tarfile.TarInfo(f"{count:06d}.png")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data.tobytes()))
                count += 1
    return count
