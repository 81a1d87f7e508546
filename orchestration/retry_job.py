"""`ingest quarantine retry`: refused inputs converted again, as units of their own (ingest.retry)."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestration import keys
from orchestration.ingest_job import Job, run_ingest
from orchestration.ingest_summary import IngestSummary
from orchestration.inventory_job import take_inventory

if TYPE_CHECKING:
    from ingest.config import IngestConfig


def run_retry(config: "IngestConfig", reasons: Collection[str] | None, **run: Any) -> IngestSummary:
    """Try the inputs again that were refused for these reasons (None: those that a run may mend).

    run: arguments of run_ingest. Raises UserError for settings that are not those of the dataset.
    """
    from ingest.retry import chosen_reasons

    return run_ingest(config, planned=partial(plan_retry, chosen_reasons(reasons)), **run)


def plan_retry(
    reasons: Collection[str],
    config: "IngestConfig",
    stream: TextIO | None,
    folder: Path | None,
    workers: int | None,
) -> Job:
    """The units of the retry. Writes nothing; the units are made again, the same, after a kill."""
    from ingest.convert import dataset_info
    from ingest.places import check_output
    from ingest.retry import retry_units
    from shards import dataset
    from shards.ids import Pseudonymizer
    from shards.objects import open_store
    from shards.snapshot import drop_stale

    assert folder is not None
    check_output(config)
    store = open_store(config.output)
    dataset.read_info(store)
    names = Pseudonymizer(keys.read(config.key_file, config.output), config.site)
    dataset.open_or_create(store, dataset_info(config, names))
    drop_stale(store)
    inventory = take_inventory(config, names, folder, stream, workers)
    units, absent = retry_units(store, inventory, reasons)
    said = "ingest: nothing to try again: see `ingest quarantine ls`, and --reason for other reasons"
    return Job(store, names, units, frozenset(), absent=absent, nothing=said)
