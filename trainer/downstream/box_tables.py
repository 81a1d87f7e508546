"""Boxes of images by key: a label table of the dataset (`ingest label --kind boxes`), or a CSV by key.

A CSV has the columns key, label, x0, y0, x1, y1, in px of the stored image, and maybe split: a row a box. A
row whose four numbers are empty says that the image was read and has no finding.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import catalog
from shards.errors import UserError
from shards.ids import digest
from trainer.evaluate.froc import check_boxes

COLUMNS = ("x0", "y0", "x1", "y1")
CSV_COLUMNS = ("key", "label", *COLUMNS)
_MORE = 3  # names that a message gives

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Boxes:
    """Of one image: places f64 [t, 4] in px of the stored image, and the index of the finding of each."""

    places: NDArray[np.float64]
    findings: NDArray[np.int64]


@dataclass(frozen=True)
class BoxTable:
    """name: of the ground truth. boxes: by key, of the images that were read, also those without a finding.
    splits: of the images for which the table gives one. digest: of the file."""

    name: str
    boxes: Mapping[str, Boxes]
    splits: Mapping[str, str]
    digest: str


def read_boxes(
    dataset: Path | str,
    source: str,
    samples: Mapping[str, Row],
    findings: Sequence[str],
    ignored: Sequence[str] = (),
) -> BoxTable:
    """The boxes of one ground truth. source: a name of labels of the dataset, or the path of a CSV.

    samples: rows and columns (px) of the images by key; others are left out. findings: the labels that boxes
    may have; boxes labelled as one of `ignored` are left out. Raises UserError: columns that are missing,
    labels that are neither, boxes that do not lie in their image or have no area, no image at all.
    """
    name = Path(source).stem if source.endswith(".csv") else source
    given, splits, of_file = _read(dataset, source)
    known = {label: i for i, label in enumerate(findings)}
    labels = {label for boxes in given.values() for label, _ in boxes}
    strange = sorted(labels - known.keys() - set(ignored))
    if strange:
        raise UserError(
            f"the boxes {name!r} have the labels {_listed(strange)}, none of {', '.join(findings)}: "
            "add them to `findings`, or to `ignored`"
        )
    found = {}
    for key in sorted(given.keys() & samples.keys()):
        kept = [(known[label], box) for label, box in given[key] if label in known]
        places = np.array([box for _, box in kept], np.float64).reshape(-1, 4)
        row = samples[key]
        check_boxes(places, row["rows"], row["columns"], f"boxes {name!r}, image {key}")
        found[key] = Boxes(places, np.array([i for i, _ in kept], np.int64))
    if not found:
        raise UserError(
            f"the boxes {name!r} are of no image that is there: join the table with `ingest label "
            "DATASET CSV --kind boxes`"
        )
    return BoxTable(name, found, {key: splits[key] for key in found if splits.get(key)}, of_file)


def keys_of(dataset: Path | str, source: str) -> list[str]:
    """The keys of a table, of images of the dataset or not. Raises UserError."""
    return list(_read(dataset, source)[0])


Given = dict[str, list[tuple[str, tuple[float, ...]]]]  # label and box, by key


def _read(dataset: Path | str, source: str) -> tuple[Given, dict[str, str], str]:
    return (_of_csv if source.endswith(".csv") else _of_dataset)(dataset, source)


def _of_dataset(dataset: Path | str, source: str) -> tuple[Given, dict[str, str], str]:
    table, of_file = catalog.labels_with_digest(dataset, source)
    if "boxes" not in table.column_names:
        raise UserError(
            f"the labels {source!r} are no boxes: join them with `ingest label DATASET CSV --kind boxes "
            f"--name {source}`"
        )
    given: Given = {}
    for row in table.select(["key", "boxes"]).to_pylist():
        given[row["key"]] = [(b["label"] or "", tuple(b[c] for c in COLUMNS)) for b in row["boxes"] or ()]
    there = "split" in table.column_names
    splits = dict(zip(table["key"].to_pylist(), table["split"].to_pylist(), strict=True)) if there else {}
    return given, splits, of_file


def _of_csv(dataset: Path | str, source: str) -> tuple[Given, dict[str, str], str]:
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"there is no table {path.name}: give the name of labels of the dataset, or a CSV by key"
        )
    data = path.read_bytes()
    reader = csv.DictReader(data.decode("utf-8-sig", "replace").splitlines())
    missing = [column for column in CSV_COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise UserError(
            f"the table {path.name} has no column {', '.join(missing)}: boxes have {', '.join(CSV_COLUMNS)}"
        )
    given: Given = {}
    splits: dict[str, str] = {}
    for number, row in enumerate(reader, start=2):
        cells = [(row[column] or "").strip() for column in COLUMNS]
        boxes = given.setdefault(row["key"], [])
        if any(cells):
            boxes.append(((row["label"] or "").strip(), _numbers(cells, f"line {number} of {path.name}")))
        split = (row.get("split") or "").strip()
        if splits.setdefault(row["key"], split) != split:
            raise UserError(f"line {number} of {path.name}: an image is in two splits: correct the table")
    return given, splits, digest(data)


def _numbers(cells: Sequence[str], where: str) -> tuple[float, ...]:
    try:
        box = tuple(float(cell) for cell in cells)
    except ValueError:
        box = (math.nan,)
    if not all(map(math.isfinite, box)):
        raise UserError(f"{where}: x0, y0, x1, y1 are four numbers, or four empty cells: correct it")
    return box


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MORE} more" if len(names) > _MORE else ""
    return ", ".join(repr(name) for name in names[:_MORE]) + more
