"""ReportData of a demo folder: every number and picture comes from the files that its steps wrote."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray

from orchestration.report_data import (
    PATHS,
    Curve,
    ModalityCount,
    PrototypeUse,
    Refusal,
    ReportData,
    Samples,
    Score,
    StepTime,
    Views,
)
from shards import catalog
from shards.codec import MAXIMUM_REDUCE, get_codec
from shards.commit import list_commits
from shards.dataset import read_info
from shards.objects import open_store
from shards.retries import input_count
from shards.tar import ShardReader
from trainer import alarms, journal
from trainer.augment.bands import load_statistics
from trainer.augment.intensity import to_unit
from trainer.batches import BatchMaker
from trainer.config import IntensityConfig, SupervisionConfig, TrainConfig

PICTURES = 12  # of each modality
PICTURE_SIDE = 352  # px
_LOCATION = ("key", "modality", "shard", "offset", "size", "codec", "rows", "columns")
_INTENSITY = ("window_center", "window_width", "window_function", "p005", "p995", "minimum", "maximum")


def gather(dataset: Path, run_dir: Path, results: Mapping[str, Any], about: Mapping[str, Any]) -> ReportData:
    """The report of a dataset, a finished run and results.json.

    about: what those do not know: generated, date, notes, steps, commands, label_note, versions, machine.
    """
    config = run_config(run_dir)
    return ReportData(
        generated=bool(about["generated"]),
        date=str(about["date"]),
        counts=counts(dataset, config),
        inputs=input_count(list_commits(open_store(dataset))),
        refusals=refusals(dataset),
        samples=tuple(_samples(dataset, config)),
        views=views(dataset, run_dir, config),
        curve=curve(run_dir, config),
        alarms=alarm_texts(run_dir),
        prototypes=tuple(PrototypeUse.of(m, c) for m, c in results.get("prototypes", {}).items()),
        scores=scores(results),
        probe_skipped=skipped_text(results),
        label_note=str(about.get("label_note", "")),
        seed_note=seed_note(results),
        notes=tuple(about.get("notes", ())),
        steps=tuple(StepTime(**step) for step in about.get("steps", ())),
        commands=tuple(about.get("commands", ())),
        versions=dict(about.get("versions", {})),
        machine=dict(about.get("machine", {})),
        dataset=_facts(dataset),
        config=yaml.safe_dump(_without_paths(config), sort_keys=False, default_flow_style=None),
    )


def run_config(run_dir: Path) -> TrainConfig:
    """The configuration that the newest checkpoint of a run was made with."""
    from trainer.checkpoint import newest

    found = newest(run_dir)
    if found is None:
        raise ValueError(f"the run {run_dir.name} has no checkpoint")
    return TrainConfig.model_validate(found.state["config"])


def ordered(modalities: Iterable[str], config: TrainConfig) -> list[str]:
    """The modalities of the training in its order, then the others by name."""
    first = [m for m in config.data.modalities if m in set(modalities)]
    return first + sorted(set(modalities) - set(first))


def counts(dataset: Path, config: TrainConfig) -> tuple[ModalityCount, ...]:
    table = catalog.load(dataset, columns=["modality", "patient"])
    patients: dict[str, set[str]] = {}
    for modality, patient in zip(table["modality"].to_pylist(), table["patient"].to_pylist(), strict=True):
        patients.setdefault(modality, set()).add(patient)
    found = catalog.counts(dataset)
    return tuple(
        ModalityCount(m, found[m]["train"], found[m]["val"], found[m]["test"], len(patients[m]))
        for m in ordered(patients, config)
    )


def refusals(dataset: Path) -> tuple[Refusal, ...]:
    reasons = Counter(catalog.quarantine(dataset)["reason"].to_pylist())
    return tuple(Refusal(reason, count) for reason, count in reasons.most_common())


def _samples(dataset: Path, config: TrainConfig) -> list[Samples]:
    """PICTURES images of each modality, evenly spaced in the order of the (random) keys."""
    found = []
    totals = {m: sum(by.values()) for m, by in catalog.counts(dataset).items() if sum(by.values())}
    for modality in ordered(totals, config):
        total = totals[modality]
        table = catalog.load(dataset, modality, [*_LOCATION, *_INTENSITY])
        chosen = [i * total // min(PICTURES, total) for i in range(min(PICTURES, total))]
        rows = table.take(chosen).to_pylist()
        found.append(Samples(modality, tuple(load_picture(dataset, row, config) for row in rows)))
    return found


def load_picture(dataset: str | Path, row: Mapping[str, Any], config: TrainConfig) -> NDArray[np.uint8]:
    """One sample as uint8 [H, W], in the intensities of the training, decoded no larger than is shown."""
    data = ShardReader(dataset).read(row["modality"], row["shard"], row["offset"], row["size"])
    longer, reduce = max(row["rows"], row["columns"]), 0
    while reduce < MAXIMUM_REDUCE and longer >> (reduce + 1) >= PICTURE_SIDE:
        reduce += 1
    pixels = get_codec(row["codec"]).decode(data, reduce)
    intensity = config.data.intensity.get(row["modality"], IntensityConfig())
    unit = to_unit(pixels, row, intensity)
    return np.rint(255 * unit).astype(np.uint8)


def views(dataset: str | Path, run_dir: Path, config: TrainConfig) -> tuple[Views, ...]:
    """The first image of each modality in the first batch, and its crops as the network got them. Where each
    rank has as many images of each modality, no more of the batch is made than the first virtual rank's."""
    data = config.data.model_copy(update={"dataset": str(dataset), "node_cache": None})
    optim = config.optim.model_copy(update={"accumulation": 1})
    changed = {"data": data, "optim": optim, "supervision": SupervisionConfig()}
    path = config.views.band_statistics or run_dir / "bands.json"
    bands = load_statistics(path) if config.views.energy_probability > 0 else None
    world = data.lanes if data.sampling == "equal" else 1
    batch = BatchMaker(config.model_copy(update=changed), 0, world, bands)(0)
    sizes = batch.sizes or (len(batch.keys) // len(batch.modalities),) * len(batch.modalities)
    found, place = [], 0
    for modality, size in zip(batch.modalities, sizes, strict=True):
        if size:
            table = catalog.load(dataset, modality, [*_LOCATION, *_INTENSITY])
            (row,) = table.filter(pc.field("key") == batch.keys[place]).to_pylist()
            image = load_picture(dataset, row, config)
            found.append(Views(modality, image, tuple(group[:, place] for group in batch.crops)))
        place += size
    return tuple(found)


def curve(run_dir: Path, config: TrainConfig) -> Curve | None:
    """The logged steps of metrics.jsonl: those with a loss for every modality (or the one of all)."""
    names = config.groups
    rows = [
        row for row in journal.read(journal.journal_path(run_dir)) if all(f"m/{m}/loss" in row for m in names)
    ]
    if not rows:
        return None

    def column(name: str) -> tuple[float, ...]:
        values = (row.get(name) for row in rows)
        return tuple(math.nan if value is None else float(value) for value in values)

    return Curve(
        tuple(int(row["step"]) + 1 for row in rows),
        column("loss"),
        {m: column(f"m/{m}/loss") for m in names},
        math.log(config.swav.prototypes),
        config.max_steps,
    )


def alarm_texts(run_dir: Path) -> tuple[str, ...]:
    """What alarms.jsonl holds, in words."""
    rows = journal.read(alarms.alarms_path(run_dir))
    return tuple(alarms.event_of(row).text() for row in rows)


def scores(results: Mapping[str, Any]) -> tuple[Score, ...]:
    names = ("modality", "encoder", "probe", "seed", "auc", "n_train", "n_test")
    return tuple(Score(**{name: row[name] for name in names}) for row in results.get("scores", ()))


def skipped_text(results: Mapping[str, Any]) -> str | None:
    """Why there are no scores, or none of some modalities."""
    if results.get("probe_skipped"):
        return str(results["probe_skipped"])
    skipped = results.get("skipped") or {}
    if not skipped:
        return None
    return "Not probed: " + "; ".join(f"{m} ({reason})" for m, reason in skipped.items()) + "."


def seed_note(results: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = results.get("scores", ())
    if not rows:
        return ""
    splits = len({row["seed"] for row in rows})
    networks = {
        name: len({row["encoder_seed"] for row in rows if row["encoder"] == name})
        for name in ("pretrained", "random")
    }
    return (
        f"The range is over {splits} splits of the patients into training and test, times "
        f"{networks['pretrained']} pretraining{'s' * (networks['pretrained'] > 1)} and {networks['random']} "
        "random initialisations."
    )


def _facts(dataset: Path) -> dict[str, str]:
    info = read_info(open_store(dataset))
    return {
        "Dataset fingerprint": info.fingerprint,
        "Key id": info.key_id,
        "Codec": info.codec,
        "Format version": str(info.format_version),
    }


def _without_paths(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values; where files lie is nobody else's business."""
    tree: dict[str, Any] = json.loads(config.model_dump_json())
    for part, name in PATHS:
        tree[part].pop(name, None)
    return tree
