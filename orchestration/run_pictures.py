"""The pictures of a run's page, made again from its dataset: the views of the first step, and the images
nearest to the most used prototypes. What cannot be made is told, and why."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from orchestration.run_data import RunData
from orchestration.run_page import Pictures
from shards.errors import UserError
from trainer.run_state import without_paths

SHEET_IMAGES = 256  # of each modality that go through the network for the contact sheets
PROTOTYPES, NEAREST = 6, 8  # shown of each modality, and images of each


def make(run_dir: Path, data: RunData, dataset: str | None, sheet_images: int) -> Pictures:
    """dataset: where it lies now; None: where the run found it. sheet_images: 0 for no contact sheets."""
    if data.config.views.volume is not None:
        return Pictures(why=("No pictures: they are made of images, and this run reads volumes.",))
    root = dataset or data.config.data.dataset

    def told(error: Exception) -> str:
        return without_paths(error, run_dir, data.config.model_dump(mode="json"), root)

    try:
        check_dataset(root, data)
        from orchestration.report_gather import views

        found = views(root, run_dir, data.config)
    except (UserError, OSError) as error:
        return Pictures(why=(f"No pictures: {told(error)}.",))
    why: list[str] = []
    sheets: tuple[str, ...] = ()
    try:
        sheets = contact_sheets(run_dir, data, root, sheet_images, why) if sheet_images else ()
    except (UserError, OSError) as error:
        why.append(f"No contact sheets: {told(error)}.")
    return Pictures(found, sheets, tuple(why))


def check_dataset(root: str, data: RunData) -> None:
    """Raises UserError unless it is the dataset that the run began with: others would give other pictures."""
    from trainer.batches import dataset_fingerprint

    if not root:
        raise UserError("where the dataset lies is not known: name it with --dataset")
    wanted = data.state.dataset_fingerprint if data.state is not None else ""
    if dataset_fingerprint(root) != wanted and wanted:
        raise UserError(
            "the dataset is not as it was when the run began (files were added, or it is another)"
        )


def contact_sheets(run_dir: Path, data: RunData, root: str, images: int, why: list[str]) -> tuple[str, ...]:
    """Sections of the images nearest to the prototypes that have most, from `images` of each modality, evenly
    spaced in the order of their (random) keys. Raises UserError."""
    if not data.checkpoints:
        why.append("No contact sheets: there is no checkpoint yet.")
        return ()
    if data.config.method != "swav":
        return ()
    from orchestration.assign_page import sheet
    from trainer.assign import assign
    from trainer.embed import open_parts
    from trainer.rows import Modality
    from trainer.source import open_source

    source = open_source(run_dir, None)
    split = None if data.config.data.split == "all" else data.config.data.split
    parts = []
    for part in open_parts(root, source.info.intensity, source.info.modalities, split):
        total = len(part.rows)
        rows = np.unique(np.arange(min(images, total)) * total // min(images, total))
        if total > images:
            why.append(
                f"The contact sheets of {part.modality} are of {images:,} of its {total:,} images; "
                "medswav assign --sheet makes them of all."
            )
        parts.append(replace(part, rows=Modality(part.modality, part.rows.table.take(rows))))
    with tempfile.TemporaryDirectory(prefix="medswav-report-") as scratch:
        out = Path(scratch) / "assigned.parquet"
        found = assign(root, source, out, parts, nearest=NEAREST)
    return tuple(
        sheet(
            root, part, assigned, PROTOTYPES, f"sheet-{part.modality}", "Nearest images of the prototypes: "
        )
        for part, assigned in zip(parts, found, strict=True)
    )
