"""From a private frame to an allow-listed row. What is not written here never reaches a dataset.

Free text passes through closed vocabularies only; identifiers become keyed pseudonyms; ages are capped.
The PS3.15 action of each column stands in shards.schema.
"""

import datetime
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ingest.config import IngestConfig
from ingest.discover import Entry
from ingest.frames import Frame
from ingest.vocabulary import BODY_PARTS, VIEW_POSITIONS, manufacturer
from shards.ids import Pseudonymizer
from shards.schema import COLUMNS, VOLUME_COLUMNS, Column, Row

AGE_CAP_YEARS = 90.0  # PS3.15 and HIPAA safe harbour: older is one group

_LATERALITY = frozenset("LRB")
_SEX = frozenset("MFO")
_AGE = re.compile(r"^(\d{1,3})([DWMY])$")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def make_row(frame: Frame, entry: Entry, unit: str, config: IngestConfig, names: Pseudonymizer) -> Row:
    """The catalogue row of a frame, without the pixel statistics, digest and location. `names`: the key."""
    identifiers, texts = frame.identifiers, frame.texts
    patient = patient_id(entry, identifiers, names)
    row: Row = {
        "key": sample_key(entry, frame.index, names),
        "source": source_id(entry.source, names),
        "unit": unit,
        "kind": entry.kind,
        "modality": frame.modality,
        "split": entry.split or names.split(patient, config.split_fractions),
        "patient": patient,
        "frame": frame.index,
        "codec": config.codec,
        "rows": frame.pixels.shape[0],
        "columns": frame.pixels.shape[1],
        "dtype": frame.pixels.dtype.name,
        "manufacturer": manufacturer(texts.get("manufacturer", "")),
        "body_part": _of(texts.get("body_part", "").replace(" ", ""), BODY_PARTS, "other"),
        "view_position": _of(texts.get("view_position", ""), VIEW_POSITIONS, "other"),
        "laterality": _of(texts.get("laterality", ""), _LATERALITY, None),
        "sex": _of(texts.get("sex", ""), _SEX, None),
        "age_years": age_years(
            texts.get("age", ""), texts.get("birth_date", ""), texts.get("study_date", "")
        ),
    }
    if config.date_shift_days:
        row["study_date"] = shifted_date(
            texts.get("study_date", ""), names.shift_days(patient, config.date_shift_days)
        )
    for name in ("study", "series", "instance", "frame_of_reference", "accession"):
        if identifiers.get(name):
            row[name] = _known_id(names, name, identifiers[name])
    return row | {name: _finite(value) for name, value in frame.columns.items()}


def _finite(value: Any) -> Any:
    """None for a number, or a list with a number, that is infinite or NaN (JSON has none)."""
    numbers = value if isinstance(value, list) else [value]
    return None if any(isinstance(n, float) and not math.isfinite(n) for n in numbers) else value


@lru_cache(maxsize=256)
def _known_id(names: Pseudonymizer, kind: str, text: str) -> str:
    """names.id: the slices of a series share all but one of these."""
    return names.id(kind, text)


def sample_key(entry: Entry, frame: int, names: Pseudonymizer) -> str:
    """The key of one frame of an input: the same for every unit that converts it."""
    return names.id("sample", f"{entry.identity}/{frame}")


def source_id(source: str, names: Pseudonymizer) -> str:
    """Pseudonym of an Entry's `source`, its path below its source folder: the catalogue's `source`."""
    return names.id("source", source)


def patient_id(entry: Entry, identifiers: dict[str, str], names: Pseudonymizer) -> str:
    """Pseudonym of the patient; without a PatientID of the study, the series or the file, never shared."""
    patient = identifiers.get("patient") or entry.patient
    if patient:
        return _known_id(names, "patient", patient)
    for name in ("study", "series"):
        if identifiers.get(name):
            return names.id(f"patient of {name}", identifiers[name])
    return names.id("patient of file", entry.identity)


@lru_cache(maxsize=256)  # the slices of a series share them
def age_years(age: str, birth_date: str, study_date: str) -> float | None:
    """Years from PatientAge (045Y, 010M, ...), else from two dates; whole years from 2 on; capped at 90."""
    match = _AGE.match(age.strip().upper())
    if match:
        years = int(match.group(1)) * _YEARS[match.group(2)]
    else:
        born, seen = _date(birth_date), _date(study_date)
        if born is None or seen is None or seen < born:
            return None
        years = (seen - born).days / 365.25
    years = float(int(years)) if years >= 2 else round(years, 2)
    return min(years, AGE_CAP_YEARS)


def shifted_date(date: str, days: int) -> str | None:
    """A DICOM date (YYYYMMDD) moved by `days`, in ISO 8601; None where it is none."""
    seen = _date(date)
    try:
        return None if seen is None else (seen + datetime.timedelta(days=days)).isoformat()
    except OverflowError:
        return None


def deidentification(config: IngestConfig) -> dict[str, Any]:
    """The block of dataset.json that says how this dataset was de-identified."""
    volumes = {column.name: column.action for column in VOLUME_COLUMNS}
    return {
        "method": "only the allow-listed columns and the pixels leave a source file",
        "pseudonyms": "HMAC-SHA256 under a secret key",
        "age_cap_years": AGE_CAP_YEARS,
        "date_shift_days": config.date_shift_days,
        "mask_boxes": len(config.mask_boxes),
        "burned_in_classes": "kept" if config.allow_burned_in else "quarantined",
        "columns": {column.name: column.action for column in COLUMNS},
    } | ({"volume_columns": volumes} if "volumes" in config.outputs else {})


def columns_document(columns: Sequence[Column] = COLUMNS) -> str:
    """Markdown table of columns of a dataset with their PS3.15 action (docs/columns.md)."""
    lines = [
        "| column | type | PS3.15 action | meaning |",
        "|---|---|---|---|",
        *(f"| `{c.name}` | {c.type} | {c.action} | {c.doc} |" for c in columns),
    ]
    return "\n".join(lines) + "\n"


def _of(text: str, vocabulary: frozenset[str], otherwise: str | None) -> str | None:
    text = text.strip().upper()
    if not text:
        return None
    return text if text in vocabulary else otherwise


def _date(text: str) -> datetime.date | None:
    try:
        return datetime.datetime.strptime(text.strip()[:8], "%Y%m%d").date()
    except ValueError:
        return None
