"""What a file is, from its first bytes. The extension is never looked at."""

import os
import stat
import struct
import zlib
from pathlib import Path

from ingest.sources import open_source, prefix
from shards.objects import is_url

HEAD_BYTES = 4096

_VALUE_REPRESENTATIONS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT OB OD OF OL OV "
    b"OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_NIFTI_HEADER = {348: (344, (b"n+1\0", b"ni1\0")), 540: (4, (b"n+2\0\r\n\032\n", b"ni2\0\r\n\032\n"))}


def read_head(path: str | Path) -> bytes | None:
    """The first 4096 bytes of a regular file; None where it is none or cannot be read.

    Never blocks: a FIFO or a device is not opened.
    """
    try:
        if is_url(path):
            return prefix(str(path), HEAD_BYTES)
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - of every file of millions
            return None
        with open_source(str(path)) as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return None


def sniff(head: bytes) -> str:
    """dicom | nifti | raster | other."""
    if has_preamble(head) or _is_bare_dataset(head):
        return "dicom"
    if head[:8] == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff" or head[:4] in _TIFF:
        return "raster"
    if _nifti_magic(inflate_head(head)):
        return "nifti"
    return "other"


def has_preamble(head: bytes) -> bool:
    """DICOM PS3.10 section 7.1: 128 bytes, then DICM."""
    return head[128:132] == b"DICM"


def is_pair_header(head: bytes) -> bool:
    """Whether a NIfTI header, gzipped or not, says that its voxels lie in another file."""
    return _nifti_magic(inflate_head(head)).startswith(b"ni")


def _nifti_magic(head: bytes) -> bytes:
    if len(head) < 348:
        return b""
    for order in "<>":
        size = struct.unpack_from(order + "i", head)[0]
        if size in _NIFTI_HEADER:
            offset, magics = _NIFTI_HEADER[size]
            return next((magic for magic in magics if head[offset:].startswith(magic)), b"")
    return b""
    for order in "<>":
        size = struct.unpack_from(order + "i", head)[0]
        if size in _NIFTI_HEADER:
            offset, magics = _NIFTI_HEADER[size]
            return any(head[offset:].startswith(magic) for magic in magics)
    return False


def inflate_head(head: bytes) -> bytes:
    """The head itself, or, of a gzip stream, its first 4096 inflated bytes: a bomb stays shut."""
    if head[:2] != b"\x1f\x8b":
        return head
    try:
        return zlib.decompressobj(31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _is_bare_dataset(head: bytes) -> bool:
    """A DICOM data set without the Part 10 header: it starts with an element of group 0002 or 0008."""
    if len(head) < 16:
        return False
    for order in "<>":
        group, element = struct.unpack_from(order + "HH", head)
        if group not in (0x0002, 0x0008) or element > 0x2000:
            continue
        if head[4:6] in _VALUE_REPRESENTATIONS:
            return True
        length = struct.unpack_from(order + "I", head, 4)[0]  # implicit VR
        if length % 2 == 0 and length <= 256:
            return True
    return False
