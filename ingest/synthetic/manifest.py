"""What a generated folder holds, and what ingest is expected to make of each file."""

import json
from dataclasses import asdict, dataclass
from typing import Any

OK = "ok"


@dataclass(frozen=True)
class ManifestFile:
    """One file. `expected` is "ok" or a shards.schema.Reason; `images` are its frames or slices."""

    file: str  # POSIX path relative to the folder
    expected: str
    modality: str  # partition: ct, mr, xr, us, or "none"
    syntax: str  # transfer syntax UID, or "nifti", "png", "none"
    label: int | None = None  # 1: the patient has the finding
    patient: str | None = None  # as in the file: a made-up identifier
    images: int = 1


@dataclass(frozen=True)
class Manifest:
    files: tuple[ManifestFile, ...]
    tables: tuple[str, ...]  # the CSV files beside the images: no input, but they lie in the folder
    identities: tuple[str, ...]  # every made-up name, number and text that must not reach a dataset

    @property
    def accepted(self) -> tuple[ManifestFile, ...]:
        return tuple(f for f in self.files if f.expected == OK)

    @property
    def refused(self) -> tuple[ManifestFile, ...]:
        return tuple(f for f in self.files if f.expected != OK)

    def images(self) -> dict[str, int]:
        """Accepted images (frames, slices) by modality."""
        counts: dict[str, int] = {}
        for file in self.accepted:
            counts[file.modality] = counts.get(file.modality, 0) + file.images
        return counts

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "Manifest":
        data: dict[str, Any] = json.loads(text)
        return Manifest(
            files=tuple(ManifestFile(**row) for row in data["files"]),
            tables=tuple(data["tables"]),
            identities=tuple(data["identities"]),
        )
