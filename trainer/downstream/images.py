"""Labelled images of a dataset, read for a task: whole images of one size, with light augmentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shards import catalog
from shards.errors import UserError
from shards.schema import Split, is_volumes
from shards.tar import ShardReader
from trainer.batches import NEEDED_COLUMNS, whole_image
from trainer.config import IntensityConfig
from trainer.config_data import Range, Strict
from trainer.downstream.task import Random
from trainer.rows import Modality

SPLITS = tuple(split.value for split in Split)


class AugmentConfig(Strict):
    """Of training images only, each drawn anew in every epoch. flip: probability of a mirrored image (left
    and right); shift: the image moves up to this share of its side, in both directions; crop: its side is
    enlarged until this share of it is seen (below 1: cut off, above: mirrored at the border); gamma: [0, 1]
    to this power. All zeros and ones: none."""

    flip: float = Field(default=0.0, ge=0, le=1)
    shift: float = Field(default=0.05, ge=0, lt=0.5)
    crop: Range = (0.85, 1.0)
    gamma: Range = (0.8, 1.25)

    @model_validator(mode="after")
    def _rising(self) -> "AugmentConfig":
        for name in ("crop", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={[low, high]} must be a rising range above 0")
        return self


NO_AUGMENTATION = AugmentConfig(flip=0, shift=0, crop=(1, 1), gamma=(1, 1))


@dataclass(frozen=True)
class Found:
    """Labelled images, modality by modality, each sorted by key. place: of each its row in `rows`."""

    keys: NDArray[np.str_]
    patients: NDArray[np.str_]
    splits: NDArray[np.str_]
    table: NDArray[np.int64]  # the row of the label table
    modality: tuple[str, ...]
    place: tuple[int, ...]
    rows: Mapping[str, Modality]

    def where(self, split: str) -> NDArray[np.int64]:
        return np.flatnonzero(self.splits == split)


def find_images(dataset: str, labels: pa.Table, modalities: Sequence[str] = ()) -> Found:
    """The images of a dataset that the table has keys of. modalities: only of these; none: of all.

    The split is the catalogue's, unless the table has a column `split` that is not empty for the image.
    Raises UserError where there are none, and for a split that is none.
    """
    there = [m for m, splits in catalog.counts(dataset).items() if sum(splits.values()) and not is_volumes(m)]
    strange = sorted(set(modalities) - set(there))
    if strange:
        raise UserError(f"the dataset has no {strange[0]} images (there are: {', '.join(there) or 'none'})")
    value_set = labels["key"].combine_chunks().cast(pa.string())
    own = labels["split"].to_pylist() if "split" in labels.column_names else None
    keys, patients, splits, names = list[str](), list[str](), list[str](), list[str]()
    chosen, places = list[int](), list[int]()
    rows = {}
    for modality in modalities or there:
        table = catalog.load(dataset, modality, [*NEEDED_COLUMNS, "patient", "split"])
        table = table.filter(pc.is_in(table["key"], value_set=value_set))
        rows[modality] = Modality(modality, table)
        index = pc.index_in(table["key"].combine_chunks(), value_set=value_set).to_pylist()
        keys += table["key"].to_pylist()
        patients += table["patient"].to_pylist()
        given = [None] * len(index) if own is None else [own[i] for i in index]
        splits += [one or of for one, of in zip(given, table["split"].to_pylist(), strict=True)]
        chosen += index
        names += [modality] * len(index)
        places += range(len(index))
    if not keys:
        raise UserError(
            f"none of the {labels.num_rows} keys of the label table is an image of the dataset: join the "
            "table to it with medswav ingest label"
        )
    wrong = sorted(set(splits) - set(SPLITS))
    if wrong:
        raise UserError(f"the label table has a split {wrong[0]!r}: it is train, val, test or empty")
    return Found(
        np.array(keys, np.str_),
        np.array(patients, np.str_),
        np.array(splits, np.str_),
        np.array(chosen, np.int64),
        tuple(names),
        tuple(places),
        rows,
    )


class ImageSource:
    """image(i): f32 [C, S, S] in [0, 1] of the i-th of `found`; kept in memory up to cache_bytes.

    Grey, repeated over the channels, as the whole images of probes and `embed` are (batches.whole_image).
    """

    def __init__(
        self,
        dataset: str,
        found: Found,
        size: int,
        channels: int,
        intensity: Mapping[str, IntensityConfig],
        cache_bytes: int,
    ) -> None:
        self._found, self._size, self._channels, self._intensity = found, size, channels, intensity
        self._reader = ShardReader(dataset)
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._most = cache_bytes // (4 * size * size)
        cv2.setNumThreads(1)

    def grey(self, index: int) -> NDArray[np.float32]:
        """f32 [S, S]."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        modality = self._found.modality[index]
        row = self._found.rows[modality].row(self._found.place[index])
        intensity = self._intensity.get(modality, IntensityConfig())
        image = whole_image(self._reader, modality, row, self._size, intensity)
        if len(self._kept) < self._most:
            self._kept[index] = image
        return image

    def image(
        self, chosen: NDArray[np.int64], augment: AugmentConfig, index: int, random: Random
    ) -> NDArray[np.float32]:
        """The index-th of `chosen`, augmented where there are random numbers."""
        grey = self.grey(int(chosen[index]))
        if random is not None:
            grey = augmented(grey, augment, random)
        return np.repeat(grey[None], self._channels, axis=0)

    def split(self, chosen: NDArray[np.int64], augment: AugmentConfig) -> Any:
        """The function of classify.Labelled."""
        return partial(self.image, chosen, augment)


def augmented(
    image: NDArray[np.float32], config: AugmentConfig, random: np.random.Generator
) -> NDArray[np.float32]:
    """f32 [H, W] in [0, 1] to the same: mirrored, cropped and shifted (bilinear), then to the power gamma."""
    flip, x, y, crop, gamma = random.random(5)
    height, width = image.shape
    share = config.crop[0] + (config.crop[1] - config.crop[0]) * crop
    sign = -1.0 if flip < config.flip else 1.0
    matrix = np.array([[sign * share, 0, 0], [0, share, 0]])  # from the new image to the old one
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    moved = config.shift * (2 * np.array([x, y]) - 1) * (width, height)
    matrix[:, 2] = centre + moved - matrix[:, :2] @ centre
    out: Any = image
    if not np.allclose(matrix, [[1, 0, 0], [0, 1, 0]]):
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        out = cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    power = config.gamma[0] + (config.gamma[1] - config.gamma[0]) * gamma
    return np.asarray(out if power == 1 else np.clip(out, 0, 1) ** np.float32(power), np.float32)
