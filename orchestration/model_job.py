"""What `medswav export`, `embed` and `assign` do and print."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.progress import Progress
from shards.errors import UserError
from shards.objects import is_url, location
from shards.schema import Split

if TYPE_CHECKING:
    from trainer.embed import Part
    from trainer.formats import Format
    from trainer.source import Source


@dataclass(frozen=True)
class Images:
    """Which images of a dataset, and how they go through the network."""

    dataset: Path
    modalities: Sequence[str] | None
    split: str | None
    size: int | None
    batch_size: int
    threads: int
    device: str

    def check(self, out: Path) -> None:
        """Raises UserError for what can be seen before torch is loaded."""
        splits = [split.value for split in Split]
        if self.split not in (None, *splits):
            raise UserError(f"--split {self.split} is none of {', '.join(splits)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {self.device} is none of auto, cpu, cuda")
        _check_out(out, ".parquet")


@dataclass(frozen=True)
class Sheet:
    """The contact sheet: where, how many images of how many prototypes of each modality."""

    out: Path
    nearest: int
    prototypes: int


def export(
    path: Path,
    out: Path,
    kind: "Format",
    channels: int | None,
    size: int | None,
    backbone: str | None,
    as_json: bool,
) -> str:
    """Write the file and its card; returns what to print. Raises UserError."""
    if channels == 2:
        raise UserError("--channels 2: an encoder takes 1 or 3 channels")
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder or its encoder.safetensors")
    from trainer import files
    from trainer.card import model_card
    from trainer.formats import SUFFIX, check_format, write
    from trainer.source import open_source

    _check_out(out, SUFFIX[kind])
    card = out.with_name(f"{out.name}.md")
    _check_out(card, ".md")
    source = open_source(path, backbone)
    check_format(source.info, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = write(source.network, source.info, kind, out, channels, size)
    with files.disk_full_is_clear("writing the model card"):
        files.replace_file(card, model_card(source, written).encode())
    facts: dict[str, Any] = {
        "out": str(out),
        "card": str(card),
        "format": kind,
        "backbone": source.info.backbone,
        "in_channels": written.in_channels,
        "step": source.info.step,
        "finished": source.finished,
        "bytes": out.stat().st_size,
    }
    if kind in ("torch-export", "onnx"):
        facts |= {"free": list(written.free), "relative_error": written.error}
    if as_json:
        return json.dumps(facts, indent=1)
    state = "" if source.finished else " (the run is not finished)"
    lines = [f"wrote {out} and {card.name}: {source.info.backbone} of step {source.info.step}{state}"]
    if kind in ("torch-export", "onnx"):
        free = ", ".join(written.free) or "nothing"
        compared = "not compared, onnxruntime is not installed"
        if written.error is not None:
            compared = f"differs from the network by {written.error:.1e} of the largest feature"
        lines.append(f"free in the graph: {free}; {compared}")
    return "\n".join(lines)


def embed(images: Images, encoder: Path, out: Path, dtype: Any, backbone: str | None, as_json: bool) -> str:
    """Write the features; returns what to print. Raises UserError."""
    images.check(out)
    from trainer import embed as embedding
    from trainer.source import open_source

    source = open_source(encoder, backbone)
    parts = _parts(images, source)
    began = time.monotonic()
    with Progress("embed", sum(len(part.rows) for part in parts), "images") as progress:
        width = embedding.embed(
            location(images.dataset),
            source.network,
            source.info,
            out,
            parts,
            dtype=dtype,
            size=images.size,
            batch_size=images.batch_size,
            threads=images.threads,
            device=images.device,
            progress=progress.update,
        )
    facts = _facts(images, source, parts, out, began) | {"features": width, "dtype": dtype}
    if as_json:
        return json.dumps(facts, indent=1)
    return f"wrote {out}: {facts['images']} images, {width} features each as {dtype}\n" + _by_modality(facts)


def assign(
    images: Images, run: Path, out: Path, sheet: Sheet | None, backbone: str | None, as_json: bool
) -> str:
    """Write the assignments and the contact sheet; returns what to print. Raises UserError."""
    images.check(out)
    if sheet is not None:
        _check_sheet(sheet.out, images.dataset)
    from orchestration.assign_page import write_page
    from orchestration.page import WARNING
    from trainer import assign as assigning
    from trainer.source import open_source

    source = open_source(run, backbone)
    assigning.open_projector(source)
    parts = _parts(images, source)
    root, began = location(images.dataset), time.monotonic()
    with Progress("assign", sum(len(part.rows) for part in parts), "images") as progress:
        found = assigning.assign(
            root,
            source,
            out,
            parts,
            nearest=sheet.nearest if sheet is not None else 1,
            size=images.size,
            batch_size=images.batch_size,
            threads=images.threads,
            device=images.device,
            progress=progress.update,
        )
    if sheet is not None:
        write_page(sheet.out, root, source.info, parts, found, sheet.prototypes)
    facts = _facts(images, source, parts, out, began)
    facts["used"] = {a.modality: int((a.counts > 0).sum()) for a in found}
    facts["prototypes"] = {a.modality: len(a.counts) for a in found}
    if as_json:
        return json.dumps(facts | ({} if sheet is None else {"sheet": str(sheet.out)}), indent=1)
    lines = [f"wrote {out}: {facts['images']} images", _by_modality(facts)]
    lines += [
        f"{m:8} {n} of {facts['prototypes'][m]} prototypes have images" for m, n in facts["used"].items()
    ]
    if sheet is not None:
        lines.append(f"wrote {sheet.out}; {WARNING}")
    return "\n".join(lines)


def _parts(images: Images, source: "Source") -> "list[Part]":
    from trainer.embed import open_parts

    info = source.info
    return open_parts(
        location(images.dataset),
        info.intensity,
        info.modalities,
        images.split,
        images.modalities,
        info.volume,
    )


def _facts(
    images: Images, source: "Source", parts: "Sequence[Part]", out: Path, began: float
) -> dict[str, Any]:
    count, seconds = sum(len(part.rows) for part in parts), time.monotonic() - began
    return {
        "out": str(out),
        "images": count,
        "modalities": {part.modality: part.splits for part in parts},
        "backbone": source.info.backbone,
        "step": source.info.step,
        "size": images.size or source.info.size,
        "seconds": round(seconds, 3),
        "images_per_second": round(count / seconds, 1) if seconds else None,
    }


def _by_modality(facts: dict[str, Any]) -> str:
    lines = [
        f"{modality:8} {sum(splits.values())} images ({', '.join(f'{s} {n}' for s, n in splits.items())})"
        for modality, splits in facts["modalities"].items()
    ]
    return "\n".join(lines)


def _check_out(out: Path, suffix: str) -> None:
    """A new local file with the suffix that says what it is. Raises UserError."""
    if is_url(out):
        raise UserError(f"{out}: the result is a file of this machine, give a local path")
    if out.suffix != suffix:
        raise UserError(f"{out.name} holds {suffix} data: call it {out.with_suffix(suffix).name}")
    if out.exists():
        raise UserError(f"{out} exists already: choose another name, or remove it")
    place = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{out}: {place} is no folder that can be written to: choose another")


def _check_sheet(sheet: Path, dataset: Path) -> None:
    _check_out(sheet, ".html")
    if not is_url(dataset) and sheet.resolve().is_relative_to(dataset.resolve()):
        raise UserError(f"{sheet} lies inside the dataset: give a path outside of it")
