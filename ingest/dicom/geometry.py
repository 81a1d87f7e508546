"""Where a frame lies: spacing, position, orientation, regions. Recorded as found, never repaired."""

from dataclasses import dataclass

from pydicom.dataset import Dataset

from ingest.dicom import header
from shards.schema import Row

_CENTIMETRES = 3  # PhysicalUnitsXDirection, PS3.3 C.8.5.5.1.15
_TISSUE = 1  # RegionSpatialFormat: 2D
_NEARLY_ALL = 0.95  # of the pixels: a line of text on an ultrasound screen takes about the rest


@dataclass(frozen=True)
class Region:
    """An ultrasound region: half-open pixel box and pixel size in mm where it is a length."""

    top: int
    left: int
    bottom: int
    right: int
    spacing_row_mm: float | None
    spacing_column_mm: float | None

    @property
    def area(self) -> int:
        """Pixels."""
        return (self.bottom - self.top) * (self.right - self.left)

    def crops(self, rows: int, columns: int) -> bool:
        """Whether it leaves room for text outside: not where it covers (nearly) all of the frame."""
        return self.area < _NEARLY_ALL * rows * columns


def group_item(dataset: Dataset, index: int, sequence: str) -> Dataset | None:
    """The first item of a functional group macro: per frame, else shared (PS3.3 C.7.6.16)."""
    for group in (
        header.item(dataset, "PerFrameFunctionalGroupsSequence", index),
        header.item(dataset, "SharedFunctionalGroupsSequence"),
    ):
        found = None if group is None else header.item(group, sequence)
        if found is not None:
            return found
    return None


def is_enhanced(dataset: Dataset) -> bool:
    return header.item(dataset, "PerFrameFunctionalGroupsSequence") is not None


def frame_geometry(dataset: Dataset, index: int) -> Row:
    """Spacing (mm), slice thickness (mm), position (mm, LPS) and orientation columns of a frame."""
    measures = group_item(dataset, index, "PixelMeasuresSequence") or dataset
    position = group_item(dataset, index, "PlanePositionSequence") or dataset
    orientation = group_item(dataset, index, "PlaneOrientationSequence") or dataset
    spacing = (
        header.numbers(measures, "PixelSpacing", 2)
        or header.numbers(dataset, "ImagerPixelSpacing", 2)
        or header.numbers(dataset, "NominalScannedPixelSpacing", 2)
        or [0.0, 0.0]
    )
    return {
        "spacing_row_mm": _positive(spacing[0]),
        "spacing_column_mm": _positive(spacing[1]),
        "slice_thickness_mm": _positive(header.number(measures, "SliceThickness")),
        "position_mm": header.numbers(position, "ImagePositionPatient", 3),
        "orientation": header.numbers(orientation, "ImageOrientationPatient", 6),
    }


def ultrasound_region(dataset: Dataset, rows: int, columns: int) -> Region | None:
    """The largest 2D tissue region, else the largest of any kind (PS3.3 C.8.5.5); None without one.

    One that crops the frame goes before one that does not. Of several images on one screen (a duplex, a
    biplane view) one is kept: a frame of the source is one sample, so that keys and frames stay one to one.
    """
    regions = []
    for item in header.items(dataset, "SequenceOfUltrasoundRegions"):
        ends = [header.integer(item, f"RegionLocation{end}") for end in ("MinY0", "MinX0", "MaxY1", "MaxX1")]
        if None in ends:
            continue
        top, left, bottom, right = (e for e in ends if e is not None)
        box = max(0, top), max(0, left), min(rows, bottom + 1), min(columns, right + 1)
        if box[2] - box[0] > 1 and box[3] - box[1] > 1:
            tissue = header.integer(item, "RegionSpatialFormat") == _TISSUE
            regions.append((tissue, Region(*box, _delta(item, "Y"), _delta(item, "X"))))
    if not regions:
        return None
    return max(regions, key=lambda r: (r[1].crops(rows, columns), r[0], r[1].area))[1]


def _delta(item: Dataset, axis: str) -> float | None:
    delta = header.number(item, f"PhysicalDelta{axis}")
    if delta is None or header.integer(item, f"PhysicalUnits{axis}Direction") != _CENTIMETRES:
        return None
    return _positive(abs(delta) * 10)


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None
