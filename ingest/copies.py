"""Private copies of inputs for the decoder process, where it must not read the source itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ingest.archives import opened, prepared
from ingest.config import ReadRules
from ingest.discover import ANY_SIZE, Entry, content_of, identity_of
from ingest.frames import Refused
from ingest.sniff import HEAD_BYTES
from ingest.sources import chunks
from shards.schema import Reason

_MEMORY_BYTES = 64 << 20  # a larger copy is an unlinked temporary file


def is_read(entry: Entry) -> bool:
    """Whether the content of an input is looked at when it is converted."""
    return not (entry.absent or entry.member.startswith("!")) and unread_reason(entry) is None


def unread_reason(entry: Entry) -> Reason | None:
    """Why an input is refused by what the inventory knows of it; None: it is to be read."""
    if entry.kind == "raster" and entry.modality == "none":
        return Reason.MODALITY_OUT_OF_SCOPE if entry.listed else Reason.NOT_LISTED
    return Reason.NOT_AN_IMAGE if entry.kind == "other" else None


@contextmanager
def copied(entry: Entry, rules: ReadRules = ANY_SIZE) -> Iterator[str]:
    """The path of a copy that lasts as long as the context: the file or member that the inventory saw.

    Raises Refused (SOURCE_MISSING: it is gone or another one), OSError of the source, UserError of the copy.
    """
    if entry.member:
        with _member(entry, rules) as local:
            yield local
        return
    try:
        with prepared(chunks(entry.path, entry.size + 1), entry.size, entry.size + 1, _MEMORY_BYTES) as local:
            _hold_to_identity(local, entry)
            yield local
    except FileNotFoundError:
        raise Refused(Reason.SOURCE_MISSING) from None


def _hold_to_identity(local: str, entry: Entry) -> None:
    with open(local, "rb") as file:
        head = file.read(HEAD_BYTES)
        size = os.fstat(file.fileno()).st_size
    content = content_of(local, size, head, entry.kind)
    if identity_of(entry.relative, size, content, entry.salt) != entry.identity:
        raise Refused(Reason.SOURCE_MISSING)


@contextmanager
def _member(entry: Entry, rules: ReadRules) -> Iterator[str]:
    archive = opened(entry.path, rules)
    member = archive.find(entry.member)
    if identity_of(entry.relative, member.size, member.content, entry.salt) != entry.identity:
        raise Refused(Reason.SOURCE_MISSING)
    with prepared(archive.chunks(entry.member), member.size, member.size, _MEMORY_BYTES) as local:
        yield local
