"""`medswav bench files`: what a file costs, from few files to many: scan and plan, and all of `ingest run`.

Tiny DICOM files (34 x 34 pixels), 50 a series, in folders as an archive has them. The baseline of each number
of files is the smallest number of the same run: a ratio of 1 is a cost per file that does not grow. Each in a
process of its own, so that its peak memory is its own.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ingest.config import load_config
from ingest.sandbox import process_usage
from ingest.synthetic.syntaxes import save, set_pixels
from orchestration.bench import Figure, figure
from shards.errors import UserError

FILES = (10_000, 100_000)
CONVERT_UP_TO = 100_000
_SERIES, _FOLDER, _SIDE = 50, 100, 34
_STAMPS = {"patient": "PAT0000000", "study": "1.2.3.100.1000000", "series": "1.2.3.200.1000000"}
_INSTANCE = "1.2.3.300.100000000"


def measure(
    seconds: float, files: Sequence[float] = FILES, convert_up_to: float = CONVERT_UP_TO
) -> Iterator[Figure]:
    """ms a file, and the driver's peak memory. One turn: `seconds` is not looked at. Raises UserError."""
    sizes = sorted({int(count) for count in files})
    if not sizes or sizes[0] < 1:
        raise UserError("--files: give positive numbers")
    with tempfile.TemporaryDirectory(prefix="medswav-bench-") as name:
        base: dict[str, tuple[float, int]] = {}
        for count in sizes:
            place = Path(name) / str(count)
            write_files(place / "source", count)
            for what in ("plan", "run") if count <= convert_up_to else ("plan",):
                found = cost(place / "source", place / what, what)
                each = found["seconds"] / count * 1e3
                first, of = base.setdefault(what, (each, count))
                peak = f"driver's peak {found['peak'] / 1e6:.0f} MB"
                detail = f"{count} files in {found['seconds']:.1f} s, {peak}"
                words = {"plan": "scan and plan", "run": "the whole ingest run, Ray's start included"}[what]
                versus = f"{words}: the same for {of} files"
                yield figure(f"files_{what}_{count}", each, "ms/file", first, versus, 1, detail)


def cost(source: Path, out: Path, what: str) -> dict[str, Any]:
    """{seconds, peak: bytes of the driver} of a `plan` or `run` in a process of its own."""
    command = [sys.executable, "-m", "orchestration.bench_files", str(source), str(out), what]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def write_files(root: Path, count: int) -> None:
    """Tiny MR slices: one template, its identifiers and a few pixels exchanged."""
    root.mkdir(parents=True)
    template = _template(root / "template")
    for number in range(count):
        series = number // _SERIES
        folder = root / f"{series // _FOLDER:05d}" / f"{series:07d}"
        if number % _SERIES == 0:
            folder.mkdir(parents=True, exist_ok=True)
        data = template.replace(b"PAT0000000", b"PAT%07d" % (series // 2))
        data = data.replace(b"1.2.3.100.1000000", b"1.2.3.100.%07d" % (1_000_000 + series // 2))
        data = data.replace(b"1.2.3.200.1000000", b"1.2.3.200.%07d" % (1_000_000 + series))
        data = data.replace(_INSTANCE.encode(), b"1.2.3.300.%09d" % (100_000_000 + number))
        with open(folder / f"{number % _SERIES:02d}", "wb") as file:
            file.write(data[:-4] + number.to_bytes(4, "little"))


def _template(path: Path) -> bytes:
    data: Any = Dataset()
    data.file_meta = FileMetaDataset()
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = _INSTANCE
    data.PatientID, data.StudyInstanceUID = _STAMPS["patient"], _STAMPS["study"]
    data.SeriesInstanceUID, data.Modality = _STAMPS["series"], "MR"
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    pixels = np.random.default_rng(7).integers(0, 1 << 12, (1, _SIDE, _SIDE)).astype(np.uint16)
    set_pixels(data, pixels, 16, ExplicitVRLittleEndian, "MONOCHROME2")
    save(data, path)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def main() -> None:
    """In the process of its own."""
    from orchestration.ingest_job import plan_job, run_ingest

    source, out, what = sys.argv[1:]
    settings = {"sources": [source], "output": out}
    start = time.perf_counter()
    if what == "plan":
        plan_job(load_config(settings), io.StringIO())
    elif run_ingest(load_config(settings), stream=io.StringIO()).exit_code:
        raise UserError("the run of the bench failed: look at the machine's disk and memory")
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": process_usage(os.getpid())[1]}))


if __name__ == "__main__":
    main()
