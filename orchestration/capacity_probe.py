"""`medswav capacity --measure`: rates of one core of this machine, by the code that ingest and training run.

Seconds of CPU, not of the clock, so that a busy machine does not count against itself. Without a dataset the
images are generated (512 px CT, 256 px MR, 800 x 600 px US of 8 bits, 1200 x 1000 px X-ray): their size in
bytes is not that of real ones.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.config import load_config as ingest_config
from ingest.convert import dataset_info, run_unit
from ingest.discover import inventory
from ingest.plan import make_units
from ingest.sandbox import ProcessReader
from orchestration.bench_images import ct_slice, sample_of
from orchestration.bench_ingest import write_slices
from orchestration.capacity_rates import Figure
from shards import catalog
from shards.commit import commit_unit
from shards.dataset import DatasetInfo, open_or_create
from shards.errors import UserError
from shards.ids import Pseudonymizer, digest
from shards.store import Store
from trainer.augment.bands import BandStatistics
from trainer.batches import BatchMaker, fit_bands
from trainer.config import DataConfig, TrainConfig
from trainer.rows import load_rows

SLICES = 24  # uncompressed CT, 512 px
IMAGES = 6  # generated ones of each modality
_FITTED = 4  # of them, for the band statistics
_BATCH = 6
_SIZES = {"ct": (512, 512), "mr": (256, 256), "us": (600, 800), "xr": (1200, 1000)}


@dataclass(frozen=True)
class Measured:
    scan: Figure
    convert: Figure
    views: Mapping[str, Figure]
    stored_bytes: Mapping[str, Figure]
    table_row_bytes: Figure


def measure(config: TrainConfig, dataset: str, seconds: float = 1.0) -> Measured:
    """seconds: of CPU for the views of each modality. dataset: "" generates images. Raises UserError."""
    if dataset:
        catalog.counts(dataset)  # is it there?
    elif config.views.volume is not None:
        raise UserError(
            "--measure has no volumes of its own: give a dataset that holds some, --dataset FOLDER"
        )
    with tempfile.TemporaryDirectory(prefix="medswav-capacity-") as name:
        folder = Path(name)
        scan, convert = _ingest(folder)
        where, generated = (dataset, False) if dataset else (str(folder / "generated"), True)
        if generated:
            _generate(folder / "generated", folder, config.data.modalities)
        views, stored, rows = {}, {}, []
        for modality in config.data.modalities:
            table = load_rows(where, modality).table
            views[modality] = _views(config, where, modality, len(table), seconds, generated)
            sizes = table["size"].to_numpy()
            of = f"{len(sizes):,} {'generated ' if generated else ''}images"
            stored[modality] = Figure(float(sizes.mean()), "bytes an image", "measured", of)
            rows.append(table.nbytes / max(len(table), 1))
    row = Figure(float(np.mean(rows)), "bytes a row", "measured", "rows of a catalogue that is not shared")
    return Measured(scan, convert, views, stored, row)


def _ingest(folder: Path) -> tuple[Figure, Figure]:
    """Header scan and conversion of generated CT slices, with the decoder process, as a worker does it."""
    write_slices(folder / "slices", SLICES)
    config = ingest_config({"sources": [str(folder / "slices")], "output": str(folder / "ingested")})
    names = Pseudonymizer(b"capacity probe: no secret")
    entries = inventory(config)  # with the imports
    scanned = _cpu_of(lambda: inventory(config))
    units = make_units(entries, config, names)
    reader = ProcessReader(config.rules(), config.file_seconds, config.memory_mib)
    try:
        for turn in ("start", "measured"):  # the start of the decoder process is not a cost of a file
            root = folder / f"ingested-{turn}"
            open_or_create(Store(root), dataset_info(config, names))
            began = time.process_time() + (reader.usage()[0] if turn == "measured" else 0.0)
            for unit in units:
                run_unit(unit, config, names, root, folder, reader)
            used = time.process_time() + reader.usage()[0] - began
    finally:
        reader.close()
    of = f"{SLICES} generated CT slices, 512 px, uncompressed"
    return (
        Figure(len(entries) / scanned, "files/s and core", "measured", of),
        Figure(SLICES / used, "images/s and core", "measured", of),
    )


def _views(
    config: TrainConfig, dataset: str, modality: str, count: int, seconds: float, generated: bool
) -> Figure:
    """From shard bytes to all views of the preset, by trainer.batches, nothing cached."""
    size = min(_BATCH, max(count, 1))
    data = config.data.model_copy(
        update={"dataset": dataset, "modalities": (modality,), "batch_size": size, "cache_bytes": 0}
        | {"sampling": "equal", "sampling_temperature": None, "virtual_ranks": None}
        | ({"split": "train"} if generated else {})
    )
    own = config.model_copy(update={"data": DataConfig.model_validate(data.model_dump())})
    bands: Mapping[str, BandStatistics] | None = None
    if own.views.energy_probability > 0:
        bands = fit_bands(own, _FITTED)
    maker = BatchMaker(own, 0, 1, bands)
    maker(0)  # opens the dataset
    used, step = 0.0, 0
    while used < seconds:
        step += 1
        used += _cpu_of(partial(maker, step))
    of = f"{step * size} {'generated ' if generated else ''}images, {own.views.crops_text}"
    return Figure(step * size / used, "samples/s and core", "measured", of)


def _cpu_of(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _generate(root: Path, scratch: Path, modalities: tuple[str, ...]) -> None:
    store = Store(root)
    open_or_create(store, DatasetInfo("htj2k", digest("capacity"), "capacity", modalities=modalities))
    for modality in modalities:
        unit = digest("capacity", modality)
        samples = [sample_of(unit, n, modality, _pixels(modality, n)) for n in range(IMAGES)]
        commit_unit(store, unit, samples, [], scratch, len(samples))


def _pixels(modality: str, number: int) -> NDArray:
    rows, columns = _SIZES.get(modality, _SIZES["ct"])
    hu = ct_slice(number, max(rows, columns))[:rows, :columns]
    if modality == "ct":
        return hu
    unit = (hu.astype(np.float32) + 1024) / 4095
    return (unit * 255).astype(np.uint8) if modality == "us" else (unit * 4095).astype(np.uint16)
