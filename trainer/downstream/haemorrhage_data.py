"""Head CT volumes and what is known of them: the haemorrhage, its types, and the slices that show it.

Two label tables (docs/tasks/haemorrhage.md), joined by `ingest label`: one of volumes, one of images, whose
keys are in the `slice_keys` of the volumes. Either may say nothing about a volume or a slice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards import catalog
from shards.errors import UserError
from shards.ids import digest
from shards.schema import Split, volumes_of
from trainer.batches import dataset_fingerprint
from trainer.downstream.tables import read_table, table_digest
from trainer.labels import UNKNOWN
from trainer.volumes import VOLUME_COLUMNS, affine_of, is_axial, place_box, read_volume, resample

TYPES = ("subarachnoid", "subdural", "epidural", "intraventricular", "intraparenchymal")
FINDING = "haemorrhage"
FINDINGS = (FINDING, *TYPES)
_YES, _NO = frozenset({"1", "1.0", "true", "yes", FINDING}), frozenset({"0", "0.0", "false", "no", "none"})
_MASS = 0.5  # of a slice of the box must be known


class Truth(NamedTuple):
    """findings: int8 [6] in the order of FINDINGS: 1, 0 or UNKNOWN. box_slices: f32 [Z], the share of a slice
    of the box that was made of slices with haemorrhage; nan where that is not known. slices: int8 [S] of the
    slices of the series; back: f32 [S, Z], of which slices of the box each of them is made."""

    findings: NDArray[np.int8]
    box_slices: NDArray[np.float32]
    slices: NDArray[np.int8]
    back: NDArray[np.float32]


@dataclass(frozen=True)
class Heads:
    """The volumes with labels. box(i): f32 [Z, Y, X] in [0, 1]; truth(i). Both are kept once made, boxes up
    to `cache_bytes`."""

    dataset: str
    rows: tuple[Mapping[str, Any], ...]
    findings: NDArray[np.int8]  # [n, 6]
    slices: tuple[NDArray[np.int8], ...]  # of each volume [S]
    splits: NDArray[np.str_]
    patients: NDArray[np.str_]
    shape: tuple[int, int, int]
    window: tuple[float, float]
    identity: str  # digest of volumes, labels, box and window
    cache_bytes: int
    _boxes: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _truths: dict[int, Truth] = field(default_factory=dict)

    def where(self, split: str) -> NDArray[np.int64]:
        return np.flatnonzero(self.splits == split)

    def box(self, index: int) -> NDArray[np.float32]:
        if index not in self._boxes:
            return self._made(index)
        return self._boxes[index]

    def truth(self, index: int) -> Truth:
        if index not in self._truths:
            self._made(index)
        return self._truths[index]

    def _made(self, index: int) -> NDArray[np.float32]:
        row = self.rows[index]
        volume = read_volume(self.dataset, row)
        placement = place_box(volume, affine_of(row), self.shape)
        if index not in self._truths:
            known = bool((self.slices[index] != UNKNOWN).any())
            weights = placement.source_weights(len(volume)) if known else _nothing(self.shape, len(volume))
            self._truths[index] = truth(self.findings[index], self.slices[index], weights)
        center, width = self.window
        scaled = np.clip((volume - np.float32(center - width / 2)) / np.float32(width), 0, 1)
        box = resample(scaled, placement)
        if sum(b.nbytes for b in self._boxes.values()) + box.nbytes <= self.cache_bytes:
            self._boxes[index] = box
        return box


def truth(findings: NDArray[np.int8], slices: NDArray[np.int8], weights: NDArray[np.float32]) -> Truth:
    """weights: f32 [Z, S], how much of each slice of the series is in each slice of the box."""
    known = slices != UNKNOWN
    mass = weights @ known.astype(np.float32)
    positive = weights @ (slices == 1).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        box_slices = np.where(mass >= _MASS, positive / mass, np.nan)
    columns = weights.sum(0)
    if columns.any():  # a slice outside of the box is judged by the nearest one that is in it
        inside = np.flatnonzero(columns > 0)
        nearest = inside[np.abs(np.arange(len(slices))[:, None] - inside).argmin(1)]
        back = weights[:, nearest].T / columns[nearest][:, None]
    else:
        back = np.zeros((len(slices), len(weights)), np.float32)
    return Truth(findings, box_slices.astype(np.float32), slices, back.astype(np.float32))


def load_heads(
    dataset: str,
    labels: Sequence[str],
    shape: tuple[int, int, int],
    window: tuple[float, float],
    modality: str = "ct",
    cache_bytes: int = 2 << 30,
) -> Heads:
    """labels: the table of the volumes, and that of the slices if there is one (downstream.tables). A volume
    about which neither says anything is left out, and labels of slices of a series that is not axial are not
    used: they are not the slices of the box. Raises UserError."""
    if len(labels) not in (1, 2):
        raise UserError(
            f"haemorrhage takes one table of volumes and one of slices, not {len(labels)}: --labels VOLUMES "
            "--labels SLICES"
        )
    wanted = (*VOLUME_COLUMNS, "patient", "split", "slice_keys")
    rows = catalog.load(dataset, volumes_of(modality), columns=list(dict.fromkeys(wanted))).to_pylist()
    if not rows:
        raise UserError(f"the dataset has no volumes of {modality}: ingest it with --as slices,volumes")
    table = read_table(dataset, labels[0], ["label|labels"])
    findings = values(table, FINDINGS, labels[0])
    of_slices = read_table(dataset, labels[1], ["label|labels"]) if len(labels) > 1 else None
    known = {} if of_slices is None else values(of_slices, (FINDING,), labels[1])
    own = _splits(table)
    nothing = np.full(len(FINDINGS), UNKNOWN, np.int8)
    silent = np.full(1, UNKNOWN, np.int8)
    used, slices = [], []
    for row in rows:
        of_row = np.concatenate([known.get(key, silent) for key in row["slice_keys"]])
        if not is_axial(affine_of(row)):
            of_row = np.full_like(of_row, UNKNOWN)
        if row["key"] in findings or (of_row != UNKNOWN).any():
            used.append(row)
            slices.append(of_row)
    _matched(used, labels[0], findings, rows)
    _matched(slices, labels[-1], known, slices)
    return Heads(
        dataset=dataset,
        rows=tuple(used),
        findings=np.stack([findings.get(row["key"], nothing) for row in used]),
        slices=tuple(slices),
        splits=np.array([own.get(row["key"]) or row["split"] for row in used]),
        patients=np.array([str(row["patient"]) for row in used]),
        shape=shape,
        window=window,
        identity=digest(
            dataset_fingerprint(dataset),
            *(table_digest(dataset, one) for one in labels),
            json.dumps([shape, window, modality]),
        ),
        cache_bytes=cache_bytes,
    )


def values(table: pa.Table, names: Sequence[str], source: str) -> dict[str, NDArray[np.int8]]:
    """{key: int8 [len(names)]}: 1, 0 or UNKNOWN. A column `label` is yes or no of the first name, and the
    others are unknown; `labels` has the names that are there, `unknown` those about which a row says nothing.
    Where a type is there, so is the haemorrhage. Raises UserError."""
    keys = table["key"].to_pylist()
    if "labels" not in table.column_names:
        cells = table["label"].to_pylist()
        said_cells = [(k, str(c)) for k, c in zip(keys, cells, strict=True) if c is not None and c != ""]
        return {k: _yes_or_no(c, len(names), source) for k, c in said_cells}
    there, unsaid = table["labels"].to_pylist(), [None] * len(keys)
    if "unknown" in table.column_names:
        unsaid = table["unknown"].to_pylist()
    said = {name for cell in (*there, *unsaid) for name in cell or ()}
    if said and not said & set(names):
        raise UserError(
            f"the labels {source} name {', '.join(sorted(said)[:3])} and none of {', '.join(names)}: join "
            "the table with --kind multi and these as its --column"
        )
    found = {}
    for key, cell, left_out in zip(keys, there, unsaid, strict=True):
        if cell is not None:
            row = np.array([name in cell for name in names], np.int8)
            row[[name in (left_out or ()) for name in names]] = UNKNOWN
            if (row[1:] == 1).any() and row[0] == 0:
                raise UserError(
                    f"the labels {source} have a volume with a type but without {names[0]}: correct the table"
                )
            row[0] = 1 if (row[1:] == 1).any() else row[0]
            found[key] = row
    return found


def _yes_or_no(cell: str, count: int, source: str) -> NDArray[np.int8]:
    row = np.full(count, UNKNOWN, np.int8)
    if cell.lower() not in _YES | _NO:
        raise UserError(f"the labels {source} must be 1 or 0 (yes or no), not {cell!r}: correct the table")
    row[0] = cell.lower() in _YES
    return row


def _splits(table: pa.Table) -> dict[str, str]:
    """Of the label table, where it has its own. Raises UserError."""
    if "split" not in table.column_names:
        return {}
    found = dict(zip(table["key"].to_pylist(), table["split"].to_pylist(), strict=True))
    wrong = sorted({s for s in found.values() if s} - {s.value for s in Split})
    if wrong:
        raise UserError(f"a split of the labels is {wrong[0]!r}: use train, val, test or nothing")
    return found


def _matched(there: Sequence[Any], source: str, known: Mapping[str, Any], of: Sequence[Any]) -> None:
    """Refuse a table of which not one row is a volume, or a slice of one. Raises UserError."""
    if not known:
        return
    if of is there:
        hits = any((row != UNKNOWN).any() for row in there)
        fix = "join it to images (without --of volumes)"
    else:
        hits = any(row["key"] in known for row in there)
        fix = "join it with --of volumes"
    if not hits:
        raise UserError(f"no key of the labels {source} is one of the volumes or their slices: {fix}")


def _nothing(shape: tuple[int, int, int], slices: int) -> NDArray[np.float32]:
    return np.zeros((shape[0], slices), np.float32)
