"""Join a table of labels to the samples of a dataset, by pseudonyms; the original names are never stored."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from ingest.tables import read_rows
from shards import catalog
from shards.errors import UserError
from shards.ids import Pseudonymizer
from shards.objects import open_store
from shards.schema import Split

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_LONGEST_LABEL, _MOST_LABELS = 64, 1000
_SPLITS = frozenset(split.value for split in Split)
# Lower-case column name -> (catalogue column, kind of pseudonym); the first that a table has is used.
_JOINS = {
    "file": ("source", "source"),
    "sopinstanceuid": ("instance", "instance"),
    "seriesinstanceuid": ("series", "series"),
    "studyinstanceuid": ("study", "study"),
    "patientid": ("patient", "patient"),
}


def join_labels(
    root: str | Path,
    table: str | Path,
    names: Pseudonymizer,
    name: str = "labels",
    label_column: str = "label",
    by: str | None = None,
    sources: Sequence[str | Path] = (),
) -> pa.Table:
    """Write labels/<name>.parquet: key, label, and split where the table has a column `split`.

    The table joins by its column file (paths relative to the CSV), SOPInstanceUID, SeriesInstanceUID,
    StudyInstanceUID or PatientID (`by` chooses where there are several). `sources`: those of the ingest
    run, needed by file where the CSV lies above a source. Rows without a label or without a sample are
    left out; their number is in the metadata `unmatched` of the returned table.
    Raises UserError for a table that cannot be used, matches nothing, or names a file that two inputs have.
    """
    path = Path(table)
    if not _NAME.fullmatch(name):
        raise UserError("a name of labels has lower-case letters, digits, - and _ only: choose another")
    columns, rows = read_rows(path)
    if label_column not in columns:
        raise UserError(f"the table {path.name} has no column {label_column!r}: set the label column")
    join, candidates = _join(path, columns, by, sources)
    catalog_column, kind = _JOINS[join.lower()]
    samples = catalog.load(root, columns=sorted({"key", "source", "frame", catalog_column})).to_pylist()
    keys: dict[str, list[str]] = {}
    # Two samples of one path and frame: of two sources that were given one by one, or of a changed file.
    several = Counter((sample["source"], sample["frame"]) for sample in samples)
    unclear = {source for (source, _), number in several.items() if number > 1}
    for sample in samples:
        if sample[catalog_column] is not None:
            keys.setdefault(sample[catalog_column], []).append(sample["key"])
    labelled: dict[str, tuple[str, str | None]] = {}
    unmatched = 0
    for row in rows:
        pseudonyms = (names.id(kind, value) for value in candidates(row[join]))
        match = next((p for p in pseudonyms if p in keys), None) if row[label_column] else None
        if kind == "source" and match in unclear:
            raise UserError(
                f"a file of {path.name} may be one of two (two sources with equal names, or two versions): "
                "join by SOPInstanceUID or PatientID, or ingest both sources into a new folder in one run"
            )
        found = keys[match] if match is not None else []
        unmatched += not found
        split = row.get("split", "").lower()
        for key in found:
            labelled[key] = row[label_column], split if split in _SPLITS else None
    _check(path, labelled)
    order = sorted(labelled)
    arrays = {"key": order, "label": [labelled[key][0] for key in order]}
    if "split" in columns:
        arrays["split"] = [labelled[key][1] or "" for key in order]
    result = pa.table({n: pa.array(v, pa.string()) for n, v in arrays.items()})
    catalog.write_labels(open_store(root), name, result)
    return result.replace_schema_metadata({"unmatched": str(unmatched)})


def _join(
    path: Path, columns: list[str], by: str | None, sources: Sequence[str | Path]
) -> tuple[str, Callable[[str], Iterator[str]]]:
    """The joining column as the table spells it, and the values to look for of one cell."""
    lower = {column.lower(): column for column in columns}
    if by is not None and (by not in columns or by.lower() not in _JOINS):
        raise UserError(f"labels cannot join by {by!r}: use one of {', '.join(_JOINS)} that the table has")
    found = by or next((lower[name] for name in _JOINS if name in lower), None)
    if found is None:
        raise UserError(f"the table {path.name} has none of the columns {', '.join(_JOINS)}: add one")
    if found.lower() != "file":
        return found, lambda value: iter([value])
    folder = path.resolve().parent
    roots = [Path(source).resolve() for source in sources]
    return found, lambda value: _relative_names(folder, value, roots)


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


def _check(path: Path, labelled: dict[str, tuple[str, str | None]]) -> None:
    if not labelled:
        raise UserError(
            f"no row of {path.name} matches a sample: give the table, sources and key of the ingested files"
        )
    labels = {label for label, _ in labelled.values()}
    if len(labels) > _MOST_LABELS or max(map(len, labels)) > _LONGEST_LABEL:
        # More likely a report or a name than a class: it must not get into a dataset.
        raise UserError(
            f"the labels of {path.name} look like free text (more than {_MOST_LABELS} classes or "
            f"{_LONGEST_LABEL} characters): choose another label column"
        )
