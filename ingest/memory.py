"""Keep freed memory for the next image instead of handing it back to the kernel after each.

glibc maps each array of an image anew and unmaps it when it is freed: then every page of every temporary is
zeroed and mapped again, which took a quarter of the time of a converted CT slice (BENCHMARKS.md).
"""

import ctypes
import sys
from contextlib import suppress

MMAP_BYTES = 32 << 20  # the largest that glibc allows; larger arrays are still mapped on their own
TRIM_BYTES = 64 << 20  # of free memory at the end of the heap that are kept
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(MMAP_BYTES), "MALLOC_TRIM_THRESHOLD_": str(TRIM_BYTES)}


def keep_freed() -> None:
    """Set it for this process, for good. Nothing happens where the C library is not glibc."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES)
