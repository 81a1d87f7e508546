"""Digest and statistics of pixels as stored: pure functions of one 2D array."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shards.ids import digest, digest_framed, frame

_PIXELS_AT_ONCE = 1 << 20
PIXEL_DTYPES = ("uint8", "uint16", "int16")


def check_pixels(pixels: NDArray) -> None:
    """Raise ValueError unless pixels are 2D [rows, columns], not empty, and of a stored dtype."""
    if pixels.ndim != 2 or pixels.size == 0 or pixels.dtype.name not in PIXEL_DTYPES:
        raise ValueError(f"pixels must be 2D and one of {PIXEL_DTYPES}, not {pixels.dtype} {pixels.shape}")


def pixel_digest(pixels: NDArray) -> str:
    """26-character SHA-256 of dtype, shape and little-endian pixels of an array [rows, columns]."""
    check_pixels(pixels)
    little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    # As digest(dtype, shape, bytes), without a copy of the pixels.
    head = frame(pixels.dtype.name, f"{pixels.shape[0]}x{pixels.shape[1]}") + little.nbytes.to_bytes(8, "big")
    return digest_framed(head, little.data.cast("B"))


def stack_digest(digests: Sequence[str]) -> str:
    """The digest of a volume from pixel_digest of its slices, in order."""
    return digest("stack", *digests)


def pixel_statistics(pixels: NDArray) -> dict[str, float]:
    """p005, p995 (0.5th, 99.5th percentile, linear), mean, std, minimum, maximum of [rows, columns].

    From one exact histogram and integer sums: the same float64 on every machine and thread count.
    """
    check_pixels(pixels)
    low, counts = _histogram(pixels)
    values = np.flatnonzero(counts)
    low, counts, values = low + int(values[0]), counts[values[0] :], values - values[0]
    weights = counts[values]
    number = pixels.size
    if number >= 1 << 31:  # 2**32 of a square times this no longer fits 64 bits
        values, weights = values.astype(object), weights.astype(object)
    total = int((values * weights).sum())
    squares = int((values * values * weights).sum())
    cumulative = np.cumsum(counts)
    return {
        "p005": low + _percentile(cumulative, 0.005),
        "p995": low + _percentile(cumulative, 0.995),
        "mean": low + total / number,
        "std": math.sqrt((number * squares - total * total) / (number * number)),
        "minimum": float(low),
        "maximum": float(low + int(values[-1])),
    }


def _histogram(pixels: NDArray) -> tuple[int, NDArray]:
    """(value of the first bin, counts): one pass, without a look for the extremes."""
    flat = np.ascontiguousarray(pixels).ravel()
    signed = flat.dtype == np.int16
    words = flat.view(np.uint16) if signed else flat
    flip = np.uint16(1 << 15)
    low = -(1 << 15) if signed else 0
    if words.size <= _PIXELS_AT_ONCE:
        return low, np.bincount(words ^ flip if signed else words)
    counts = np.zeros(1 << 16, np.int64)  # bincount takes 8 bytes a pixel
    for start in range(0, words.size, _PIXELS_AT_ONCE):
        part = words[start : start + _PIXELS_AT_ONCE]
        counts += np.bincount(part ^ flip if signed else part, minlength=1 << 16)
    return low, counts


def _percentile(cumulative: NDArray, fraction: float) -> float:
    """numpy's `linear` percentile, from cumulative counts."""
    place = fraction * (int(cumulative[-1]) - 1)
    below = math.floor(place)
    first = int(np.searchsorted(cumulative, below, side="right"))
    second = int(np.searchsorted(cumulative, math.ceil(place), side="right"))
    return first + (second - first) * (place - below)
