"""What reading a file yields: one 2D image with its facts, or a refusal. Private until de-identified."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.schema import Reason, Row


class Refused(Exception):
    """A whole file that cannot become samples; holds a reason and no text of the file."""

    def __init__(self, reason: Reason, modality: str = "none") -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.modality = modality


@dataclass(frozen=True)
class Refusal:
    """An input (frame -1) or one frame of it that does not become a sample."""

    reason: Reason
    frame: int = -1
    modality: str = "none"


@dataclass(frozen=True)
class Stack:
    """What tells stacks of one series at the same places apart (ingest.dicom.volume). Private, as `texts`.

    phase: slices that differ in it never lie in one volume. passes (echo time, time point, b-value,
    acquisition, ...): tried one after the other where several slices lie at one place.
    """

    phase: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()


@dataclass
class Frame:
    """One image as stored: pixels [rows, columns] of uint8, uint16 or int16.

    `columns`: catalogue columns that are free of identity already (numbers, closed vocabularies).
    `identifiers` (patient, study, series, instance, frame_of_reference) and `texts` (manufacturer, body
    part, ...) are as in the source, private: only `deidentify.make_row` turns them into columns.
    `stack`: of a slice that may lie in a volume.
    """

    index: int
    modality: str
    pixels: NDArray
    columns: Row
    identifiers: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    stack: Stack | None = None


Item = Frame | Refusal

_DTYPES = ("uint8", "uint16", "int16")


def to_message(item: Item) -> tuple[dict[str, Any], memoryview]:
    """JSON header and raw pixels in this machine's order (the wire form between two processes of it)."""
    if isinstance(item, Refusal):
        return {
            "refusal": item.reason.value,
            "frame": item.frame,
            "modality": item.modality,
        }, memoryview(b"")
    header = {
        "frame": item.index,
        "modality": item.modality,
        "dtype": item.pixels.dtype.name,
        "shape": list(item.pixels.shape),
        "columns": item.columns,
        "identifiers": item.identifiers,
        "texts": item.texts,
        "stack": None if item.stack is None else [item.stack.phase, item.stack.passes],
    }
    return header, np.ascontiguousarray(item.pixels).data.cast("B")


def from_message(header: dict[str, Any], payload: bytes | memoryview) -> Item:
    """Inverse of to_message. Raises ValueError or KeyError for a message that does not add up."""
    if "refusal" in header:
        return Refusal(Reason(header["refusal"]), int(header["frame"]), str(header["modality"]))
    rows, columns = (int(n) for n in header["shape"])
    if header["dtype"] not in _DTYPES or min(rows, columns) < 1:
        raise ValueError("not an image")
    pixels = np.frombuffer(payload, header["dtype"]).reshape(rows, columns)
    return Frame(
        int(header["frame"]),
        str(header["modality"]),
        pixels,
        dict(header["columns"]),
        dict(header["identifiers"]),
        dict(header["texts"]),
        None if header["stack"] is None else Stack(*(tuple(map(str, part)) for part in header["stack"])),
    )
