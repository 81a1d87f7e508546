"""Image + CSV sources: which files a table lists, with modality, patient and split."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ingest.config import IngestConfig, TableConfig, partition_of
from shards.errors import UserError
from shards.schema import Split

DISCOVERED_NAME = "images.csv"
_SPLITS = frozenset(split.value for split in Split) | {""}


@dataclass(frozen=True)
class Listing:
    """What a table says of one file. modality: partition, "none" if out of scope. Private: patient."""

    modality: str
    patient: str
    split: str  # "" unless the table overrides the keyed split
    folder: str = ""  # real path of the folder of the table


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV (or TSV, by its first line). Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in first else ",", restval="")
            rows = [{k: (v or "").strip() for k, v in row.items() if k is not None} for row in reader]
            return list(reader.fieldnames or []), rows
    except OSError as error:
        raise UserError(f"cannot read the table {path.name}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"the table {path.name} is not a CSV in UTF-8: save it as one") from None


def read_table(table: TableConfig, modalities: dict[str, str]) -> Iterator[tuple[str, Listing]]:
    """(real path, listing) of every row. Raises UserError for a table without the needed columns."""
    path = Path(table.path)
    names, rows = read_rows(path)
    if table.file_column not in names:
        raise UserError(f"the table {path.name} has no column {table.file_column!r}: set file_column")
    if table.modality is None and table.modality_column not in names:
        raise UserError(
            f"the table {path.name} does not say the modality: add a column {table.modality_column!r} "
            "or set modality"
        )
    if table.split_column is not None and table.split_column not in names:
        raise UserError(f"the table {path.name} has no column {table.split_column!r}: correct split_column")
    folder = path.resolve().parent
    for row in rows:
        name = table.modality if table.modality is not None else row[table.modality_column or ""]
        split = row[table.split_column].lower() if table.split_column else ""
        if split not in _SPLITS:
            raise UserError(f"the table {path.name} has a split that is not train, val or test: correct it")
        patient = row.get(table.patient_column or "", "")
        listing = Listing(partition_of(name, modalities) or "none", patient, split, str(folder))
        if row[table.file_column]:
            yield os.path.realpath(folder / row[table.file_column]), listing


def listings(config: IngestConfig, discovered: list[str]) -> tuple[dict[str, Listing], set[str]]:
    """Listings by real path: of the tables of the configuration, then of discovered ones; the tables used.

    A discovered file that is no such table is not used: it is an input like any other. Raises UserError for
    a table of the configuration that cannot be used, and for a patient in two splits.
    """
    found: dict[str, Listing] = {}
    for table in config.tables:
        found.update(read_table(table, config.modalities))
    used = {os.path.realpath(table.path) for table in config.tables}
    for path in discovered:
        try:
            rows = list(read_table(TableConfig(path=path), config.modalities))
        except UserError:
            continue
        used.add(os.path.realpath(path))
        for name, listing in rows:
            found.setdefault(name, listing)
    splits: dict[str, str] = {}
    for listing in found.values():
        if listing.patient and splits.setdefault(listing.patient, listing.split) != listing.split:
            raise UserError("a table has images of one patient in two splits: correct its split column")
    return found, used
