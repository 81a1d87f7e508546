"""The demo's measurements after training, in FOLDER/results.json: probes, and the use of the prototypes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards import catalog
from shards.errors import UserError
from shards.ids import digest
from shards.store import file_sha256
from trainer import files

FORMAT_VERSION = 1
SEEDS = (0, 1, 2)
LABELS = "labels"  # the name that `ingest label` and `medswav probe` take by default
_CHUNK = 256


def fingerprint(dataset: Path, runs: Sequence[Path]) -> str:
    """Of all that the results depend on: encoder, labels, protocol. Equal: nothing to do again."""
    labels = dataset / "labels" / f"{LABELS}.parquet"
    return digest(
        str(FORMAT_VERSION),
        str(SEEDS),
        *(file_sha256(run / "encoder.safetensors") for run in runs),
        file_sha256(labels) if labels.is_file() else "no labels",
    )


def read(folder: Path, wanted: str | None = None) -> dict[str, Any] | None:
    """results.json, or None where there is none, it is damaged, or it is of other inputs than `wanted`."""
    try:
        results = json.loads((folder / "results.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    same = wanted is None or results.get("fingerprint") == wanted
    return results if same and results.get("format") == FORMAT_VERSION else None


def evaluate(
    dataset: Path,
    runs: Sequence[Path],
    why_no_labels: str,
    progress: Callable[[int, int, str], None] | None = None,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Probe the runs' encoders where the dataset has labels; count the use of the first one's prototypes.

    backbone: of the runs, as configured.
    """
    return {
        "format": FORMAT_VERSION,
        "fingerprint": fingerprint(dataset, runs),
        **probe(dataset, runs, why_no_labels, progress, backbone),
        "prototypes": prototype_use(dataset, runs[0]),
    }


def write(folder: Path, results: dict[str, Any]) -> None:
    files.replace_file(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def probe(
    dataset: Path,
    runs: Sequence[Path],
    why_no_labels: str,
    progress: Callable[[int, int, str], None] | None = None,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Scores, summary, and why a modality (or everything) was skipped."""
    from trainer.downstream.probe import evaluate as run_probes
    from trainer.export import load_encoder

    nothing: dict[str, Any] = {"scores": [], "summary": [], "skipped": {}}
    if LABELS not in catalog.label_names(dataset):
        return nothing | {"probe_skipped": why_no_labels}
    encoders = [load_encoder(run / "encoder.safetensors", backbone) for run in runs]
    table = catalog.labels(dataset, LABELS)
    try:
        found = run_probes(str(dataset), table, encoders, seeds=SEEDS, random_seeds=SEEDS, progress=progress)
    except UserError as error:
        return nothing | {"probe_skipped": f"The probe was skipped: {error}."}
    return {
        "scores": found.rows,
        "summary": found.summary,
        "skipped": found.skipped,
        "probe_skipped": None,
    }


def prototype_use(dataset: Path, run_dir: Path) -> dict[str, list[int]]:
    """Images of the training split by their nearest prototype: {modality: K counts}.

    The whole image, as the probes see it, through the newest checkpoint's network in evaluation mode.
    """
    import torch
    from torch.nn.functional import normalize

    from trainer.batches import eval_images
    from trainer.build import restored
    from trainer.checkpoint import newest
    from trainer.config import SHARED
    from trainer.swav.model import MultiModalSwav

    found = newest(run_dir)
    if found is None:
        return {}
    config, model = restored(found.state, found.part("model"))
    if not isinstance(model, MultiModalSwav):
        return {}
    model.eval()
    split = None if config.data.split == "all" else config.data.split
    size, channels = config.views.whole_image_size, config.model.in_channels
    use = {}
    for modality in config.data.modalities:
        _, images, _ = eval_images(str(dataset), modality, size, config.data.intensity, split)
        prototypes = model.prototypes[SHARED if config.swav.groups == "shared" else modality]
        counts = np.zeros(config.swav.prototypes, np.int64)
        with torch.inference_mode():
            for start in range(0, len(images), _CHUNK):
                part = torch.from_numpy(images[start : start + _CHUNK]).expand(-1, channels, -1, -1)
                z = normalize(model.projection_head(model.backbone(part)).float(), dim=1)
                nearest = prototypes(z).argmax(dim=1).numpy()
                counts += np.bincount(nearest, minlength=len(counts))
        use[modality] = counts.tolist()
    return use
