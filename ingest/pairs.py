"""NIfTI pairs: a header (NAME.hdr) and the voxels in a file beside it (NAME.img), each gzipped or not.

The header is an input like any other, known by its content. Its image file has no mark of its own: by NIfTI-1
nothing but the name ties it to its header. It is read as a part of that input, so it is none itself.
"""

import os
import stat
from collections.abc import Mapping

from ingest.sniff import is_pair_header, read_head
from ingest.sources import state_of
from shards.objects import is_url

_IMAGE_OF = {".hdr": ".img", ".HDR": ".IMG"}
_HEADER_OF = {image: header for header, image in _IMAGE_OF.items()}


def image_of(header: str) -> str:
    """The image file of a header: packed as it is, else the other one; "" where neither is there."""
    return next((path for path in _partners(header, _IMAGE_OF) if _is_file(path)), "")


def is_image_of_a_header(path: str, sources: tuple[str, ...]) -> bool:
    """Whether a file is the image of a header below the sources, which is the input then."""
    return any(
        _is_below(header, sources) and is_pair_header(read_head(header) or b"") and image_of(header) == path
        for header in _partners(path, _HEADER_OF)
    )


def _partners(path: str, endings: Mapping[str, str]) -> tuple[str, ...]:
    packed = path[-3:] if path[-3:] in (".gz", ".GZ") else ""
    plain = path[: -len(packed)] if packed else path
    ending = endings.get(plain[-4:])
    if ending is None:
        return ()
    other = plain[:-4] + ending
    both = (other, other + (packed or (".gz" if ending.islower() else ".GZ")))
    return both[::-1] if packed else both


def _is_file(path: str) -> bool:
    try:
        return bool(state_of(path)) if is_url(path) else stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        return False


def _is_below(path: str, sources: tuple[str, ...]) -> bool:
    roots = (source if is_url(source) else os.path.abspath(source) for source in sources)  # noqa: PTH100
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
