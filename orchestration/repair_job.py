"""`ingest repair`: broken files of a dataset made again from the sources, one unit after the other."""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from orchestration import keys
from orchestration.cluster import process_folder
from orchestration.ingest_job import SWEEP_AGE_SECONDS
from orchestration.inventory_job import take_inventory
from orchestration.progress import Progress

if TYPE_CHECKING:
    from ingest.config import IngestConfig
    from shards.repair import Broken
    from shards.store import Store


@dataclass
class RepairSummary:
    """Files by name. lacking: {unit: inputs that the sources do not have as they were}."""

    broken: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    other_bytes: list[str] = field(default_factory=list)  # made again, they were not what was committed
    lacking: dict[str, int] = field(default_factory=dict)
    damaged_records: list[str] = field(default_factory=list)
    swept: int = 0

    @property
    def exit_code(self) -> int:
        return 0 if len(self.repaired) == len(self.broken) and not self.damaged_records else 1

    def text(self) -> str:
        left = set(self.broken) - set(self.repaired) - set(self.other_bytes)
        lines = [f"repaired  {name}" for name in self.repaired]
        lines += [f"broken    {name}" for name in self.broken if name in left]
        lines += [f"broken    {name} (made again, but with other bytes)" for name in self.other_bytes]
        lines += [f"unit {unit}: {n} inputs are not in the sources" for unit, n in self.lacking.items()]
        fix = "restore it from a copy; or delete it and run ingest run, which makes the unit"
        lines += [f"damaged   {name} ({fix})" for name in self.damaged_records]
        told = f"{len(self.repaired)} of {len(self.broken)} broken files repaired"
        swept = f"; {self.swept} leftovers removed" if self.swept else ""
        return "\n".join([*lines, (told if self.broken else "no file is broken") + swept])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def look(dataset: str, stream: TextIO | None = None) -> RepairSummary:
    """What is broken; nothing is written. Raises UserError where `dataset` is none."""
    from shards.dataset import read_info
    from shards.objects import open_store

    store = open_store(dataset)
    read_info(store)
    return _look(store, stream)[0]


def _look(store: "Store", stream: TextIO | None) -> "tuple[RepairSummary, list[Broken]]":
    from shards.commit import committed_units
    from shards.repair import find_broken

    count = len(committed_units(store))
    with Progress("repair: reading the dataset", count, "units", stream=stream) as progress:
        found, damaged = find_broken(store, progress.update)
    broken = [file.path for unit in found for file in unit.files]
    return RepairSummary(broken=broken, damaged_records=damaged), found


def run_repair(
    config: "IngestConfig", stream: TextIO | None = None, workers: int | None = None
) -> RepairSummary:
    """Find broken files and make them again from config.sources. A killed repair is run again.

    workers: of the header scan; units are made one after the other, in this process and its decoder.
    Raises UserError for settings or a key that are not those of the dataset, and for a full disk.
    """
    from ingest.convert import dataset_info
    from ingest.repair import remake, units_of
    from shards import dataset
    from shards.commit import sweep
    from shards.ids import Pseudonymizer
    from shards.objects import open_store
    from shards.records import record_name, record_unit
    from shards.snapshot import restore_records

    store = open_store(config.output)
    dataset.read_info(store)
    names = Pseudonymizer(keys.read(config.key_file, config.output), config.site)
    dataset.open_or_create(store, dataset_info(config, names))
    summary, found = _look(store, stream)
    restored = restore_records(store, [record_unit(name) for name in summary.damaged_records])
    if restored:  # now the files they name can be looked at
        summary, found = _look(store, stream)
        summary.repaired = [record_name(unit) for unit in restored]
        summary.broken += summary.repaired
    if found:
        by_unit = {broken.commit.unit: broken for broken in found}
        with tempfile.TemporaryDirectory(prefix="repair-", dir=process_folder()) as folder:
            inventory = take_inventory(config, names, Path(folder), stream, workers)
            units, summary.lacking = units_of(store, inventory, [broken.commit for broken in found])
            with Progress("repair: making units again", len(units), "units", stream=stream) as progress:
                for number, unit in enumerate(units, 1):
                    broken = by_unit[unit.unit]
                    done = remake(unit, broken, config, names, store, Path(folder))
                    summary.repaired += done
                    summary.other_bytes += [f.path for f in broken.files if f.path not in done]
                    progress.update(number)
    if not summary.damaged_records:
        summary.swept = len(sweep(store, min_age_seconds=SWEEP_AGE_SECONDS))
    return summary
