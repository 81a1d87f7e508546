"""Private copies of inputs for the decoder process, where it must not read the source itself."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ingest.archives import opened, prepared
from ingest.config import ReadRules
from ingest.discover import ANY_SIZE, Entry
from ingest.frames import Refused
from ingest.identity import identity_of, seen_of
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
def copied(entry: Entry, rules: ReadRules = ANY_SIZE) -> Iterator[tuple[str, str]]:
    """The path of a copy that lasts as long as the context: the file or member that the inventory saw.

    The second path: of a copy of the image file of a NIfTI pair, else "".

    Raises Refused (SOURCE_MISSING: it is gone or another one), OSError of the source, UserError of the copy.
    """
    if entry.member:
        with _member(entry, rules) as local:
            yield local, ""
        return
    try:
        with ExitStack() as open_copies:
            local, partner = (
                open_copies.enter_context(_copy(path, entry.size)) if path else ""
                for path in (entry.path, entry.partner)
            )
            size, content = seen_of(local, entry.kind, partner)
            if identity_of(entry.relative, size, content, entry.salt) != entry.identity:
                raise Refused(Reason.SOURCE_MISSING)
            yield local, partner
    except FileNotFoundError:
        raise Refused(Reason.SOURCE_MISSING) from None


def _copy(path: str, size: int) -> AbstractContextManager[str]:
    """size: bytes of the input, of which a pair has two files."""
    return prepared(chunks(path, size + 1), size, size + 1, _MEMORY_BYTES)


@contextmanager
def _member(entry: Entry, rules: ReadRules) -> Iterator[str]:
    archive = opened(entry.path, rules)
    member = archive.find(entry.member)
    if identity_of(entry.relative, member.size, member.content, entry.salt) != entry.identity:
        raise Refused(Reason.SOURCE_MISSING)
    with prepared(archive.chunks(entry.member), member.size, member.size, _MEMORY_BYTES) as local:
        yield local
