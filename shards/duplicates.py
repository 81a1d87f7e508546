"""Which samples of a dataset are left out as duplicates of others: the rule, as pure functions of their rows.

Preferred is the split train before val before test, then the smaller key.

1. Same instance and frame: the preferred sample stays. Others with its pixels are duplicates, others with
   other pixels collisions (uid_collision).
2. Same modality and pixels in a split before its own, even of a sample that 1 leaves out: a duplicate,
   whatever the geometry.
3. Same modality, pixels and geometry (to a micrometre) in several files: of the samples that are left, those
   of the preferred one's file stay (equal frames of a static cine are no duplicates of each other), the
   others are duplicates.
4. A volume with a slice that is left out for a sample in a split before its own goes too.

So no image of val or test has an equal in train, and adding commits keeps it so: an encoder trained on any
earlier state of the dataset has seen no image of the present test split.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shards.schema import Reason, Row, Split, volumes_of

GEOMETRY = ("spacing_row_mm", "spacing_column_mm", "position_mm", "orientation")
_RANK = {split.value: rank for rank, split in enumerate((Split.TRAIN, Split.VAL, Split.TEST))}


@dataclass(frozen=True, order=True)
class Excluded:
    """A sample that is left out. unit: of its commit."""

    unit: str
    key: str
    modality: str
    split: str
    reason: str


def geometry_of(columns: Row) -> tuple[object, ...]:
    """What of a sample's geometry tells it from another with equal pixels."""
    return tuple(_rounded(columns.get(name)) for name in GEOMETRY)


def _rounded(value: object) -> object:
    """To a micrometre: writers differ in the digits they print."""
    if isinstance(value, list):
        return tuple(round(v, 3) for v in value)
    return round(value, 3) if isinstance(value, float) else value


def by_instance(rows: Iterable[Row]) -> Iterator[Excluded]:
    """Rule 1 for whole groups of one instance and frame; marks the rows it leaves out: row["lost"] = True."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["instance"], row["frame"]].append(row)
    for group in groups.values():
        kept, *others = sorted(group, key=_preference)
        for row in others:
            row["lost"] = True
            same = row["pixel_digest"] == kept["pixel_digest"]
            yield from _left_out(row, Reason.DUPLICATE if same else Reason.UID_COLLISION, kept)


def by_content(rows: Iterable[Row]) -> Iterator[Excluded]:
    """Rules 2 and 3 for whole groups of one digest of pixels; of rows with row["lost"] the split counts."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["modality"], row["pixel_digest"]].append(row)
    for group in groups.values():
        ordered = sorted(group, key=_preference)
        kept: dict[tuple[object, ...], Row] = {}
        for row in (row for row in ordered if not row["lost"]):
            if _rank(row) > _rank(ordered[0]):
                yield from _left_out(row, Reason.DUPLICATE, ordered[0])
                continue
            first = kept.setdefault(geometry_of(row), row)
            if _file(row) != _file(first):
                yield from _left_out(row, Reason.DUPLICATE, first)


def resolve(rows: Iterable[Row]) -> set[Excluded]:
    """The whole rule for rows in memory: of 2D samples and of volumes, which have no instance."""
    listed = [dict(row, lost=False) for row in rows]
    found = set(by_instance(row for row in listed if row["instance"] is not None))
    return found | set(by_content(listed))


def _left_out(row: Row, reason: Reason, kept: Row) -> Iterator[Excluded]:
    yield Excluded(row["unit"], row["key"], row["modality"], row["split"], reason.value)
    if row["volume"] is not None and _rank(kept) < _rank(row):
        volumes = volumes_of(row["modality"])
        yield Excluded(row["unit"], row["volume"], volumes, row["split"], Reason.DUPLICATE.value)


def _rank(row: Row) -> int:
    return _RANK[row["split"]]


def _preference(row: Row) -> tuple[int, str]:
    return _rank(row), row["key"]


def _file(row: Row) -> tuple[str, str]:
    """The file of a sample. A source that was changed has several, in different units."""
    return row["unit"], row["source"]
