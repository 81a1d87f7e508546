"""One arm of a comparison judged: `python -m orchestration.compare_probe SPEC.json` writes its scores.

A process of its own, so that several arms are judged at once, each with one thread, and a kill costs one.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.compare_data import task_labels
from trainer import files
from trainer.config import TrainConfig, load_config


def main(arguments: Sequence[str]) -> int:
    spec = json.loads(Path(arguments[0]).read_text())
    rows = score(spec)
    files.replace_file(Path(spec["scores"]), json.dumps({"inputs": spec["inputs"], "rows": rows}).encode())
    return 0


def score(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """spec: folder, arm, kind, config (a YAML file), encoder (a file, or None), tasks, draws (pairs of
    seed and fraction). Rows as in trainer.downstream.compare."""
    import torch

    from trainer.downstream.compare import judge

    torch.set_num_threads(1)
    config = load_config(spec["config"])
    labels = {name: task_labels(Path(spec["folder"]), name) for name in spec["tasks"]}
    rows = []
    for modality in config.data.modalities:
        keys, patients, splits, features = features_of(spec, config, modality)
        for task, by_key in labels.items():
            has = np.array([key in by_key for key in keys], bool)
            if not has.any():
                continue
            classes = sorted(set(by_key.values()))
            y = np.array([classes.index(by_key[key]) for key in keys if key in by_key], np.int64)
            of_task = features[has], y, patients[has], splits[has]
            for seed, fraction in spec["draws"]:
                figures = judge(*of_task, fraction, seed)
                drawn = {"arm": spec["arm"], "seed": seed, "modality": modality, "task": task}
                rows.append({**drawn, "fraction": fraction, **figures})
    return rows


def features_of(spec: Mapping[str, Any], config: TrainConfig, modality: str) -> tuple[Any, Any, Any, Any]:
    """Keys, patients, splits and features [n, F] of the images of a modality, sorted by key."""
    from trainer.batches import eval_images
    from trainer.downstream.features import extract, pixels
    from trainer.downstream.probe import random_encoder
    from trainer.export import encoder_info, load_encoder

    size = config.views.whole_image_size
    keys, images, table = eval_images(config.data.dataset, modality, size, config.data.intensity)
    if spec["kind"] == "pixels":
        features = pixels(images)
    elif spec["kind"] == "random":
        features = extract(random_encoder(encoder_info(config, 0, ""), config.seed), images)
    else:
        features = extract(load_encoder(Path(spec["encoder"]), config.model.backbone)[0], images)
    patients = np.array(table["patient"].to_pylist(), np.str_)
    return keys, patients, np.array(table["split"].to_pylist(), np.str_), features


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
