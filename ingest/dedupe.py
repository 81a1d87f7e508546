"""The same image twice in a unit: kept once. The same instance with other pixels: a collision."""

from dataclasses import dataclass, field

from ingest.frames import Frame
from shards.schema import Reason

_InstanceKey = tuple[str, int]
_ContentKey = tuple[object, ...]


@dataclass
class Seen:
    """What a unit holds so far. Frames of one file are compared with other files only.

    A static cine has equal frames, a series equal air slices: those are no duplicates of each other.
    """

    instances: dict[_InstanceKey, str] = field(default_factory=dict)
    contents: set[_ContentKey] = field(default_factory=set)

    def reason(self, frame: Frame, pixel_digest: str) -> Reason | None:
        """DUPLICATE, UID_COLLISION or None: by instance UID first, then by pixels and geometry."""
        instance = _instance_key(frame)
        if instance is not None and instance in self.instances:
            same = self.instances[instance] == pixel_digest
            return Reason.DUPLICATE if same else Reason.UID_COLLISION
        return Reason.DUPLICATE if _content_key(frame, pixel_digest) in self.contents else None

    def add(self, frame: Frame, pixel_digest: str) -> None:
        instance = _instance_key(frame)
        if instance is not None:
            self.instances[instance] = pixel_digest
        self.contents.add(_content_key(frame, pixel_digest))


def _instance_key(frame: Frame) -> _InstanceKey | None:
    uid = frame.identifiers.get("instance")
    return (uid, frame.index) if uid else None


def _content_key(frame: Frame, pixel_digest: str) -> _ContentKey:
    columns = frame.columns
    return (
        frame.modality,
        pixel_digest,
        *(_rounded(columns.get(name)) for name in ("spacing_row_mm", "spacing_column_mm")),
        *(_rounded(columns.get(name)) for name in ("position_mm", "orientation")),
    )


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return tuple(round(v, 3) for v in value)
    return round(value, 3) if isinstance(value, float) else value
