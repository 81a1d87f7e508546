"""Walk the sources: what each file is, its identity, and what belongs together. Nothing is decoded here."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ingest.config import IngestConfig
from ingest.dicom.admit import admit_class
from ingest.dicom.header import open_dataset, quiet, text
from ingest.dicom.syntaxes import check_decoders
from ingest.frames import Refused
from ingest.places import not_inputs
from ingest.sniff import read_head, sniff
from ingest.tables import DISCOVERED_NAME, Listing, listings
from shards.errors import UserError
from shards.ids import digest
from shards.schema import Reason

_HEADER_TAGS = (
    "SOPClassUID",
    "Modality",
    "PresentationIntentType",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
)
_HEADER_LIMIT = 16 << 20  # bytes that a deflated header scan may inflate
_SUBJECT = re.compile(r"sub-([A-Za-z0-9]+)(?:$|[_.])")


@dataclass(frozen=True)
class Entry:
    """One input file. Private: nothing of it but pseudonyms leaves the run.

    identity: digest of relative path, size and first 4096 bytes: another file under the same name is
    another input. group: files of one group stay in one unit (a series and its duplicates).
    """

    path: str
    relative: str  # to its source, POSIX
    size: int
    kind: str  # dicom | nifti | raster | other
    identity: str
    modality: str = "none"  # partition
    group: str = ""
    patient: str = ""  # of a table or a BIDS path; DICOM says it itself
    split: str = ""  # override of a table
    listed: bool = False
    ordinal: int = 0  # of files with equal relative path, size and head in several sources
    hint: str = ""  # reason of a refusal that the header scan foresees, for the plan


def inventory(config: IngestConfig, progress: Callable[[int], None] | None = None) -> list[Entry]:
    """Every file under the sources, in a fixed order. progress is called with the number of files so far.

    Raises UserError for a missing or empty source, where nothing in it can be an image, and for missing
    decoders.
    """
    check_decoders()
    found = list(_walk(config))
    if not found:
        raise UserError("the source folder is empty: give a folder that holds DICOM, NIfTI or listed images")
    tables = [path for path, _ in found if Path(path).name == DISCOVERED_NAME and config.discover_tables]
    listed = listings(config, tables)
    used = {os.path.realpath(t.path) for t in config.tables} | {os.path.realpath(t) for t in tables}
    entries: list[Entry] = []
    ordinals: dict[str, int] = {}
    for path, relative in found:
        if os.path.realpath(path) in used and listed:
            continue  # a table is configuration, not an input
        entry = _entry(path, relative, listed.get(path), config, ordinals)
        entries.append(entry)
        if progress is not None:
            progress(len(entries))
    if not any(e.kind in ("dicom", "nifti") or e.listed for e in entries):
        raise UserError(
            "the sources hold no DICOM, no NIfTI and no image that a table lists: "
            "give another folder, or a table with the columns file and modality"
        )
    return entries


def identity_of(relative: str, size: int, head: bytes, ordinal: int = 0) -> str:
    return digest("input", relative, str(size), head, str(ordinal))


def unchanged(entry: Entry) -> bool:
    """Whether the file is still what the inventory saw."""
    head = read_head(entry.path)
    size = 0 if head is None else _size(entry.path)
    return identity_of(entry.relative, size, head or b"", entry.ordinal) == entry.identity


def _walk(config: IngestConfig) -> Iterator[tuple[str, str]]:
    """(absolute path, path relative to its source) of every file, each once, in a fixed order."""
    output = os.path.realpath(config.output) if config.output else ""  # `ingest plan` has none
    seen = set(not_inputs(config))
    for source in config.sources:
        root = os.path.abspath(source)  # noqa: PTH100 - Path.resolve would follow links
        if not Path(root).exists():
            raise UserError(f"the source {source} does not exist: correct the path")
        pairs = [(root, Path(root).name)] if Path(root).is_file() else _files(root, output)
        for path, relative in pairs:
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                yield path, relative


def _files(root: str, output: str) -> Iterator[tuple[str, str]]:
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError("a source folder cannot be read: give read permission")
    unreadable: list[str] = []
    visited = {os.path.realpath(root)}
    for folder, folders, names in os.walk(
        root, followlinks=True, onerror=lambda e: unreadable.append(e.filename)
    ):
        folders[:] = sorted(f for f in folders if _is_new(os.path.join(folder, f), output, visited))  # noqa: PTH118
        # A folder that cannot be read is an input that is refused, not one that is lost.
        paths = [os.path.join(folder, name) for name in sorted(names)] + unreadable  # noqa: PTH118 - faster
        unreadable.clear()
        for path in paths:
            yield path, os.path.relpath(path, root).replace(os.sep, "/")
    for path in unreadable:
        yield path, os.path.relpath(path, root).replace(os.sep, "/")


def _is_new(folder: str, output: str, visited: set[str]) -> bool:
    """Links to folders are followed once: no loops, and never into the output."""
    real = os.path.realpath(folder)
    if real == output or real in visited:
        return False
    visited.add(real)
    return True


def _entry(
    path: str, relative: str, listing: Listing | None, config: IngestConfig, ordinals: dict[str, int]
) -> Entry:
    # File names may hold bytes that are no UTF-8: kept apart, but representable.
    relative = relative.encode("utf-8", "backslashreplace").decode()
    head = read_head(path)
    if head is None:
        identity, ordinal = _numbered(ordinals, relative, 0, b"")
        return Entry(path, relative, 0, "other", identity, ordinal=ordinal, hint=Reason.NOT_AN_IMAGE.value)
    size = _size(path)
    identity, ordinal = _numbered(ordinals, relative, size, head)
    kind = sniff(head)
    if kind == "dicom":
        modality, group, hint = _scan_dicom(path, config)
        return Entry(path, relative, size, kind, identity, modality, group, ordinal=ordinal, hint=hint)
    if kind == "other" or (kind == "raster" and listing is None):
        hint = Reason.NOT_AN_IMAGE if kind == "other" else Reason.NOT_LISTED
        return Entry(path, relative, size, kind, identity, ordinal=ordinal, hint=hint.value)
    modality = listing.modality if listing else config.nifti_modality
    patient = listing.patient if listing and listing.patient else _bids_subject(relative)
    return Entry(
        path,
        relative,
        size,
        kind,
        identity,
        modality,
        group=f"{patient}\0{relative}",
        patient=patient,
        split=listing.split if listing else "",
        listed=listing is not None,
        ordinal=ordinal,
        hint=Reason.MODALITY_OUT_OF_SCOPE.value if modality == "none" else "",
    )


def _numbered(ordinals: dict[str, int], relative: str, size: int, head: bytes) -> tuple[str, int]:
    first = identity_of(relative, size, head)
    ordinal = ordinals.get(first, 0)
    ordinals[first] = ordinal + 1
    return (first if ordinal == 0 else identity_of(relative, size, head, ordinal)), ordinal


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _scan_dicom(path: str, config: IngestConfig) -> tuple[str, str, str]:
    """(partition, group, foreseen reason) from a few header elements; the pixels are never touched."""
    with quiet():
        try:
            dataset, _ = open_dataset(path, _HEADER_LIMIT, _HEADER_TAGS, pixels=False)
            group = "\0".join(
                text(dataset, k) for k in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
            )
        except Refused as refused:
            return "none", "", refused.reason.value
        except (OSError, MemoryError, RecursionError):
            return "none", "", Reason.UNREADABLE.value
        try:
            return admit_class(dataset, config)[0], group, ""
        except Refused as refused:
            return refused.modality, group, refused.reason.value


def _bids_subject(relative: str) -> str:
    """The subject label of a BIDS path (sub-01/anat/sub-01_T1w.nii), "" where there is none."""
    for part in Path(relative).parts:
        match = _SUBJECT.match(part)
        if match:
            return match.group(1)
    return ""
