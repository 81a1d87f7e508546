"""The nearest prototype of every image: what the clusters of a run are made of.

Whole images, as `embed` sees them, through backbone and projection head in evaluation mode; the prototype is
that of the image's own group (its modality) with the largest cosine, the distance is 1 - cosine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from shards.errors import UserError
from shards.tar import ShardReader
from trainer.config import SHARED
from trainer.embed import (
    Part,
    Progress,
    image_batches,
    key_fields,
    on_device,
    rows_of,
    size_for,
    size_name,
    table_writer,
)
from trainer.export import info_text, load_strictly
from trainer.models.encoders import check_encoder, feature_dim
from trainer.models.heads import projection_head
from trainer.source import Source
from trainer.whole import whole_image, whole_sample

_GROUP_ROWS = 65_536  # of one row group


@dataclass(frozen=True)
class Projector:
    """`network`: images [n, C, H, W] to unit features [n, F]; `prototypes`: of each modality, unit rows
    [K, F]."""

    network: nn.Module
    prototypes: dict[str, Tensor]


@dataclass
class Assigned:
    """One modality: images of each prototype, int64 [K], and its nearest images: distances [n] ascending and
    catalogue rows [n] of each prototype that has any."""

    modality: str
    counts: NDArray[np.int64]
    nearest: dict[int, tuple[NDArray[np.float32], NDArray[np.int64]]] = field(default_factory=dict)


class _UnitFeatures(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.head(self.backbone(images)).float(), dim=1)


def open_projector(source: Source) -> Projector:
    """Head and prototypes of a run. Raises UserError where there are none."""
    config, model = source.config, source.others
    if config is None or model is None:
        raise UserError("prototypes are in the checkpoints of a run: give its folder, --run RUN")
    found = {n.split(".")[1]: v for n, v in model.items() if n.startswith("prototypes.")}
    if not found:
        raise UserError("the run has no prototypes (another method trained it): nothing can be assigned")
    head = projection_head(feature_dim(source.network), config.model.hidden_dim, config.model.feature_dim)
    start = "projection_head."
    tensors = {n.removeprefix(start): v for n, v in model.items() if n.startswith(start)}
    load_strictly(head, tensors, "the projection head of the run does not fit its settings")
    prototypes = {m: found[m] if m in found else found[SHARED] for m in source.info.modalities}
    units = {name: normalize(value.float(), dim=1) for name, value in prototypes.items()}
    return Projector(_UnitFeatures(source.network, head).eval(), units)


def assign(
    root: str,
    source: Source,
    out: Path,
    parts: Sequence[Part],
    *,
    nearest: int = 8,
    size: int | None = None,
    batch_size: int = 64,
    threads: int = 2,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Assigned]:
    """Write `out`: key, modality, split, prototype (int32), distance (float32); what each prototype holds.

    nearest: images of each prototype to keep for a contact sheet. Raises UserError; then there is no `out`.
    """
    info = source.info
    whole = size_for(info, size)
    fix = "give another --size"
    check_encoder(source.network, info.backbone, info.in_channels, [whole], modes=(False,), fix=fix)
    projector = open_projector(source)
    strange = [part.modality for part in parts if part.modality not in projector.prototypes]
    if strange:
        raise UserError(
            f"the run has no prototypes of {strange[0]}: it has {', '.join(projector.prototypes)}"
        )
    schema = pa.schema(
        [
            *key_fields(),
            pa.field("prototype", pa.int32(), nullable=False),
            pa.field("distance", pa.float32(), nullable=False),
        ],
        metadata={"medswav_encoder": info_text(info), "medswav_image_size": size_name(whole)},
    )
    done, found = 0, []
    with on_device(projector.network, device) as run, table_writer(out, schema, _GROUP_ROWS) as write:
        for part in parts:
            prototypes = projector.prototypes[part.modality]
            kept = _Nearest(nearest)
            counts = np.zeros(len(prototypes), np.int64)
            for first, count, images in image_batches(root, part, whole, batch_size, threads):
                chosen, distance = nearest_prototypes(run(images, info.in_channels)[:count], prototypes)
                columns = {"prototype": pa.array(chosen), "distance": pa.array(distance)}
                write(rows_of(part, first, count, schema, columns))
                counts += np.bincount(chosen, minlength=len(counts))
                kept.add(chosen, distance, np.arange(first, first + count))
                done += count
                if progress is not None:
                    progress(done)
            found.append(Assigned(part.modality, counts, kept.by_prototype()))
    return found


def nearest_prototypes(z: Tensor, prototypes: Tensor) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Index of the prototype with the largest cosine (the first of equal ones), and 1 - cosine, at least 0.

    z [n, F] and prototypes [K, F]: unit rows.
    """
    cosine, index = (z @ prototypes.T).max(dim=1)
    return index.numpy().astype(np.int32), (1 - cosine).clamp_min(0).numpy()


class _Nearest:
    """The `limit` images with the smallest distances of every prototype seen so far."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._prototype = np.zeros(0, np.int32)
        self._distance = np.zeros(0, np.float32)
        self._row = np.zeros(0, np.int64)

    def add(
        self, prototype: NDArray[np.int32], distance: NDArray[np.float32], row: NDArray[np.int64]
    ) -> None:
        prototype = np.concatenate([self._prototype, prototype])
        distance = np.concatenate([self._distance, distance])
        row = np.concatenate([self._row, row])
        order = np.lexsort((row, distance, prototype))
        ordered = prototype[order]
        rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # within its prototype
        kept = order[rank < self._limit]
        self._prototype, self._distance, self._row = prototype[kept], distance[kept], row[kept]

    def by_prototype(self) -> dict[int, tuple[NDArray[np.float32], NDArray[np.int64]]]:
        return {
            int(number): (self._distance[self._prototype == number], self._row[self._prototype == number])
            for number in np.unique(self._prototype)
        }


def pictures(root: str, part: Part, rows: NDArray[np.int64], side: int) -> list[NDArray[np.uint8]]:
    """Images of a contact sheet: uint8 [side, side]; of a volume the middle slice of its box."""
    reader = ShardReader(root)
    images = [_picture(reader, part, part.rows.row(int(i)), side) for i in rows]
    reader.close()
    return [(image * 255).round().astype(np.uint8) for image in images]


def _picture(reader: ShardReader, part: Part, row: dict[str, Any], side: int) -> NDArray[np.float32]:
    if part.volume is None:
        return whole_image(reader, part.modality, row, side, part.intensity)
    slices, rows, columns = part.volume.box
    config = part.volume.model_copy(update={"box": (slices, side, max(1, round(side * columns / rows)))})
    middle = whole_sample(reader, part.modality, row, config.box, part.intensity, config)[slices // 2]
    picture = np.zeros((side, side), np.float32)
    kept = middle[:, :side]
    start = (side - kept.shape[1]) // 2
    picture[:, start : start + kept.shape[1]] = kept
    return picture
