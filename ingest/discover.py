"""Walk the sources: what each file is, its identity, and what belongs together. Nothing is decoded here."""

import hashlib
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ingest.archives import PREFIX_BYTES, Member, archive_kind, open_archive, opened, prepared
from ingest.config import IngestConfig, ReadRules
from ingest.dicom.admit import admit_class
from ingest.dicom.header import open_dataset, quiet, text
from ingest.dicom.syntaxes import check_decoders
from ingest.frames import Refused
from ingest.places import not_inputs
from ingest.sniff import HEAD_BYTES, read_head, sniff
from ingest.sources import open_source
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
_WHOLE_BYTES, _BLOCKS = 1 << 20, 64
ANY_SIZE = ReadRules.model_validate(
    {"max_member_bytes": 1 << 62, "max_members": 1 << 40}
)  # the inventory has held it to its limits
_SUBJECT = re.compile(r"sub-([A-Za-z0-9]+)(?:$|[_.])")


@dataclass(frozen=True)
class Entry:
    """One input file. Private: nothing of it but pseudonyms leaves the run.

    identity: digest of relative path, size and content (content_of): another file under the same name is
    another input. source: `relative`, after the folder of the source and // where files of several sources
    have that path. group: files of one group stay in one unit (a series and its duplicates).
    """

    path: str
    relative: str  # to its source, POSIX
    source: str
    size: int
    kind: str  # dicom | nifti | raster | other
    identity: str
    modality: str = "none"  # partition
    group: str = ""
    patient: str = ""  # of a table or a BIDS path; DICOM says it itself
    split: str = ""  # override of a table
    listed: bool = False
    salt: str = ""  # in the identity: tells files of several sources apart that are otherwise equal
    hint: str = ""  # reason of a refusal that the header scan foresees, for the plan
    member: str = ""  # key of a file of the archive at `path` (ingest.archives)
    order: int = 0  # in a compressed tar, which is read forwards
    absent: bool = False  # listed in a table, but not there


class NothingToIngestError(UserError):
    """The sources hold nothing that can become an image, so far."""


def inventory(config: IngestConfig, progress: Callable[[int], None] | None = None) -> list[Entry]:
    """Every file under the sources, in a fixed order. progress is called with the number of files so far.

    Raises UserError as `scan`.
    """
    return told_apart(list(scan(config, progress)), config)


def scan(config: IngestConfig, progress: Callable[[int], None] | None = None) -> Iterator[Entry]:
    """`inventory` one by one, before those of equal identity are told apart.

    Raises UserError for a missing or empty source, where nothing in it can be an image, and for missing
    decoders.
    """
    check_decoders()
    found = settled_files(config)
    if not found:
        raise NothingToIngestError(
            "the source folder is empty: give a folder that holds DICOM, NIfTI or listed images"
        )
    tables = [path for path, _, _ in found if Path(path).name == DISCOVERED_NAME and config.discover_tables]
    listed, used = listings(config, tables)
    sources = source_names(config.sources)
    several = {relative for relative, n in Counter(relative for _, relative, _ in found).items() if n > 1}
    count, usable, members = 0, False, list[Entry]()
    for path, relative, root in found:
        real = os.path.realpath(path)
        if real in used:
            continue  # a table is configuration, not an input
        source = f"{sources[root]}//{relative}" if relative in several else relative
        for entry in _entries(path, relative, source, real, listed, config):
            usable = usable or entry.kind in ("dicom", "nifti") or entry.listed
            members += [entry] if listed and entry.member else []
            count += 1
            yield entry
        if progress is not None:
            progress(count)
    yield from _absent(listed, found, members, config)
    if not usable:
        raise NothingToIngestError(
            "the sources hold no DICOM, no NIfTI and no image that a table lists: "
            "give another folder, or a table with the columns file and modality"
        )


def identity_of(relative: str, size: int, content: bytes, salt: str = "") -> str:
    return digest("input", relative, str(size), content, salt or "0")


def content_of(path: str, size: int, head: bytes, kind: str) -> bytes:
    """What of a file's content makes its identity.

    Of DICOM the first 4096 bytes, which hold its UIDs. Headers of other kinds are often equal: the sha256 of
    all up to 1 MiB, else of blocks of 4096 bytes spread from the first to the last one.
    """
    if kind == "dicom" or size <= len(head):
        return head
    hasher = hashlib.sha256(head)
    try:
        with open_source(path) as file:
            if size <= _WHOLE_BYTES:
                return hashlib.file_digest(file, "sha256").digest()
            for block in range(1, _BLOCKS + 1):
                file.seek((size - HEAD_BYTES) * block // _BLOCKS)
                hasher.update(file.read(HEAD_BYTES))
    except OSError:
        return head
    return hasher.digest()


def unchanged(entry: Entry) -> bool:
    """Whether the file is still what the inventory saw."""
    if entry.member:
        return _member_unchanged(entry)
    head = read_head(entry.path)
    size = 0 if head is None else _size(entry.path)
    content = content_of(entry.path, size, head or b"", entry.kind)
    return identity_of(entry.relative, size, content, entry.salt) == entry.identity


def source_names(sources: Sequence[str]) -> dict[str, str]:
    """A name of each absolute source path: its last part, or as many as tell it from the other sources."""
    roots = [os.path.abspath(source) for source in sources]  # noqa: PTH100 - Path.resolve would follow links
    names = {}
    for root in roots:
        parts = Path(root).parts[1:]
        others = [Path(other).parts[1:] for other in roots if other != root]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names[root] = "/".join(parts[-length:])
    return names


def told_apart(entries: list[Entry], config: IngestConfig) -> list[Entry]:
    """Entries of equal identity get a salt by content, so that the order of the sources tells nothing.

    Equal files are numbered: which of them is which does not matter. Different ones are told apart by all of
    their content.
    """
    equal: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        equal[entry.identity].append(entry)
    found = []
    for entry in entries:
        members = equal[entry.identity]
        if len(members) == 1:
            found.append(entry)
            continue
        hashes = {member.source: _content_sha256(member, config) for member in members}
        mine = hashes[entry.source]
        number = sorted(source for source, value in hashes.items() if value == mine).index(entry.source)
        parts = ([mine] if len(set(hashes.values())) > 1 else []) + ([str(number)] if number else [])
        salt = "/".join(parts)
        if entry.member:
            content = _member_content(entry, config.rules())
        else:
            head = read_head(entry.path)
            content = content_of(entry.path, entry.size, head or b"", entry.kind)
        found.append(
            replace(entry, salt=salt, identity=identity_of(entry.relative, entry.size, content, salt))
        )
    return found


def _sha256(path: str) -> str:
    try:
        with open_source(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _absent(
    listed: Mapping[str, Listing],
    found: Iterable[tuple[str, str, str]],
    entries: Sequence[Entry],
    config: IngestConfig,
) -> list[Entry]:
    """An input to refuse for every file that a table lists and that lies in no source."""
    taken = {os.path.realpath(path) for path, _, _ in found}
    taken |= {
        os.path.realpath(e.path) + e.relative.partition(Path(e.path).name)[2] for e in entries if e.member
    }
    names = source_names(config.sources)
    roots = {os.path.realpath(root): name for root, name in names.items()}
    absent = []
    for path in sorted(listed.keys() - taken):
        below = next((root for root in roots if Path(path).is_relative_to(root)), None)
        relative = os.path.relpath(path, below or listed[path].folder).replace(os.sep, "/")
        relative = relative.encode("utf-8", "backslashreplace").decode()
        source = relative if below is None or len(roots) == 1 else f"{roots[below]}//{relative}"
        identity = identity_of(relative, 0, b"", f"absent {source}")
        hint = Reason.SOURCE_MISSING.value
        absent.append(Entry(path, relative, source, 0, "other", identity, absent=True, hint=hint))
    return absent


def settled_files(config: IngestConfig) -> list[tuple[str, str, str]]:
    """(path, path relative to its source, source) of the files that settle_seconds lets through.

    By ctime, which no copy can set back: `cp -p` and rsync give a file its old mtime. Raises UserError.
    """
    found = list(_walk(config))
    if not config.settle_seconds:
        return found
    latest = time.time() - config.settle_seconds
    return [item for item in found if _changed(item[0]) <= latest]


def _changed(path: str) -> float:
    try:
        return os.stat(path).st_ctime  # noqa: PTH116 - one call a file of millions
    except OSError:
        return float("inf")  # gone again


def _walk(config: IngestConfig) -> Iterator[tuple[str, str, str]]:
    """(absolute path, path relative to its source, source) of every file, each once, in a fixed order."""
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
                # File names may hold bytes that are no UTF-8: kept apart, but representable.
                yield path, relative.encode("utf-8", "backslashreplace").decode(), root


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


def _entry(path: str, relative: str, source: str, listing: Listing | None, config: IngestConfig) -> Entry:
    head = read_head(path)
    if head is None:
        identity = identity_of(relative, 0, b"")
        return Entry(path, relative, source, 0, "other", identity, hint=Reason.NOT_AN_IMAGE.value)
    size, kind = _size(path), sniff(head)
    identity = identity_of(relative, size, content_of(path, size, head, kind))
    if kind == "dicom":
        modality, group, hint = _scan_dicom(path, config)
        return Entry(path, relative, source, size, kind, identity, modality, group, hint=hint)
    return _described(Entry(path, relative, source, size, kind, identity), listing, config)


def _entries(
    path: str, relative: str, source: str, real: str, listed: Mapping[str, Listing], config: IngestConfig
) -> Iterator[Entry]:
    """The input at a path, or those of the archive there."""
    kind = archive_kind(read_head(path) or b"")
    if not kind:
        yield _entry(path, relative, source, listed.get(real), config)
        return
    names: Counter[str] = Counter()
    try:
        with open_source(path) as file:
            archive = open_archive(file, kind, config.rules())
            if archive is None:
                yield _entry(path, relative, source, listed.get(real), config)
                return
            for order, member in enumerate(archive.members()):
                name = member.name.encode("utf-8", "backslashreplace").decode()
                names[name] += 1
                inner = f"/{name}" + (f"#{names[name]}" if names[name] > 1 else "")
                group = f"\0archive\0{source}" if archive.sequential else ""
                entry = _member_entry(
                    path, relative + inner, source + inner, member, listed.get(real + inner), config
                )
                yield replace(entry, group=group, order=order) if group else entry
    except (Refused, OSError) as error:
        reason = error.reason if isinstance(error, Refused) else Reason.UNREADABLE
        identity = identity_of(relative, _size(path), reason.value.encode())
        yield Entry(
            path, relative, source, 0, "other", identity, hint=reason.value, member=f"!{reason.value}"
        )


def _member_entry(
    path: str, relative: str, source: str, member: Member, listing: Listing | None, config: IngestConfig
) -> Entry:
    identity = identity_of(relative, member.size, member.content)
    key = f"!{member.reason}" if member.reason else member.key
    if member.reason:
        return Entry(path, relative, source, member.size, "other", identity, hint=member.reason, member=key)
    kind = sniff(member.prefix[:HEAD_BYTES])
    entry = Entry(path, relative, source, member.size, kind, identity, member=key)
    if kind == "dicom":
        with prepared(iter([member.prefix]), len(member.prefix), PREFIX_BYTES) as local:
            modality, group, hint = _scan_dicom(local, config)
        return replace(entry, modality=modality, group=group, hint=hint)
    return _described(entry, listing, config)


def _member_content(entry: Entry, rules: ReadRules) -> bytes:
    """As Member.content. Raises Refused and OSError."""
    return opened(entry.path, rules).find(entry.member).content


def _member_unchanged(entry: Entry) -> bool:
    if entry.member.startswith("!"):
        return _size(entry.path) > 0
    try:
        member = opened(entry.path, ANY_SIZE).find(entry.member)
    except (Refused, OSError, ValueError):
        return False
    return identity_of(entry.relative, member.size, member.content, entry.salt) == entry.identity


def _content_sha256(entry: Entry, config: IngestConfig) -> str:
    """Of all of an input; of a member of what its identity holds."""
    return entry.identity if entry.member else _sha256(entry.path)


def _described(entry: Entry, listing: Listing | None, config: IngestConfig) -> Entry:
    """An input that is no DICOM, with what a table or its path say of it."""
    if entry.kind == "other" or (entry.kind == "raster" and listing is None):
        hint = Reason.NOT_AN_IMAGE if entry.kind == "other" else Reason.NOT_LISTED
        return replace(entry, hint=hint.value)
    modality = listing.modality if listing else config.nifti_modality
    patient = listing.patient if listing and listing.patient else _bids_subject(entry.relative)
    return replace(
        entry,
        modality=modality,
        group=f"{patient}\0{entry.relative}",
        patient=patient,
        split=listing.split if listing else "",
        listed=listing is not None,
        hint=Reason.MODALITY_OUT_OF_SCOPE.value if modality == "none" else "",
    )


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
