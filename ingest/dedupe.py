"""The same image twice in a unit: kept once. The same instance with other pixels: a collision."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ingest.frames import Frame
from shards.schema import Reason


@dataclass(frozen=True)
class Keys:
    """What an image is compared by: (SOPInstanceUID, frame) where there is one, and pixels with geometry."""

    instance: tuple[str, int] | None
    pixels: str
    content: tuple[object, ...]


@dataclass
class Seen:
    """The images of a unit so far. Frames of one file are compared with other files only.

    A static cine has equal frames, a volume equal slices of air: those are no duplicates of each other.
    """

    instances: dict[tuple[str, int], str] = field(default_factory=dict)
    contents: set[tuple[object, ...]] = field(default_factory=set)

    def reason(self, keys: Keys) -> Reason | None:
        """DUPLICATE, UID_COLLISION or None: by instance first, then by pixels and geometry."""
        if keys.instance is not None and keys.instance in self.instances:
            same = self.instances[keys.instance] == keys.pixels
            return Reason.DUPLICATE if same else Reason.UID_COLLISION
        return Reason.DUPLICATE if keys.content in self.contents else None

    def add(self, images: Iterable[Keys]) -> None:
        """Take up the images of one finished file."""
        for keys in images:
            if keys.instance is not None:
                self.instances[keys.instance] = keys.pixels
            self.contents.add(keys.content)


def image_keys(frame: Frame, pixel_digest: str) -> Keys:
    uid = frame.identifiers.get("instance")
    names = ("spacing_row_mm", "spacing_column_mm", "position_mm", "orientation")
    geometry = (_rounded(frame.columns.get(name)) for name in names)
    return Keys((uid, frame.index) if uid else None, pixel_digest, (frame.modality, pixel_digest, *geometry))


def _rounded(value: object) -> object:
    """To a micrometre: writers differ in the digits they print."""
    if isinstance(value, list):
        return tuple(round(v, 3) for v in value)
    return round(value, 3) if isinstance(value, float) else value
