"""What tells an input from every other: a digest of its name, its size and its content."""

import hashlib

from ingest.sniff import HEAD_BYTES, read_head
from ingest.sources import open_source, size_of
from shards.ids import digest

_WHOLE_BYTES, _BLOCKS = 1 << 20, 64


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
        with open_source(path, buffer=_WHOLE_BYTES if size <= _WHOLE_BYTES else HEAD_BYTES) as file:
            if size <= _WHOLE_BYTES:
                return hashlib.file_digest(file, "sha256").digest()
            for block in range(1, _BLOCKS + 1):
                file.seek((size - HEAD_BYTES) * block // _BLOCKS)
                hasher.update(file.read(HEAD_BYTES))
    except OSError:
        return head
    return hasher.digest()


def seen_of(path: str, kind: str, partner: str = "") -> tuple[int, bytes]:
    """(bytes, content) that make the identity of a file, of a NIfTI pair of both its files."""
    head = read_head(path)
    size = 0 if head is None else size_of(path)
    content = content_of(path, size, head or b"", kind)
    if not partner:
        return size, content
    more, other = seen_of(partner, kind)
    both = hashlib.sha256(content).digest() + hashlib.sha256(other).digest()
    return size + more, hashlib.sha256(both).digest()


def sha256_of(path: str) -> str:
    """Of all of a file, in hexadecimal; "" where it cannot be read."""
    try:
        with open_source(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
