"""Image + CSV sources: which files a table lists, with modality, patient and split."""

import csv
import io
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ingest.config import IngestConfig, TableConfig, partition_of
from ingest.sources import BUFFER_BYTES, open_source, real_path
from shards.errors import UserError
from shards.objects import is_url
from shards.schema import Split

DISCOVERED_NAME = "images.csv"
_SPLITS = frozenset(split.value for split in Split) | {""}
_DEFAULT_PATIENT = TableConfig.model_fields["patient_column"].default
_SUBJECT = re.compile(r"sub-([A-Za-z0-9]+)(?:$|[_.])")


@dataclass(frozen=True)
class Listing:
    """What a table says of one file. modality: partition, "none" if out of scope. Private: patient."""

    modality: str
    patient: str
    split: str  # "" unless the table overrides the keyed split
    folder: str = ""  # real path of the folder of the table


class Listings(dict[str, Listing]):
    """What the tables of a run say, by the real path of the file."""

    @cached_property
    def splits(self) -> dict[str, str]:
        """{patient: the split that a table gives}: of all files of the patient, listed or not."""
        return {one.patient: one.split for one in self.values() if one.patient and one.split}

    @cached_property
    def splitting(self) -> bool:
        """Whether a table gives any file a split."""
        return any(one.split for one in self.values())

    def check_split(self, place: str, split: str) -> None:
        """Raise UserError where the split of a DICOM file by its PatientID is not that of its row."""
        if place in self and self[place].split not in ("", split):
            raise UserError(
                "a table gives DICOM files a split, and not the patient of their headers: its patient column "
                "must hold their PatientID (0010,0020)"
            )


def bids_subject(relative: str) -> str:
    """The subject label of a BIDS path (sub-01/anat/sub-01_T1w.nii), "" where there is none."""
    for part in Path(relative).parts:
        match = _SUBJECT.match(part)
        if match:
            return match.group(1)
    return ""


def read_rows(path: Path | str) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV, also with tabs or semicolons, by its first line. Raises UserError."""
    opened = open_source(path, BUFFER_BYTES) if isinstance(path, str) else None
    path = Path(path)
    try:
        with (
            open(path, newline="", encoding="utf-8-sig")
            if opened is None
            else io.StringIO(opened.read().decode("utf-8-sig"), newline="")
        ) as file:
            first = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=_delimiter(first), restval="")
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            rows = [{k: (v or "").strip() for k, v in row.items() if k is not None} for row in reader]
            if any("\0" in value for row in rows for value in row.values()):
                raise csv.Error
            return names, rows
    except OSError as error:
        raise UserError(f"cannot read the table {path.name}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"the table {path.name} is not a CSV in UTF-8: save it as one") from None


def _delimiter(first: str) -> str:
    if "\t" in first:
        return "\t"
    return ";" if ";" in first and "," not in first else ","


def read_table(table: TableConfig, modalities: dict[str, str]) -> Iterator[tuple[str, Listing]]:
    """(real path, listing) of every row. Raises UserError for a table without the needed columns."""
    path = Path(table.path)
    remote = is_url(table.path)
    names, rows = read_rows(table.path if remote else path)
    if table.file_column not in names:
        raise UserError(f"the table {path.name} has no column {table.file_column!r}: set file_column")
    if table.modality is None and table.modality_column not in names:
        raise UserError(
            f"the table {path.name} does not say the modality: add a column {table.modality_column!r} "
            "or set modality"
        )
    if table.split_column is not None and table.split_column not in names:
        raise UserError(f"the table {path.name} has no column {table.split_column!r}: correct split_column")
    if table.patient_column not in (None, _DEFAULT_PATIENT, *names):
        raise UserError(
            f"the table {path.name} has no column {table.patient_column!r}: correct patient_column, or set "
            "it to null, which makes every file a patient of its own"
        )
    folder = table.path.rpartition("/")[0] if remote else str(path.resolve().parent)
    for row in rows:
        name = table.modality if table.modality is not None else row[table.modality_column or ""]
        split = row[table.split_column].lower() if table.split_column else ""
        if split not in _SPLITS:
            raise UserError(f"the table {path.name} has a split that is not train, val or test: correct it")
        patient = row.get(table.patient_column or "", "") or bids_subject(row[table.file_column])
        listing = Listing(partition_of(name, modalities) or "none", patient, split, folder)
        if row[table.file_column]:
            yield _joined(folder, row[table.file_column]), listing


def _joined(folder: str, name: str) -> str:
    """The real path of a file, or the URL of an object, that a table in `folder` names."""
    if not is_url(folder):
        return os.path.realpath(Path(folder) / name)
    scheme, _, rest = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"


def listings(config: IngestConfig, discovered: list[str]) -> tuple[Listings, set[str]]:
    """Listings by real path: of the tables of the configuration, then of discovered ones; the tables used.

    A discovered file that is no such table is not used: it is an input like any other. Raises UserError for
    a table of the configuration that cannot be used, and for a patient in two splits.
    """
    found = Listings()
    for table in config.tables:
        found.update(read_table(table, config.modalities))
    used = {real_path(table.path) for table in config.tables}
    for path in discovered:
        try:
            rows = list(read_table(TableConfig(path=path), config.modalities))
        except UserError:
            continue
        used.add(real_path(path))
        for name, listing in rows:
            found.setdefault(name, listing)
    splits: dict[str, str] = {}
    for listing in found.values():
        if listing.patient and splits.setdefault(listing.patient, listing.split) != listing.split:
            raise UserError("a table has images of one patient in two splits: correct its split column")
    return found, used
