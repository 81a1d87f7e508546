"""What a run needs from its dataset before the first step; imports no torch."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from shards import catalog
from shards.errors import UserError
from shards.ids import digest
from trainer.augment.bands import BandStatistics, load_statistics, save_statistics
from trainer.batches import dataset_fingerprint as dataset_fingerprint
from trainer.batches import fit_bands
from trainer.config import TrainConfig
from trainer.files import disk_full_is_clear, new_attempt
from trainer.labels import LabelSet, label_sets
from trainer.pool import cache_warning

log = logging.getLogger(__name__)
Bands = Mapping[str, BandStatistics]


@dataclass(frozen=True)
class Prepared:
    dataset_fingerprint: str
    bands: Bands | None
    labels: tuple[LabelSet, ...] = ()

    @property
    def bands_digest(self) -> str | None:
        return bands_digest(self.bands)


def prepare(
    config: TrainConfig, run_dir: Path, progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """Identify the dataset and its labels and have its band statistics at hand, fitted into RUN/bands.json
    if the configuration names no file. For one process of a run; the others call `load_bands`.
    progress: see fit_bands. Raises UserError.

    A run that has a checkpoint keeps the statistics it began with; the fit is a function of dataset and
    configuration, so nothing is lost when it is made again.
    """
    if not config.data.dataset:
        raise UserError("data.dataset is not set: name the folder of the dataset, data.dataset=FOLDER")
    fingerprint = dataset_fingerprint(config.data.dataset)
    if config.data.node_cache is not None:
        _warn_of_small_cache(config)
    labels = label_sets(config)
    path = run_dir / "bands.json"
    if needs_fit(config, run_dir):
        with disk_full_is_clear("writing the band statistics"):
            run_dir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"bands.json.tmp-{new_attempt()}")
            save_statistics(temporary, fit_bands(config, progress=progress))
            temporary.rename(path)
    return Prepared(fingerprint, load_bands(config, run_dir), labels)


def _warn_of_small_cache(config: TrainConfig) -> None:
    data, volumes = config.data, config.views.volume is not None
    counts = catalog.counts(data.dataset, volumes=volumes)
    mean = catalog.mean_bytes(data.dataset, volumes=volumes)
    images = {m: sum(n.values()) if data.split == "all" else n[data.split] for m, n in counts.items()}
    if warning := cache_warning(data, images, mean):
        log.warning("%s", warning)


def load_bands(config: TrainConfig, run_dir: Path) -> Bands | None:
    """The band statistics of a prepared run; None where the energy augmentation is off."""
    if config.views.energy_probability == 0:
        return None
    return load_statistics(config.views.band_statistics or run_dir / "bands.json")


def bands_digest(bands: Bands | None) -> str | None:
    """Names the band statistics of a run; None where there are none."""
    if bands is None:
        return None
    parts = [json.dumps([name, asdict(bands[name])]) for name in sorted(bands)]
    return digest(*parts)


def needs_fit(config: TrainConfig, run_dir: Path) -> bool:
    """Whether `prepare` fits band statistics."""
    begun = any((run_dir / "checkpoints").glob("step-*"))
    if begun and (run_dir / "bands.json").is_file():
        return False
    return config.views.energy_probability > 0 and config.views.band_statistics is None
