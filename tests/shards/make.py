"""Small units for the tests of shards: deterministic samples of made-up pixels."""

from pathlib import Path

import numpy as np

from shards.codec import get_codec
from shards.commit import Commit, EncodedSample, QuarantineRow, commit_unit
from shards.dataset import DatasetInfo, open_or_create
from shards.ids import Pseudonymizer, digest
from shards.schema import FORMAT_VERSION, Reason
from shards.stats import pixel_digest, pixel_statistics
from shards.store import Store

PSEUDONYMS = Pseudonymizer(b"0123456789abcdef0123456789abcdef", "south")
DTYPES = {"ct": "int16", "xr": "uint16", "us": "uint8"}


def info(**changes) -> DatasetInfo:
    values = {
        "codec": "htj2k",
        "fingerprint": digest("a", "b"),
        "key_id": PSEUDONYMS.key_id,
        "config": {"xr_max_side": 1200, "limits": {"min_side": 33}},
        "deidentification": {"profile": "allow-list"},
        "modalities": ("ct", "xr"),
        "format_version": FORMAT_VERSION,
    }
    return DatasetInfo(**values | changes)


def pixels(modality: str, number: int, rows: int = 40, columns: int = 36) -> np.ndarray:
    noise = np.random.default_rng([number, len(modality)]).integers(0, 50, (rows, columns))
    smooth = np.add.outer(np.arange(rows), np.arange(columns)) * 2
    offset = -1000 if modality == "ct" else 0
    return (smooth + noise + offset).astype(DTYPES[modality])


def sample(unit: str, modality: str, number: int, codec: str = "htj2k") -> EncodedSample:
    image = pixels(modality, number)
    patient = PSEUDONYMS.id("patient", f"P{number // 2}")
    row = {
        "key": PSEUDONYMS.id("sample", f"{modality}{number}"),
        "source": PSEUDONYMS.id("source", f"{modality}{number}"),
        "unit": unit,
        "kind": "dicom",
        "modality": modality,
        "split": PSEUDONYMS.split(patient),
        "patient": patient,
        "frame": 0,
        "codec": codec,
        "rows": image.shape[0],
        "columns": image.shape[1],
        "dtype": image.dtype.name,
        "original_rows": 80,
        "original_columns": 72,
        "pixel_digest": pixel_digest(image),
        "inverted": False,
        "was_color": False,
        "lossy_source": False,
        "position_mm": [0.0, 1.5, float(number)],
        "age_years": 61.0,
    } | pixel_statistics(image)
    return EncodedSample(row, get_codec(codec).encode(image))


def samples(unit: str, modality: str = "ct", first: int = 0, number: int = 4) -> list[EncodedSample]:
    return [sample(unit, modality, n) for n in range(first, first + number)]


def refused(number: int = 1) -> list[QuarantineRow]:
    return [
        QuarantineRow(PSEUDONYMS.id("source", f"bad{n}"), -1, "dicom", "ct", Reason.UNREADABLE.value)
        for n in range(number)
    ]


def build(root: Path, scratch: Path, units: int = 2, number: int = 4) -> list[Commit]:
    """A dataset of `units` units, CT and X-ray in turns, with one refusal each."""
    store = Store(root)
    open_or_create(store, info())
    commits = []
    for u in range(units):
        modality = ("ct", "xr")[u % 2]
        unit = digest("unit", str(u))
        bad = [QuarantineRow(PSEUDONYMS.id("source", f"bad{u}"), -1, "other", "none", "not_an_image")]
        rows = samples(unit, modality, u * number, number)
        commits.append(commit_unit(store, unit, rows, bad, scratch, number + 1))
    return commits


def tree(root: Path) -> dict[str, bytes]:
    """All files below a folder, temporary ones too: {relative name: content}."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
