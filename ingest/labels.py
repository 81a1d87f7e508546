"""Join a table of labels to the samples of a dataset, by pseudonyms; the original names are never stored."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ingest import nifti_masks
from ingest.label_values import FIELDS, PLACE_COLUMNS, Masks, Parse, check_box, parser, placed_box
from ingest.tables import read_rows
from shards import catalog
from shards.errors import UserError
from shards.ids import Pseudonymizer
from shards.objects import is_url, open_store
from shards.schema import Row, Split

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_PLACED = ("boxes", "masks")
_LONGEST_LABEL, _MOST_LABELS = 64, 1000
_SPLITS = frozenset(split.value for split in Split)
# Column name, less case and underscores -> (catalogue column, kind of pseudonym); the first found is used.
_JOINS = {
    "key": ("key", ""),  # a pseudonym already
    "file": ("source", "source"),
    "sopinstanceuid": ("instance", "instance"),
    "seriesinstanceuid": ("series", "series"),
    "studyinstanceuid": ("study", "study"),
    "accessionnumber": ("accession", "accession"),
    "patientid": ("patient", "patient"),
}


def join_labels(
    root: str | Path,
    table: str | Path,
    names: Pseudonymizer,
    name: str = "labels",
    label_column: str | None = "label",
    by: str | None = None,
    sources: Sequence[str | Path] = (),
    kind: str = "classes",
    values: Sequence[str] = (),
    of: str = "images",
) -> pa.Table:
    """Write labels/<name>.parquet: key, the values, and split where the table has a column `split`.

    kind, values: ingest.label_values.parser (the columns of the values); the stored field and its type:
    FIELDS there. The table joins by its column key, file (paths relative to the CSV), SOPInstanceUID,
    SeriesInstanceUID, StudyInstanceUID, AccessionNumber or PatientID (`by` chooses where there are several);
    a column `frame` (0-based) chooses one image of a file. `sources`: those of the ingest run, needed by file
    where the CSV lies above a source. Boxes and masks follow the crop or reduction of their image; to NIfTI
    slices, which are turned, only the planes of a NIfTI mask are joined. of: "images", or "volumes": a volume
    has the value of any of its slices (classes and multi only). Where kind multi has several columns,
    `unknown` lists those that are empty in a row with other cells. In the metadata of the returned table:
    `unmatched`, rows without a value or without a sample; `misplaced`, boxes outside the stored part of
    their image and masks that are no grey PNG, run lengths or NIfTI plane of the source image; `repeated`,
    rows of an image that had one before.
    Raises UserError for a table that cannot be used, matches nothing, or names a file that two inputs have,
    and for a name that labels of the other kind of sample have.
    """
    path = Path(table)
    columns, parse, join, candidates = check_table(path, name, label_column, by, sources, kind, values)
    _check_of(of, kind, columns)
    catalog_column, pseudonym = _JOINS[_plain(join)]
    wanted = {"key", "source", "frame", "kind", "volume", catalog_column, *PLACE_COLUMNS}
    wanted |= set(nifti_masks.GEOMETRY_COLUMNS) if kind == "masks" else set()
    samples = {sample["key"]: sample for sample in catalog.load(root, columns=sorted(wanted)).to_pylist()}
    _check_name(root, name, of, samples)
    keys: dict[str, dict[str, None]] = {}  # of what is labelled, each once and in order
    # Two samples of one path and frame: of two sources that were given one by one, or of a changed file.
    several = Counter((sample["source"], sample["frame"]) for sample in samples.values())
    unclear = {source for (source, _), number in several.items() if number > 1}
    for sample in samples.values():
        placeable = kind != "boxes" or sample["kind"] != "nifti"
        labelled = sample["volume"] if of == "volumes" else sample["key"]
        if sample[catalog_column] is not None and labelled is not None and placeable:
            keys.setdefault(sample[catalog_column], {})[labelled] = None
    frame_column = next((column for column in columns if column.lower() == "frame"), None)
    found = _Found(kind, path.resolve().parent, samples, of)
    unmatched = 0
    for number, row in enumerate(rows_of(path), start=2):  # as an editor counts lines
        value = parse(row)
        known = (names.id(pseudonym, v) if pseudonym else v for v in candidates(row[join]))
        match = next((p for p in known if p in keys), None) if value is not None else None
        if pseudonym == "source" and match in unclear:
            raise UserError(
                f"a file of {path.name} may be one of two (two sources with equal names, or two versions): "
                "join by SOPInstanceUID or PatientID, or ingest both sources into a new folder in one run"
            )
        matched = list(keys[match]) if match is not None else []
        if frame_column is not None and row[frame_column]:
            matched = [key for key in matched if str(samples[key]["frame"]) == row[frame_column]]
        unmatched += not matched
        split = row.get("split", "").lower()
        empty = [column for column in values if not row[column]] if kind == "multi" else []
        for key in matched:
            where = f"line {number} of {path.name}"
            found.add(key, value, split if split in _SPLITS else "", empty, where)
    _check(path, found.texts(), bool(found.values))
    order = sorted(found.values)
    field, kind_of_field = FIELDS[kind]
    arrays = {
        "key": pa.array(order, pa.string()),
        field: pa.array([found.values[key] for key in order], kind_of_field),
    }
    if any(found.unknown.values()):
        names_left = [sorted(found.unknown[key] - set(found.values[key])) for key in order]
        arrays["unknown"] = pa.array(names_left, kind_of_field)
    if "split" in columns:
        arrays["split"] = pa.array([found.splits[key] for key in order], pa.string())
    result = pa.table(arrays)
    catalog.write_labels(open_store(root), name, result)
    return result.replace_schema_metadata(
        {"unmatched": str(unmatched), "misplaced": str(found.misplaced), "repeated": str(found.repeated)}
    )


def check_table(
    table: str | Path,
    name: str = "labels",
    label_column: str | None = "label",
    by: str | None = None,
    sources: Sequence[str | Path] = (),
    kind: str = "classes",
    values: Sequence[str] = (),
) -> tuple[list[str], Parse, str, Callable[[str], Iterator[str]]]:
    """Column names, value parser, joining column and its candidates; UserError before any work is done."""
    path = Path(table)
    if not _NAME.fullmatch(name):
        raise UserError("a name of labels has lower-case letters, digits, - and _ only: choose another")
    columns, _ = read_rows(path)
    parse = parser(kind, path, columns, values, label_column)
    if any(_plain(column) in _JOINS for column in (*values, label_column or "")):
        raise UserError("a column of identifiers cannot be the label: choose another label column")
    join, candidates = _join(path, columns, by, sources)
    return columns, parse, join, candidates


def _plain(column: str) -> str:
    """SOPInstanceUID and sop_instance_uid are one name."""
    return column.lower().replace("_", "")


def _check_of(of: str, kind: str, columns: Sequence[str]) -> None:
    if of not in ("images", "volumes"):
        raise UserError(f"labels are of images or of volumes, not of {of!r}")
    if of == "volumes" and kind in _PLACED:
        raise UserError(f"{kind} lie in images: join them to images, a volume's slice_keys lead to them")
    if of == "volumes" and "frame" in {column.lower() for column in columns}:
        raise UserError("a column frame chooses an image: leave it out for labels of volumes")


def _check_name(root: str | Path, name: str, of: str, samples: dict[str, Row]) -> None:
    """Labels of volumes never take the place of labels of images, nor the other way round."""
    if name not in catalog.label_names(root):
        return
    other = "images" if of == "volumes" else "volumes"
    others = samples.keys() if of == "volumes" else {sample["volume"] for sample in samples.values()}
    if not others.isdisjoint(catalog.labels(root, name)["key"].to_pylist()):
        raise UserError(f"the labels {name!r} are those of {other}: choose another --name")


def rows_of(path: Path) -> list[dict[str, str]]:
    return read_rows(path)[1]


class _Found:
    """The values of the samples so far. classes and masks of images: the last row counts; classes of volumes
    must agree; others are gathered."""

    def __init__(self, kind: str, folder: Path, samples: dict[str, Row], of: str) -> None:
        self.of = of
        self.kind, self.masks, self.samples = kind, Masks(folder), samples
        self.values: dict[str, Any] = {}
        self.splits: dict[str, str] = {}
        self.unknown: dict[
            str, set[str]
        ] = {}  # columns of kind multi in which all rows of a sample are empty
        self.misplaced = 0
        self.repeated = 0  # rows of a sample that had a value

    def add(self, key: str, value: Any, split: str, empty: Sequence[str], where: str) -> None:
        self.repeated += key in self.values
        if self.kind == "multi":
            self.unknown[key] = self.unknown.get(key, set(empty)) & set(empty)
            self.values[key] = sorted({*self.values.get(key, ()), *value})
        elif self.kind == "boxes":
            for box in value:
                check_box(box, self.samples[key], where)
            boxes = [placed_box(box, self.samples[key]) for box in value]
            self.misplaced += boxes.count(None)
            self.values.setdefault(key, []).extend(box for box in boxes if box is not None)
        elif self.kind == "masks":
            placed = self.masks.placed(value, self.samples[key])
            if placed is None:
                self.misplaced += 1
                return
            self.values[key] = placed
        else:
            if self.of == "volumes" and self.values.get(key, value) != value:
                raise UserError(
                    f"{where}: a volume has two labels: give each series one row, or use --kind multi"
                )
            self.values[key] = value
        self.splits[key] = split

    def texts(self) -> set[str]:
        if self.kind == "boxes":
            return {box["label"] or "" for boxes in self.values.values() for box in boxes}
        if self.kind == "masks":
            return set()
        return {t for v in self.values.values() for t in ([v] if isinstance(v, str) else v)}


def _join(
    path: Path, columns: list[str], by: str | None, sources: Sequence[str | Path]
) -> tuple[str, Callable[[str], Iterator[str]]]:
    """The joining column as the table spells it, and the values to look for of one cell."""
    plain = {_plain(column): column for column in columns}
    if by is not None and (by not in columns or _plain(by) not in _JOINS):
        raise UserError(f"labels cannot join by {by!r}: use one of {', '.join(_JOINS)} that the table has")
    found = by or next((plain[name] for name in _JOINS if name in plain), None)
    if found is None:
        raise UserError(f"the table {path.name} has none of the columns {', '.join(_JOINS)}: add one")
    if _plain(found) != "file":
        return found, lambda value: iter([value])
    folder = path.resolve().parent
    roots = [Path(source).resolve() for source in sources if not is_url(source)]
    remote = len(roots) < len(sources)

    def candidates(value: str) -> Iterator[str]:
        if remote:  # what the key is below the source
            yield os.path.normpath(value)
        if roots or not remote:
            yield from _relative_names(folder, value, roots)

    return found, candidates


def _relative_names(folder: Path, value: str, roots: Sequence[Path]) -> Iterator[str]:
    """What the file may be called as the `source` of an entry (ingest.discover), the surest first.

    `<name of the source>//<relative path>` (where several sources have that path), `<relative path>`. Without
    the sources: every tail of its path that holds all of `value`; a shorter one may be another's.
    """
    path = Path(os.path.normpath(folder / value))
    if roots:
        tails = [(r.parts[1:], path.relative_to(r).as_posix()) for r in roots if path.is_relative_to(r)]
        for root, relative in tails:
            yield from (f"{'/'.join(root[start:])}//{relative}" for start in range(len(root)))
        yield from (relative for _, relative in tails)
        return
    parts = path.parts[1:]
    last = len(parts) - len(Path(os.path.normpath(value)).parts)
    for middle in range(1, last + 1):
        relative = "/".join(parts[middle:])
        yield from (f"{'/'.join(parts[start:middle])}//{relative}" for start in range(middle))
    for start in range(last + 1):
        yield "/".join(parts[start:])


def _check(path: Path, texts: set[str], found: bool) -> None:
    if not found:
        raise UserError(
            f"no row of {path.name} matches a sample: give the table, sources and key of the ingested files"
        )
    if len(texts) > _MOST_LABELS or max(map(len, texts), default=0) > _LONGEST_LABEL:
        # More likely a report or a name than a class: it must not get into a dataset.
        raise UserError(
            f"the labels of {path.name} look like free text (more than {_MOST_LABELS} classes or "
            f"{_LONGEST_LABEL} characters): choose another label column"
        )
