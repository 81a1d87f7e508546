"""The same image twice in a unit: kept once. The same instance with other pixels: a collision.

Over units: shards.duplicates.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ingest.frames import Frame
from shards.duplicates import geometry_of
from shards.ids import Pseudonymizer
from shards.schema import Reason, Row


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


def seen_before(rows: Iterable[Row]) -> Seen:
    """The images of catalogue rows; instances are pseudonyms there (named_by)."""
    seen = Seen()
    for row in rows:
        instance = (row["instance"], row["frame"]) if row["instance"] else None
        seen.add([Keys(instance, row["pixel_digest"], _content(row["modality"], row["pixel_digest"], row))])
    return seen


def named_by(keys: Keys, names: Pseudonymizer) -> Keys:
    """The keys with the pseudonym of the instance, as catalogue rows have it."""
    if keys.instance is None:
        return keys
    return replace(keys, instance=(names.id("instance", keys.instance[0]), keys.instance[1]))


def image_keys(frame: Frame, pixel_digest: str) -> Keys:
    uid = frame.identifiers.get("instance")
    content = _content(frame.modality, pixel_digest, frame.columns)
    return Keys((uid, frame.index) if uid else None, pixel_digest, content)


def _content(modality: str, pixel_digest: str, columns: Row) -> tuple[object, ...]:
    return modality, pixel_digest, *geometry_of(columns)
