"""Masks as text in a cell of a table: `ROWSxCOLUMNS:START LENGTH START LENGTH ...`.

The pixels of the source image are counted row by row from 0; each START LENGTH is a run of pixels of the
mask, in ascending order and apart from each other. `3x4:5 2 8 1` are columns 1 and 2 of row 1 and column 0
of row 2; `3x4:` is a mask without a pixel: the image was looked at, and nothing is there.
"""

import re

import numpy as np
from numpy.typing import NDArray

MOST_PIXELS = 64 << 20
_TEXT = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5}):([0-9]{1,9}(?: [0-9]{1,9})*|)\s*", re.ASCII)


def encode(mask: NDArray) -> str:
    """[H, W], nonzero: in the mask."""
    flat = np.concatenate([[0], np.asarray(mask).ravel() != 0, [0]]).astype(np.int8)
    change = np.diff(flat)
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    numbers = np.stack([starts, ends - starts], axis=1).ravel()
    return f"{mask.shape[0]}x{mask.shape[1]}:{' '.join(map(str, numbers.tolist()))}"


def decode(text: str) -> NDArray[np.uint8] | None:
    """[H, W] of 0 and 1; None where the text is no such mask, or its runs leave the image or overlap."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    rows, columns = int(found[1]), int(found[2])
    numbers = np.array(found[3].split(), np.int64)
    if rows * columns > MOST_PIXELS or len(numbers) % 2:
        return None
    starts, lengths = numbers[::2], numbers[1::2]
    ends = starts + lengths
    if (lengths < 1).any() or (starts[1:] < ends[:-1]).any() or (len(ends) and ends[-1] > rows * columns):
        return None
    change = np.zeros(rows * columns + 1, np.int8)
    change[starts] += 1
    np.subtract.at(change, ends, 1)
    mask: NDArray[np.uint8] = np.cumsum(change[:-1], dtype=np.int8).astype(np.uint8)
    return mask.reshape(rows, columns)
