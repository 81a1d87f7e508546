"""The dataset format: columns, reasons, records. What both sides of the system agree on.

The catalogue holds one row a sample with exactly the columns below: nothing else of a source file
reaches a dataset but its pixels (data.md section 4). The action letters are those of DICOM PS3.15
table E.1-1: K keep, C clean, D replace by a dummy, X remove, U replace a UID consistently; `-` marks a
column that has no DICOM attribute behind it.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import pyarrow as pa

FORMAT_VERSION = 2

Row = dict[str, Any]


class Split(StrEnum):
    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class Reason(StrEnum):
    """Why an input did not become a sample. A closed set: it is a metrics label and holds no PHI."""

    NOT_AN_IMAGE = "not_an_image"  # neither DICOM nor NIfTI nor a listed raster
    UNREADABLE = "unreadable"  # no valid header, truncated, damaged
    NO_PART10_HEADER = "no_part10_header"  # DICOM without preamble: readable by guessing only
    DICOMDIR = "dicomdir"  # a directory of files, not an image
    NO_MODALITY = "no_modality"
    MODALITY_OUT_OF_SCOPE = "modality_out_of_scope"
    SOP_CLASS_OUT_OF_SCOPE = "sop_class_out_of_scope"  # SR, SEG, RTDOSE, whole slide, ...
    NO_PIXEL_DATA = "no_pixel_data"
    TRANSFER_SYNTAX = "transfer_syntax_unsupported"  # video and unknown syntaxes
    BAD_PIXEL_DESCRIPTION = "bad_pixel_description"  # Rows, Columns, Bits ... missing or contradictory
    TOO_LARGE = "too_large"  # declared pixels above the limit: a bomb or not a 2D image
    DECODE_FAILED = "decode_failed"
    TOO_SMALL = "too_small"  # one side <= 32 px
    CONSTANT = "constant"  # blank image
    DERIVED = "derived"  # screen save, report, burned-in summary
    BURNED_IN_RISK = "burned_in_risk"  # high risk of text in the pixels (section 4)
    DUPLICATE = "duplicate"  # same instance and pixels, or same pixels: kept once
    UID_COLLISION = "uid_collision"  # same instance UID, other pixels
    LABEL_MAP = "label_map"  # NIfTI label, vector or RGB intents; atlases
    NOT_LISTED = "not_listed"  # raster image without a row in the CSV
    SOURCE_MISSING = "source_missing"  # planned, but gone or changed when it was read
    PARTNER_MISSING = "partner_missing"  # a NIfTI header whose image file is not beside it, or in an archive
    UNSAFE_MEMBER = "unsafe_member"  # of an archive: a name with .. or /, a link, a device
    ENCRYPTED = "encrypted"  # a member of an archive
    NESTED_ARCHIVE = "nested_archive"  # an archive in an archive
    CRASHED = "crashed"  # the decoder process died or ran out of time
    # Of a stack of slices, which stay 2D samples:
    VOLUME_WITHOUT_GEOMETRY = "volume_without_geometry"  # some have no position, orientation or spacing
    VOLUME_REPEATED_POSITION = "volume_repeated_position"  # two at one place
    VOLUME_UNEVEN = "volume_uneven"  # a gap, or steps of other length or direction


@dataclass(frozen=True)
class Column:
    """One catalogue column: Arrow type, PS3.15 action, meaning (with unit)."""

    name: str
    type: pa.DataType
    action: str
    doc: str
    nullable: bool = True


_S, _I32, _I64, _F64, _B = pa.string(), pa.int32(), pa.int64(), pa.float64(), pa.bool_()
_VEC = pa.list_(pa.float64())

COLUMNS: tuple[Column, ...] = (
    # identity
    Column("key", _S, "-", "sample key: keyed pseudonym, base32, no dots", False),
    Column("source", _S, "-", "keyed pseudonym of the source path", False),
    Column("unit", _S, "-", "id of the unit of work that wrote the sample", False),
    Column("kind", _S, "-", "dicom | nifti | raster", False),
    Column("modality", _S, "-", "partition: xr, ct, mr, us or as configured", False),
    Column("split", _S, "-", "train | val | test: a keyed bucket of the patient", False),
    Column("patient", _S, "D", "keyed pseudonym of site and PatientID", False),
    Column("study", _S, "U", "keyed pseudonym of StudyInstanceUID"),
    Column("series", _S, "U", "keyed pseudonym of SeriesInstanceUID"),
    Column("instance", _S, "U", "keyed pseudonym of SOPInstanceUID"),
    Column("frame", _I32, "-", "0-based frame or slice of the source file", False),
    # where the pixels are
    Column("shard", _S, "-", "file name of the shard inside shards/<modality>/", False),
    Column("offset", _I64, "-", "byte offset of the encoded pixels in the shard", False),
    Column("size", _I64, "-", "bytes of the encoded pixels", False),
    Column("crc32", _I64, "-", "CRC-32 of the encoded pixels; null where an earlier version wrote the row"),
    Column("codec", _S, "-", "htj2k | png16 | blosc2", False),
    # pixels at rest
    Column("rows", _I32, "K", "rows as stored", False),
    Column("columns", _I32, "K", "columns as stored", False),
    Column("dtype", _S, "-", "uint8 | uint16 | int16", False),
    Column("original_rows", _I32, "K", "Rows of the source", False),
    Column("original_columns", _I32, "K", "Columns of the source", False),
    Column("bits_stored", _I32, "K", "BitsStored of the source"),
    Column("pixel_digest", _S, "-", "SHA-256 of dtype, shape and stored pixels", False),
    Column("photometric", _S, "K", "PhotometricInterpretation of the source"),
    Column(
        "inverted",
        _B,
        "-",
        "True where MONOCHROME1, an INVERSE LUT or a negative slope was turned to larger = brighter",
        False,
    ),
    Column("was_color", _B, "-", "True where luma was taken of a colour image", False),
    Column("lossy_source", _B, "K", "the source syntax was lossy", False),
    # values
    Column("rescale_slope", _F64, "K", "slope; already applied for CT (pixels are HU)"),
    Column("rescale_intercept", _F64, "K", "intercept; already applied for CT"),
    Column("window_center", _F64, "K", "first VOI window, in the units of the stored pixels"),
    Column("window_width", _F64, "K", "first VOI window width"),
    Column("window_function", _S, "K", "LINEAR | LINEAR_EXACT | SIGMOID"),
    Column("p005", _F64, "-", "0.5th percentile of the stored pixels", False),
    Column("p995", _F64, "-", "99.5th percentile of the stored pixels", False),
    Column("mean", _F64, "-", "mean of the stored pixels", False),
    Column("std", _F64, "-", "standard deviation of the stored pixels", False),
    Column("minimum", _F64, "-", "minimum of the stored pixels", False),
    Column("maximum", _F64, "-", "maximum of the stored pixels", False),
    # geometry, mm
    Column("spacing_row_mm", _F64, "K", "distance of rows as stored, mm"),
    Column("spacing_column_mm", _F64, "K", "distance of columns as stored, mm"),
    Column("slice_thickness_mm", _F64, "K", "SliceThickness, mm"),
    Column("position_mm", _VEC, "K", "ImagePositionPatient, 3 values, mm, LPS"),
    Column("orientation", _VEC, "K", "ImageOrientationPatient, 6 direction cosines, LPS"),
    Column("frame_of_reference", _S, "U", "keyed pseudonym of FrameOfReferenceUID"),
    # acquisition, closed vocabularies and numbers only
    Column("sop_class", _S, "K", "SOP Class UID (standard classes only)"),
    Column("transfer_syntax", _S, "K", "Transfer Syntax UID of the source"),
    Column("manufacturer", _S, "C", "closed vocabulary, else 'other'"),
    Column("body_part", _S, "C", "closed vocabulary of BodyPartExamined, else 'other'"),
    Column("view_position", _S, "C", "closed vocabulary of ViewPosition, else 'other'"),
    Column("laterality", _S, "C", "L | R | B"),
    Column("sex", _S, "C", "M | F | O"),
    Column("age_years", _F64, "C", "age at the examination, capped at 90"),
    Column("kvp", _F64, "K", "tube voltage, kV"),
    Column("field_strength_t", _F64, "K", "magnetic field, tesla"),
    Column("echo_time_ms", _F64, "K", "echo time, ms"),
    Column("repetition_time_ms", _F64, "K", "repetition time, ms"),
    Column("echo_number", _I32, "K", "EchoNumbers"),
    Column(
        "study_date", _S, "C", "StudyDate moved by the patient's keyed days; null without date_shift_days"
    ),
    Column("accession", _S, "D", "keyed pseudonym of AccessionNumber"),
    Column("crop_top", _I32, "-", "first row kept of the source frame; null where not cropped"),
    Column("crop_left", _I32, "-", "first column kept; null likewise"),
    Column("volume", _S, "-", "key of the volume that holds the slice; null where none does"),
    Column("slice_index", _I32, "-", "0-based place in that volume, along its normal"),
)

# Of a volume: what all its slices share (null where they differ), under the names above.
_SHARED = (
    *("kind", "split", "patient", "study", "series", "frame_of_reference", "accession", "study_date"),
    *("codec", "rows", "columns", "dtype", "bits_stored", "photometric", "lossy_source"),
    *("window_center", "window_width", "window_function"),
    *("spacing_row_mm", "spacing_column_mm", "slice_thickness_mm", "orientation"),
    *("sop_class", "transfer_syntax", "manufacturer", "body_part", "laterality", "sex", "age_years"),
    *("kvp", "field_strength_t", "echo_time_ms", "repetition_time_ms", "echo_number"),
    *("crop_top", "crop_left"),
)
_BY_NAME = {c.name: c for c in COLUMNS}

VOLUME_COLUMNS: tuple[Column, ...] = (
    Column("key", _S, "-", "sample key: keyed pseudonym of its slices, base32, no dots", False),
    Column("unit", _S, "-", "id of the unit of work that wrote the volume", False),
    Column("modality", _S, "-", "partition: that of the slices and _volumes", False),
    *(_BY_NAME[name] for name in _SHARED),
    Column("shard", _S, "-", "file name of the shard inside shards/<modality>/", False),
    Column("offsets", pa.list_(_I64), "-", "byte offset of each encoded slice in the shard", False),
    Column("sizes", pa.list_(_I64), "-", "bytes of each encoded slice", False),
    Column("slices", _I32, "-", "number of slices", False),
    Column("slice_keys", pa.list_(_S), "-", "keys of the slices in the 2D partition, in order", False),
    Column("pixel_digest", _S, "-", "SHA-256 of the pixel_digest of each slice, in order", False),
    Column("rescale_slopes", _VEC, "K", "rescale_slope of each slice"),
    Column("rescale_intercepts", _VEC, "K", "rescale_intercept of each slice"),
    Column("mean", _F64, "-", "mean of the stored pixels", False),
    Column("std", _F64, "-", "standard deviation of the stored pixels", False),
    Column("minimum", _F64, "-", "minimum of the stored pixels", False),
    Column("maximum", _F64, "-", "maximum of the stored pixels", False),
    Column("position_mm", _VEC, "K", "centre of the first pixel of the first slice, mm, LPS", False),
    Column("spacing_slice_mm", _F64, "K", "distance of slices along their normal, mm", False),
    Column("affine", _VEC, "K", "[3, 4] row by row: (slice, row, column, 1) to mm, LPS", False),
    # Volume geometry checks as the Imaging Data Commons names them; tolerance 1 % of the slice distance.
    Column("single_orientation", _B, "K", "all slices of the series have one orientation", False),
    Column("orthogonal_orientation", _B, "K", "rows and columns at right angles, of unit length", False),
    Column("unique_slice_positions", _B, "K", "no two slices at one place", False),
    Column("consistent_in_plane", _B, "K", "slices lie straight above each other (no tilt)", False),
    Column("consistent_pixel_spacing", _B, "K", "one pixel spacing in the series", False),
    Column("consistent_image_dimensions", _B, "K", "one size of image in the series", False),
    Column("uniform_slice_spacing", _B, "K", "equal distances along the normal", False),
    Column("regularly_spaced_3d_volume", _B, "K", "a grid of right angles and equal steps", False),
    Column("obliquity_degrees", _F64, "K", "largest angle of an axis to its nearest patient axis"),
    Column("gantry_tilt_degrees", _F64, "K", "angle of the direction of stacking to the normal"),
)

COLUMN_NAMES: frozenset[str] = frozenset(c.name for c in COLUMNS)
# Where a sample lies is known only once its shard is written: these are in the catalogue, not in the tar.
LOCATION_COLUMNS: frozenset[str] = frozenset({"shard", "offset", "size", "crc32"})
# Not there in catalogues that an earlier version of this format wrote: readers see nulls.
ADDED_COLUMNS: tuple[str, ...] = ("crc32",)
VOLUME_LOCATION_COLUMNS: frozenset[str] = frozenset({"shard", "offsets", "sizes"})
_VOLUMES = "_volumes"

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", _S, nullable=False),  # keyed pseudonym of the source path
        pa.field("unit", _S, nullable=False),
        pa.field("frame", _I32, nullable=False),  # -1: the whole file
        # dicom | nifti | raster | other; volume: a stack, under the source of its first slice
        pa.field("kind", _S, nullable=False),
        pa.field("modality", _S, nullable=False),  # partition, or "none"
        pa.field("reason", _S, nullable=False),  # a Reason
    ]
)


@lru_cache(maxsize=1)
def catalog_schema() -> pa.Schema:
    """The Parquet schema of catalog/<modality>/*.parquet."""
    return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in COLUMNS])


@lru_cache(maxsize=1)
def volume_schema() -> pa.Schema:
    """The Parquet schema of catalog/<modality>_volumes/*.parquet."""
    return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in VOLUME_COLUMNS])


def volumes_of(modality: str) -> str:
    """The partition of the volumes of a modality. (A configured partition has no underscore.)"""
    return modality + _VOLUMES


def is_volumes(partition: str) -> bool:
    """Whether a partition holds volumes."""
    return partition.endswith(_VOLUMES)


def schema_of(partition: str) -> pa.Schema:
    """The catalogue schema of a partition, of 2D samples or of volumes."""
    return volume_schema() if is_volumes(partition) else catalog_schema()


def with_added_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A catalogue part with nulls for the columns that came after the version that wrote it."""
    for name in ADDED_COLUMNS:
        place = schema.get_field_index(name)
        if place >= 0 and name not in table.column_names:
            field = schema.field(name)
            table = table.add_column(place, field, pa.nulls(table.num_rows, field.type))
    return table


def member_names(row: Row, extension: str) -> list[str]:
    """Names of the tar members that hold the pixels of a catalogue row, in order."""
    if "slices" not in row:
        return [f"{row['key']}.{extension}"]
    return [f"{row['key']}.{number:04d}.{extension}" for number in range(row["slices"])]


def members_of(row: Row) -> list[tuple[int, int]]:
    """(offset, size) of the encoded images of a catalogue row, in order."""
    if "slices" not in row:
        return [(row["offset"], row["size"])]
    return list(zip(row["offsets"], row["sizes"], strict=True))


@lru_cache(maxsize=1)
def _arrow_types() -> dict[str, pa.DataType]:
    return {c.name: c.type for c in COLUMNS}


def plainly_storable(row: Row) -> bool:
    """Whether every value surely goes into Parquet and JSON; False where only Arrow itself can tell."""
    types = _arrow_types()
    return all(value is None or _fits(value, types[name]) for name, value in row.items())


def _fits(value: Any, kind: pa.DataType) -> bool:
    if type(value) is str:
        return kind is _S and value.isascii()
    if type(value) is bool:
        return kind is _B
    if type(value) is int:
        return (kind is _I32 and abs(value) < 1 << 31) or (kind is _I64 and abs(value) < 1 << 63)
    if type(value) is float:
        return kind is _F64 and math.isfinite(value)
    return type(value) is list and kind is _VEC and all(type(v) is float and math.isfinite(v) for v in value)


def _names(columns: tuple[Column, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """All, and those that every row has."""
    return frozenset(c.name for c in columns), tuple(c.name for c in columns if not c.nullable)


_NAMES, _REQUIRED = _names(COLUMNS)
_VOLUME_NAMES, _VOLUME_REQUIRED = _names(VOLUME_COLUMNS)


def check_row(row: Row) -> None:
    """Hold a row to the allow-list. Raises ValueError (our mistake, not the user's)."""
    _hold(row, _NAMES, _REQUIRED)


def check_volume_row(row: Row) -> None:
    """As check_row, for the row of a volume."""
    _hold(row, _VOLUME_NAMES, _VOLUME_REQUIRED)


def _hold(row: Row, names: frozenset[str], required: tuple[str, ...]) -> None:
    unknown = row.keys() - names
    if unknown:
        raise ValueError(f"columns not on the allow-list: {sorted(unknown)}")
    missing = [name for name in required if row.get(name) is None]
    if missing:
        raise ValueError(f"required columns missing: {missing}")
