"""The settings of an ingest run: typed, unknown keys refused, with a fingerprint of what shapes output."""

import json
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ingest.limits import parse_bytes
from ingest.vocabulary import MANUFACTURERS
from shards.errors import UserError
from shards.ids import digest
from shards.schema import FORMAT_VERSION

# Raised with every change of a reading rule, so that datasets of two rule sets are never mixed.
RULES_VERSION = 4

# Names that tables use for the DICOM modalities.
MODALITY_NAMES = {
    "xray": "CR",
    "x-ray": "CR",
    "xr": "CR",
    "cxr": "CR",
    "cr": "CR",
    "dx": "DX",
    "ct": "CT",
    "mr": "MR",
    "mri": "MR",
    "us": "US",
    "ultrasound": "US",
}

# Settings that say where and how to work, not what comes out.
_NOT_IN_FINGERPRINT = frozenset(
    {
        "sources",
        "output",
        "key_file",
        "path_map",
        "labels",
        "tables",
        "discover_tables",
        "unit_files",
        "unit_bytes",
        "failure_budget",
        "settle_seconds",
        "bytes_per_second",
        "open_files",
        "sandbox",
        "file_seconds",
        "memory_mib",
    }
)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TableConfig(_Settings):
    """A CSV beside images: which files to take, and what the pixels cannot say.

    `file_column` holds paths relative to the folder of the CSV. The modality is one for the whole table
    (`modality`) or a column; names as in MODALITY_NAMES or a partition. Without a patient column every
    file is its own patient. A split is that of the patient: it holds for all files of that patient, listed or
    not. DICOM files keep the modality and the PatientID of their headers.
    """

    path: str
    file_column: str = "file"
    modality: str | None = None
    modality_column: str | None = "modality"
    patient_column: str | None = "patient"
    split_column: str | None = None  # train | val | test in the table overrides the keyed split


class MaskBox(_Settings):
    """A known place of text in the images of one kind of device: its pixels are blanked (ingest.masks).

    It applies to frames of exactly `rows` x `columns` of the Modality (0008,0060) and, where given, of the
    manufacturer (ingest.vocabulary). Pixels, half open: rows [top, bottom), columns [left, right).
    """

    modality: str
    manufacturer: str | None = None
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    top: int = Field(ge=0)
    left: int = Field(ge=0)
    bottom: int
    right: int
    # The boxes leave no text: such an image is no longer refused as burned_in_risk. A person has looked.
    covers_text: bool = False

    @model_validator(mode="after")
    def _box_in_image(self) -> Self:
        if not (self.top < self.bottom <= self.rows and self.left < self.right <= self.columns):
            raise ValueError("a mask box lies inside rows x columns, with top < bottom and left < right")
        if self.manufacturer is not None and self.manufacturer not in MANUFACTURERS:
            raise ValueError(f"the manufacturer of a mask box is one of {', '.join(sorted(MANUFACTURERS))}")
        return self


class LabelConfig(_Settings):
    """A table of labels that `ingest run` joins to the samples when it ends (ingest.labels).

    kind: classes (one column), multi (several columns of 0/1, or one of a|b), boxes (columns x0, y0, x1, y1
    or one of a JSON list) or masks (one column of PNG files, relative to the table).
    """

    path: str
    name: str = "labels"
    kind: Literal["classes", "multi", "boxes", "masks"] = "classes"
    columns: tuple[str, ...] = ()  # of the values; () = label; x0, y0, x1, y1; mask
    label_column: str | None = "label"  # boxes: the class of a box, where the table has the column
    by: str | None = None  # the joining column, where the table has several


class ReadRules(_Settings):
    """What reading one file depends on; travels to the decoder process as JSON."""

    # Modality (0008,0060) -> partition; what is not here is out of scope.
    modalities: dict[str, str] = Field(
        default_factory=lambda: {"CR": "xr", "DX": "xr", "CT": "ct", "MR": "mr", "US": "us"}
    )
    nifti_modality: str = "mr"  # partition of NIfTI files, whose headers do not say it
    xr_max_side: int = Field(1200, ge=64)  # pixels; X-rays are reduced to it by area averaging
    min_side: int = Field(33, ge=1)  # pixels
    # Declared samples (rows x columns x samples per pixel) of a frame, of a file; above: refused undecoded.
    # The largest detectors have 28 million; 30 Mi keep a worker below 600 MB (tests/ingest/test_bombs.py).
    max_frame_pixels: int = Field(30 << 20, ge=1)
    max_pixels: int = Field(4 << 30, ge=1)
    max_member_bytes: int = Field(2 << 30, ge=1)  # one file of a zip or tar, inflated; above: refused
    max_members: int = Field(250_000, ge=1)  # files of one archive; the rest is refused
    frames_per_cine: int = Field(16, ge=1)
    # What becomes a sample: 2D slices, and beside them volumes, where slices are ones (ingest.stacks).
    outputs: tuple[Literal["slices", "volumes"], ...] = ("slices",)
    # Keep the classes with a high risk of text in the pixels: secondary capture, ultrasound without regions.
    allow_burned_in: bool = False
    mask_boxes: tuple[MaskBox, ...] = ()  # known places of burned-in text, blanked after decoding

    @field_validator("modalities")
    @classmethod
    def _partitions_are_names(cls, value: dict[str, str]) -> dict[str, str]:
        for partition in value.values():
            _check_partition(partition)
        return value

    @field_validator("outputs")
    @classmethod
    def _slices_are_made(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "slices" not in value:
            raise ValueError("volumes are made beside slices: give slices,volumes")
        return tuple(sorted(set(value)))

    @field_validator("nifti_modality")
    @classmethod
    def _partition_is_a_name(cls, value: str) -> str:
        _check_partition(value)
        return value


class IngestConfig(ReadRules):
    """Everything of an ingest run. Build it with `load_config` to get UserError for mistakes."""

    sources: tuple[str, ...] = Field(min_length=1)
    output: str
    key_file: str | None = None  # None: the environment variable MEDSWAV_KEY
    # Private file: pseudonym of each source -> its path, one JSON line each. None: nothing is written.
    path_map: str | None = None
    # 0: no date is kept. Else StudyDate, moved by a keyed number of days in [-n, n], one for each patient.
    date_shift_days: int = Field(0, ge=0, le=36500)
    labels: tuple[LabelConfig, ...] = ()  # joined at the end of the run
    site: str = ""  # keeps equal PatientIDs of two hospitals apart
    codec: Literal["htj2k", "png16", "blosc2"] = "htj2k"
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    tables: tuple[TableConfig, ...] = ()
    discover_tables: bool = True  # a CSV named images.csv with a `file` column counts as a table
    unit_files: int = Field(256, ge=1)
    unit_bytes: int = Field(256 << 20, ge=1)  # a unit ends when its source files reach this
    # `ingest run` ends with exit code 3 when more than this part of the inputs crashed or did not decode.
    failure_budget: float = Field(0.1, ge=0, le=1)
    # Files changed less than this many seconds ago (ctime) are left for later: they may still be written.
    settle_seconds: float = Field(0.0, ge=0)
    # Of the sources, over the whole job: all workers on all nodes, the header scan too (ingest.limits).
    bytes_per_second: int | None = Field(None, ge=1)  # also as 50MB
    open_files: int | None = Field(None, ge=1)  # at a time
    sandbox: Literal["process", "inline"] = "process"
    file_seconds: float = Field(120.0, gt=0)  # for one image of a file; later: the decoder process is killed
    memory_mib: int = Field(4096, ge=256)  # address space of the decoder process

    @field_validator("bytes_per_second", mode="before")
    @classmethod
    def _bytes_with_units(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fractions_sum_to_one(self) -> Self:
        if min(self.split_fractions) < 0 or abs(sum(self.split_fractions) - 1) > 1e-9:
            raise ValueError("split_fractions must be three non-negative numbers that sum to 1")
        return self

    def rules(self) -> ReadRules:
        return ReadRules(**{name: getattr(self, name) for name in ReadRules.model_fields})

    def shaping(self, site_id: str = "") -> dict[str, Any]:
        """The settings that decide the output bytes, as JSON types (recorded in dataset.json).

        site_id: the keyed id of the site (Pseudonymizer.site_id). Its name is not recorded, nor a plain
        digest of it: the names of all hospitals of a country are quickly tried.
        """
        settings = self.model_dump(mode="json", exclude=set(_NOT_IN_FINGERPRINT))
        settings["site"] = site_id
        return settings | {"rules_version": RULES_VERSION, "format_version": FORMAT_VERSION}

    def fingerprint(self, site_id: str = "") -> str:
        return digest("ingest", json.dumps(self.shaping(site_id), sort_keys=True))


def load_config(settings: dict[str, Any] | str | Path) -> IngestConfig:
    """IngestConfig of a dict or a YAML file. Raises UserError that names the wrong setting."""
    if not isinstance(settings, dict):
        settings = read_settings(Path(settings))
    try:
        return IngestConfig(**settings)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "configuration"
        message = first["msg"].lower().removeprefix("value error, ")
        raise UserError(f"ingest setting {name}: {message}") from None


def partition_of(name: str, modalities: dict[str, str]) -> str | None:
    """The partition of a modality as a table writes it (MR, mri, xr ...); None where it is out of scope."""
    name = name.strip().lower()
    code = MODALITY_NAMES.get(name, name.upper())
    if code in modalities:
        return modalities[code]
    return name if name in modalities.values() else None


def _check_partition(name: str) -> None:
    # A partition is a folder name, a metrics label and part of file names.
    if not (name.isascii() and name.isalnum() and name == name.lower() and name != "none"):
        raise ValueError("a partition is lower-case letters and digits, and not 'none'")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, unchecked. Raises UserError where it is no mapping."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"the configuration {path} is not YAML: correct it") from None
    if not isinstance(loaded, dict):
        raise UserError(f"the configuration {path} must be a mapping of settings")
    return loaded
