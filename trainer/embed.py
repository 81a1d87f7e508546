"""Pooled features of whole images (or the boxes of volumes), streamed to Parquet by key.

A batch always has the same shape (the last one is filled with black), so the features of an image do not
depend on which others were asked for. Rows come modality by modality, each sorted by key. The file appears
under its name when it is complete; memory holds a few batches and one row group.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shards import catalog
from shards.errors import UserError
from shards.schema import Split, is_volumes
from shards.tar import ShardReader
from trainer import files
from trainer.batches import Modality
from trainer.config import IntensityConfig, VolumeConfig
from trainer.export import EncoderInfo, info_text
from trainer.models.encoders import check_encoder, feature_dim
from trainer.rows import load_rows
from trainer.whole import whole_sample, whole_shape

Progress = Callable[[int], None]  # images done
Whole = int | tuple[int, int, int]  # side of an image in px, or box of a volume
_GROUP_BYTES = 32 << 20  # of one row group
_AHEAD = 2  # batches that are decoded while one is computed


@dataclass(frozen=True)
class Part:
    """The images, or volumes, of one modality: catalogue rows sorted by key, with their split, and how they
    are read. volume: how volumes become boxes."""

    modality: str
    rows: Modality
    intensity: IntensityConfig
    volume: VolumeConfig | None = None

    @property
    def splits(self) -> dict[str, int]:
        values = self.rows.table["split"].to_pylist()
        return {split.value: values.count(split.value) for split in Split}


def open_parts(
    root: str,
    intensity: Mapping[str, IntensityConfig],
    modalities: Sequence[str],
    split: str | None = None,
    chosen: Sequence[str] | None = None,
    volume: VolumeConfig | None = None,
) -> list[Part]:
    """The images to go through. modalities: those of the encoder, of which the dataset need not have all;
    chosen: those that are asked for, which it must have. volume: of an encoder that takes volumes. Raises
    UserError."""
    for name in chosen or ():
        if is_volumes(name) and volume is None:
            raise UserError(f"{name} holds volumes, the encoder takes 2D images: name their slices")
        if not is_volumes(name) and volume is not None:
            raise UserError(f"{name} holds 2D images, the encoder takes volumes: name {name}_volumes")
    parts, kind = [], "images" if volume is None else "volumes"
    for name in chosen or modalities:
        rows = load_rows(root, name, split, ("split",))
        if len(rows):
            parts.append(Part(name, rows, intensity.get(name, IntensityConfig()), volume))
        elif chosen:
            raise UserError(f"the dataset has no {name} {kind}{_of_split(split)} ({_there(root, volume)})")
    if not parts:
        raise UserError(
            f"the dataset has no {kind} of {', '.join(modalities)}{_of_split(split)}, which the encoder was "
            f"trained on ({_there(root, volume)}): name others with --modality"
        )
    return parts


def _of_split(split: str | None) -> str:
    return "" if split is None else f" in split {split}"


def _there(root: str, volume: VolumeConfig | None) -> str:
    counts = catalog.counts(root, volumes=volume is not None)
    names = [name for name, splits in counts.items() if sum(splits.values())]
    return f"modalities there: {', '.join(names) or 'none'}"


def image_batches(
    root: str, part: Part, size: Whole, batch_size: int, threads: int
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """(first row, number of rows, f32 [batch_size, 1, *whole_shape(size)]) in order; rows after the last: 0.

    Images are decoded by `threads` threads, a few batches ahead. Raises UserError.
    """
    reader = ShardReader(root)

    def load(index: int) -> NDArray[np.float32]:
        row = part.rows.row(index)
        return whole_sample(reader, part.modality, row, size, part.intensity, part.volume)

    cv2.setNumThreads(1)
    part.rows.row(0)  # its columns are made contiguous once, not by every thread
    waiting: deque[tuple[int, list[Future[NDArray[np.float32]]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(part.rows), batch_size):
            numbers = range(first, min(first + batch_size, len(part.rows)))
            waiting.append((first, [pool.submit(load, number) for number in numbers]))
            if len(waiting) > _AHEAD:
                yield _collected(*waiting.popleft(), batch_size, size)
        while waiting:
            yield _collected(*waiting.popleft(), batch_size, size)
    reader.close()


def _collected(
    first: int, loading: list[Future[NDArray[np.float32]]], batch_size: int, size: Whole
) -> tuple[int, int, NDArray[np.float32]]:
    batch = np.zeros((batch_size, 1, *whole_shape(size)), np.float32)
    for i, image in enumerate(loading):
        batch[i, 0] = image.result()
    return first, len(loading), batch


@contextmanager
def on_device(network: nn.Module, name: str) -> Iterator[Callable[[NDArray[np.float32], int], Tensor]]:
    """A function (f32 [n, 1, S, S] or [n, 1, Z, Y, X], channels) -> features [n, F] float32 on the CPU,
    evaluation mode, fixed kernels. name: cpu, cuda or auto. Raises UserError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU can be used here: leave --device away, or use --device cpu")
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # fixed kernels on a GPU; read at its first use
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    before = torch.are_deterministic_algorithms_enabled()
    network.eval().to(device)

    def run(images: NDArray[np.float32], channels: int) -> Tensor:
        with torch.inference_mode():
            given = torch.from_numpy(images).to(device)
            return network(given.expand(-1, channels, *given.shape[2:])).float().cpu()

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield run
    finally:
        torch.use_deterministic_algorithms(before)
        network.cpu()


def embed(
    root: str,
    network: nn.Module,
    info: EncoderInfo,
    out: Path,
    parts: Sequence[Part],
    *,
    dtype: Literal["float32", "float16"] = "float32",
    size: int | None = None,
    batch_size: int = 64,
    threads: int = 2,
    device: str = "auto",
    progress: Progress | None = None,
) -> int:
    """Write `out`: key, modality, split, features (fixed-size list). Returns the number of features F.

    size: px of the images; None: the encoder's. Raises UserError; then there is no file `out`.
    """
    whole = size_for(info, size)
    fix = "give another --size"
    check_encoder(network, info.backbone, info.in_channels, [whole], modes=(False,), fix=fix)
    width = feature_dim(network)
    schema = feature_schema(width, dtype, info, whole)
    done = 0
    group = max(1, _GROUP_BYTES // (width * np.dtype(dtype).itemsize))
    with on_device(network, device) as run, table_writer(out, schema, group) as write:
        for part in parts:
            for first, count, images in image_batches(root, part, whole, batch_size, threads):
                features = _as_finite(run(images, info.in_channels)[:count].numpy(), dtype)
                write(rows_of(part, first, count, schema, {"features": _fixed_lists(features)}))
                done += count
                if progress is not None:
                    progress(done)
    return width


def size_for(info: EncoderInfo, asked: int | None) -> Whole:
    """The size asked for, else the encoder's. Raises UserError where that cannot be changed."""
    if asked is not None and info.volume is not None:
        raise UserError(
            f"--size {asked} is for images, the encoder takes boxes of {info.size_text}: leave it away"
        )
    return asked or info.size


def feature_schema(width: int, dtype: str, info: EncoderInfo, size: Whole) -> pa.Schema:
    value = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [
            *key_fields(),
            pa.field("features", pa.list_(pa.field("item", value, nullable=False), width), nullable=False),
        ],
        metadata={"medswav_encoder": info_text(info), "medswav_image_size": size_name(size)},
    )


def size_name(size: Whole) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def key_fields() -> list[pa.Field]:
    return [pa.field(name, pa.string(), nullable=False) for name in ("key", "modality", "split")]


def _as_finite(features: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Raises UserError where a value does not fit the type."""
    with np.errstate(over="ignore"):
        cast = features.astype(dtype)
    if np.isfinite(cast).all():
        return cast
    fix = "use --dtype float32" if dtype == "float16" else "the encoder is broken"
    raise UserError(f"a feature is not a finite {dtype}: {fix}")


def _fixed_lists(features: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(features).ravel())
    field = pa.field("item", flat.type, nullable=False)
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(field, features.shape[1]))


def rows_of(part: Part, first: int, count: int, schema: pa.Schema, more: Mapping[str, pa.Array]) -> pa.Table:
    """Rows of the file for `count` images from `first` on."""
    table = part.rows.table.slice(first, count)
    columns = {
        "key": table["key"].combine_chunks(),
        "modality": pa.array([part.modality] * count),
        "split": table["split"].combine_chunks(),
        **more,
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


@contextmanager
def table_writer(out: Path, schema: pa.Schema, group_rows: int) -> Iterator[Callable[[pa.Table], None]]:
    """A function that adds rows to a Parquet file; it gets its name at the end, if no error came.

    Equal rows give equal bytes, whatever the portions they come in.
    """
    temporary = out.with_name(f"{out.name}.tmp-{files.new_attempt()}")
    waiting: list[pa.Table] = []

    def flush(writer: pq.ParquetWriter, everything: bool) -> None:
        rows = pa.concat_tables(waiting).combine_chunks() if waiting else schema.empty_table()
        start = 0
        while rows.num_rows - start >= (1 if everything else group_rows):
            writer.write_table(rows.slice(start, group_rows), row_group_size=group_rows)
            start += group_rows
        waiting[:] = [rows.slice(start)] if start < rows.num_rows else []

    with files.disk_full_is_clear(f"writing {out.name}"):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            columns = ["modality", "split"]  # of few values; the others would only try
            with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=columns) as writer:

                def write(rows: pa.Table) -> None:
                    waiting.append(rows)
                    if sum(part.num_rows for part in waiting) >= group_rows:
                        flush(writer, False)

                yield write
                flush(writer, True)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            files.rename(temporary, out)
            files.sync_folder(out.parent)
        finally:
            temporary.unlink(missing_ok=True)
