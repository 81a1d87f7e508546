"""Walk the sources: what each file is, its identity, and what belongs together. Nothing is decoded here."""

import hashlib
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ingest.archive_streams import archive_kind
from ingest.archives import PREFIX_BYTES, Member, open_archive, opened, prepared
from ingest.config import IngestConfig, ReadRules
from ingest.dicom.admit import admit_class
from ingest.dicom.header import open_dataset, quiet, text
from ingest.dicom.syntaxes import check_decoders
from ingest.frames import Refused
from ingest.identity import content_of, identity_of, seen_of, sha256_of
from ingest.pairs import image_of, is_image_of_a_header
from ingest.sniff import HEAD_BYTES, is_pair_header, read_head, sniff
from ingest.sources import is_odd, open_source, prefix, real_path, size_of
from ingest.tables import DISCOVERED_NAME, Listing, Listings, bids_subject, listings
from ingest.walk import Files, source_names
from shards.errors import UserError
from shards.objects import is_url
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
REMOTE_PREFIX_BYTES = 32 << 10  # of an object, read at once: nearly all headers up to the series
_REQUESTS = 16  # to a bucket at a time, of the header scan
_Given = tuple[str, str, str]  # path, relative, source
ANY_SIZE = ReadRules.model_validate(
    {"max_member_bytes": 1 << 62, "max_members": 1 << 40}
)  # the inventory has held it to its limits


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
    split: str = ""  # that a table gives the patient
    listed: bool = False
    salt: str = ""  # in the identity: tells files of several sources apart that are otherwise equal
    hint: str = ""  # reason of a refusal that the header scan foresees, for the plan
    member: str = ""  # key of a file of the archive at `path` (ingest.archives)
    order: int = 0  # in a compressed tar, which is read forwards
    absent: bool = False  # listed in a table, but not there
    partner: str = ""  # of the header of a NIfTI pair: its image file, which size and identity include


class NothingToIngestError(UserError):
    """The sources hold nothing that can become an image, so far."""


File = tuple[str, str, str]  # path, relative, source of an Entry
PARALLEL_FILES = 256  # fewer are scanned in this process: others take longer to start


def inventory(
    config: IngestConfig,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Entry]:
    """Every file under the sources, in a fixed order. progress is called with the number of files so far.

    note and errors: as of `scan`.
    """
    return told_apart(list(scan(config, progress, note=note)), config)


def scan(
    config: IngestConfig,
    progress: Callable[[int], None] | None = None,
    expect: Callable[[int], None] | None = None,
    scanner: "Scanner | None" = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Entry]:
    """`inventory` one by one, before those of equal identity are told apart.

    expect is called with the number of files once it is known. scanner: looks into many local files
    (ingest.scan); None: this process.

    note: is called with what the user should know of a table.

    Raises UserError for a missing or empty source, where nothing in it can be an image, for missing decoders,
    and for a table that cannot be used.
    """
    check_decoders()
    found = Files(config, (DISCOVERED_NAME,) if config.discover_tables else ())
    if not found:
        raise NothingToIngestError(
            "the source folder is empty: give a folder that holds DICOM, NIfTI or listed images"
        )
    listed, used = listings(config, found.named)
    loose = sum(not listing.patient for listing in listed.values())
    if loose and note is not None:
        note(
            f"{loose} listed files have no patient: each counts as a patient of its own, so images of one "
            "person may come into two splits; add a column `patient`, or set patient_column"
        )
    sources = source_names(config.sources)
    if expect is not None:
        expect(len(found))
    usable, members = False, list[Entry]()
    inputs = (
        (path, relative, f"{sources[root]}//{relative}" if found.several(relative) else relative)
        for path, relative, root in found
        if not used or real_path(path) not in used  # a table is configuration, not an input
    )
    elsewhere = len(found) >= PARALLEL_FILES and not any(is_url(source) for source in config.sources)
    chosen = scanner if scanner is not None and elsewhere else _scan_here
    for count, entries in enumerate(chosen(inputs, listed, config), 1):
        for entry in entries:
            usable = usable or entry.kind in ("dicom", "nifti") or entry.listed
            if listed.splitting and entry.kind == "dicom" and not entry.hint:
                listed.check_split(_place(entry), entry.split)
            members += [entry] if listed and entry.member else []
            yield entry
        if progress is not None:
            progress(count)
    yield from _absent(listed, found, members, config)
    if not usable:
        raise NothingToIngestError(
            "the sources hold no DICOM, no NIfTI and no image that a table lists: "
            "give another folder, or a table with the columns file and modality"
        )


Scanner = Callable[[Iterable[File], Listings, IngestConfig], Iterator[Iterable[Entry]]]


def _scan_here(files: Iterable[File], listed: Listings, config: IngestConfig) -> Iterator[Iterable[Entry]]:
    return _side_by_side(lambda given: entries_of(*given, listed, config), files, config)


def unchanged(entry: Entry) -> bool:
    """Whether the file is still what the inventory saw."""
    if entry.member:
        return _member_unchanged(entry)
    size, content = seen_of(entry.path, entry.kind, entry.partner)
    return identity_of(entry.relative, size, content, entry.salt) == entry.identity


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
            content = seen_of(entry.path, entry.kind, entry.partner)[1]
        found.append(
            replace(entry, salt=salt, identity=identity_of(entry.relative, entry.size, content, salt))
        )
    return found


def _absent(
    listed: Listings,
    found: Iterable[tuple[str, str, str]],
    entries: Sequence[Entry],
    config: IngestConfig,
) -> list[Entry]:
    """An input to refuse for every file that a table lists and that lies in no source."""
    if not listed:
        return []
    taken = {real for path, _, _ in found if (real := real_path(path)) in listed}
    taken |= {_place(e) for e in entries if e.member}
    names = source_names(config.sources)
    roots = {real_path(root): name for root, name in names.items()}
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


def _place(entry: Entry) -> str:
    """Where a table lists an input: its real path, of a member behind that of the archive."""
    inner = entry.relative.partition(Path(entry.path).name)[2] if entry.member else ""
    return real_path(entry.path) + inner


def _entry(path: str, relative: str, source: str, listed: Listings, config: IngestConfig) -> Entry:
    head = read_head(path)
    if head is None:
        identity = identity_of(relative, 0, b"")
        return Entry(path, relative, source, 0, "other", identity, hint=Reason.NOT_AN_IMAGE.value)
    size, kind = size_of(path), sniff(head)
    identity = identity_of(relative, size, content_of(path, size, head, kind))
    entry = Entry(path, relative, source, size, kind, identity)
    if kind == "dicom":
        return _with_header(entry, _scan_dicom(path, config), listed)
    entry = paired(entry, head)
    return _described(entry, _listing(entry, listed), listed, config)


def paired(entry: Entry, head: bytes) -> Entry:
    """An input with its image file, where it is the header of a NIfTI pair."""
    if entry.kind != "nifti" or not is_pair_header(head):
        return entry
    image = image_of(entry.path)
    if not image:
        return replace(entry, hint=Reason.PARTNER_MISSING.value)
    size, content = seen_of(entry.path, entry.kind, image)
    return replace(entry, partner=image, size=size, identity=identity_of(entry.relative, size, content))


def _listing(entry: Entry, listed: Listings) -> Listing | None:
    """What a table says of an input; a table may name either file of a pair."""
    found = listed.get(real_path(entry.path))
    return listed.get(real_path(entry.partner)) if found is None and entry.partner else found


def entries_of(
    path: str, relative: str, source: str, listed: Listings, config: IngestConfig
) -> Iterator[Entry]:
    """The input at a path, or those of the archive there; none for the image file of a NIfTI pair."""
    if is_image_of_a_header(path, config.sources):
        return
    real = real_path(path)
    if is_url(path):
        if is_odd(relative):
            yield _refused(path, relative, source, Reason.UNREADABLE)
            return
        start = prefix(path, REMOTE_PREFIX_BYTES)
        kind = archive_kind(start[:HEAD_BYTES])
        if not kind:
            yield _remote_entry(path, relative, source, start, listed, config)
            return
    kind = archive_kind(read_head(path) or b"")
    if not kind:
        yield _entry(path, relative, source, listed, config)
        return
    names: Counter[str] = Counter()
    try:
        with open_source(path) as file:
            archive = open_archive(file, kind, config.rules())
            if archive is None:
                yield _entry(path, relative, source, listed, config)
                return
            for order, member in enumerate(archive.members()):
                name = member.name.encode("utf-8", "backslashreplace").decode()
                names[name] += 1
                inner = f"/{name}" + (f"#{names[name]}" if names[name] > 1 else "")
                group = f"\0archive\0{source}" if archive.sequential else ""
                place = path, relative + inner, source + inner
                entry = _member_entry(place, member, listed.get(real + inner), listed, config)
                yield replace(entry, group=group, order=order) if group else entry
    except (Refused, OSError) as error:
        reason = error.reason if isinstance(error, Refused) else Reason.UNREADABLE
        yield _refused(path, relative, source, reason)


def _refused(path: str, relative: str, source: str, reason: Reason) -> Entry:
    """An input that is refused as a whole without being read."""
    identity = identity_of(relative, size_of(path), reason.value.encode())
    return Entry(path, relative, source, 0, "other", identity, hint=reason.value, member=f"!{reason.value}")


def _remote_entry(
    path: str, relative: str, source: str, start: bytes, listed: Listings, config: IngestConfig
) -> Entry:
    """An object, as _entry has a file: most cost one request more than the one for `start`."""
    size = len(start) if len(start) < REMOTE_PREFIX_BYTES else size_of(path)
    head = start[:HEAD_BYTES]
    kind = sniff(head)
    whole = size == len(start) and kind != "dicom" and size > len(head)
    content = hashlib.sha256(start).digest() if whole else content_of(path, size, head, kind)
    entry = Entry(path, relative, source, size, kind, identity_of(relative, size, content))
    if kind != "dicom":
        entry = paired(entry, head)
        return _described(entry, _listing(entry, listed), listed, config)
    with prepared(iter([start]), len(start), REMOTE_PREFIX_BYTES) as local:
        header = _scan_dicom(local, config)
    _, group, hint = header
    if size > len(start) and (hint or not group.rpartition("\0")[2]):  # the header goes on
        header = _scan_dicom(path, config)
    return _with_header(entry, header, listed)


def _listed(function: Callable[[_Given], Iterator[Entry]], given: _Given) -> list[Entry]:
    return list(function(given))


def _side_by_side(
    function: Callable[[_Given], Iterator[Entry]], given: Iterable[_Given], config: IngestConfig
) -> Iterator[Iterable[Entry]]:
    """function of each in order; where a source is a bucket, several requests are under way at a time."""
    if not any(is_url(source) for source in config.sources):
        yield from map(function, given)
        return
    most = min(_REQUESTS, config.open_files or _REQUESTS)
    # The parsers' loggers are shared by the threads: silenced once, around all of them.
    with quiet(), ThreadPoolExecutor(most) as pool:
        pending: deque[Future[list[Entry]]] = deque()
        try:
            for one in given:
                pending.append(pool.submit(_listed, function, one))
                if len(pending) >= 4 * most:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _member_entry(
    place: _Given, member: Member, listing: Listing | None, listed: Listings, config: IngestConfig
) -> Entry:
    path, relative, source = place
    identity = identity_of(relative, member.size, member.content)
    key = f"!{member.reason}" if member.reason else member.key
    if member.reason:
        return Entry(path, relative, source, member.size, "other", identity, hint=member.reason, member=key)
    kind = sniff(member.prefix[:HEAD_BYTES])
    entry = Entry(path, relative, source, member.size, kind, identity, member=key)
    if kind == "dicom":
        with prepared(iter([member.prefix]), len(member.prefix), PREFIX_BYTES) as local:
            return _with_header(entry, _scan_dicom(local, config), listed)
    return _described(entry, listing, listed, config)


def _member_content(entry: Entry, rules: ReadRules) -> bytes:
    """As Member.content. Raises Refused and OSError."""
    return opened(entry.path, rules).find(entry.member).content


def _member_unchanged(entry: Entry) -> bool:
    if entry.member.startswith("!"):
        return is_url(entry.path) or size_of(entry.path) > 0
    try:
        member = opened(entry.path, ANY_SIZE).find(entry.member)
    except (Refused, OSError, ValueError):
        return False
    return identity_of(entry.relative, member.size, member.content, entry.salt) == entry.identity


def _content_sha256(entry: Entry, config: IngestConfig) -> str:
    """Of all of an input; of a member of what its identity holds."""
    if entry.member:
        return entry.identity
    return sha256_of(entry.path) + (sha256_of(entry.partner) if entry.partner else "")


def _with_header(entry: Entry, header: tuple[str, str, str], listed: Listings) -> Entry:
    """A DICOM input; header: of _scan_dicom."""
    modality, group, hint = header
    split = listed.splits.get(group.partition("\0")[0], "")
    return replace(entry, modality=modality, group=group, split=split, hint=hint)


def _described(entry: Entry, listing: Listing | None, listed: Listings, config: IngestConfig) -> Entry:
    """An input that is no DICOM, with what a table or its path say of it."""
    if entry.kind == "other" or (entry.kind == "raster" and listing is None):
        hint = Reason.NOT_AN_IMAGE if entry.kind == "other" else Reason.NOT_LISTED
        return replace(entry, hint=hint.value)
    modality = listing.modality if listing else config.nifti_modality
    patient = listing.patient if listing and listing.patient else bids_subject(entry.relative)
    split = listing.split if listing else ""
    return replace(
        entry,
        modality=modality,
        group=f"{patient}\0{entry.relative}",
        patient=patient,
        split=split or listed.splits.get(patient, ""),
        listed=listing is not None,
        hint=Reason.MODALITY_OUT_OF_SCOPE.value if modality == "none" else entry.hint,
    )


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
