"""Is the pretrained encoder better than no pretraining? Frozen features, two probes, two baselines.

For each modality with labels: the pretrained encoders, the same network at random initialisation (3 seeds)
and the bare pixels at 32 x 32, each with a linear probe and with kNN, on the same patient-disjoint splits.

The protocols:

* `repeated` (default): each seed splits all labelled patients anew, half of them for the test. Pretraining
  never saw a label, so this is a fair comparison of frozen features, and it is the only one with enough
  test patients when a dataset is small. But the encoder may have seen test IMAGES without their labels:
  `seen_in_pretraining` says what share of the test samples.
* `catalogue`: test on the catalogue's test split, whose patients pretraining (split=train) never saw; the
  seeds draw 80 % of the training patients. To be preferred, and reported, where the test split is large.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from shards.errors import UserError
from trainer.batches import eval_images
from trainer.config import IntensityConfig
from trainer.downstream import splits
from trainer.downstream.features import Features, extract, pixels
from trainer.downstream.knn import knn_auc
from trainer.downstream.linear import linear_probe_auc
from trainer.downstream.splits import ProbeSplit, Protocol
from trainer.export import EncoderInfo
from trainer.models.encoders import build_encoder, require_images

Encoder = tuple[nn.Module, EncoderInfo]
Progress = Callable[[int, int, str], None]
PRETRAINED, RANDOM, PIXELS = "pretrained", "random", "pixels"


@dataclass(frozen=True)
class Evaluation:
    """rows: one dict a figure: modality, protocol, encoder, encoder_seed, seed, fraction, probe, auc,
    n_train, n_val, n_test. summary: one dict a modality and probe (see `summarise`). skipped: modality to
    reason.
    """

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    skipped: dict[str, str]


@dataclass(frozen=True)
class LabelledImages:
    """One modality: images f32 [n, 1, S, S]; labels int [n] into `classes`; patient and split by sample."""

    modality: str
    images: Features
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    patients: NDArray[np.str_]
    splits: NDArray[np.str_]


def evaluate(
    root: str,
    labels: pa.Table,
    pretrained: Sequence[Encoder],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    random_seeds: Sequence[int] = (0, 1, 2),
    fractions: Sequence[float] = (1.0,),
    protocol: Protocol = "repeated",
    size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Probe every modality of the dataset that has labels (`labels`: columns key, label).

    `size`: px of the square evaluation images (default: the encoder's `size`). Raises UserError where
    there is no encoder, the encoders differ in kind, or no modality can be evaluated.
    """
    info = _same_kind(pretrained)
    encoders: dict[str, list[nn.Module]] = {
        PRETRAINED: [backbone for backbone, _ in pretrained],
        RANDOM: [random_encoder(info, seed) for seed in random_seeds],
    }
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    for done, modality in enumerate(info.modalities):
        if progress is not None:
            progress(done, len(info.modalities), modality)
        assert isinstance(info.size, int)  # _same_kind
        data = load_labelled(root, modality, labels, size or info.size, info.intensity)
        reason = why_not(data, protocol)
        if reason is not None:
            skipped[modality] = reason
            continue
        parts = [(s, f, _split(data, protocol, s, f)) for s in seeds for f in fractions]
        facts[modality] = _facts(data, parts, info)
        rows += [
            dict(modality=modality, protocol=protocol, **row) for row in _probe(data, encoders, parts, device)
        ]
    if not rows:
        listed = "; ".join(f"{m}: {r}" for m, r in skipped.items())
        raise UserError(f"no modality can be evaluated ({listed}): give labels for more patients")
    if progress is not None:
        progress(len(info.modalities), len(info.modalities), "done")
    return Evaluation(rows, summarise(rows, facts), skipped)


def random_encoder(info: EncoderInfo, seed: int) -> nn.Module:
    """The same network as it was before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(info.backbone, info.in_channels, info.backbone_options).eval()


def load_labelled(
    root: str, modality: str, labels: pa.Table, size: int, intensity: Mapping[str, IntensityConfig]
) -> LabelledImages:
    """The samples of one modality that have a label, in the catalogue's order; classes sorted by name."""
    keys, images, table = eval_images(root, modality, size, intensity.get(modality, IntensityConfig()))
    by_key = {
        key: str(label)
        for key, label in zip(labels["key"].to_pylist(), labels["label"].to_pylist(), strict=True)
        if label is not None
    }
    has = np.array([key in by_key for key in keys], bool)
    names = [by_key[key] for key in keys if key in by_key]
    classes = tuple(sorted(set(names)))
    return LabelledImages(
        modality=modality,
        images=images[has],
        labels=np.array([classes.index(name) for name in names], np.int64),
        classes=classes,
        patients=np.array(table["patient"].to_pylist(), np.str_)[has],
        splits=np.array(table["split"].to_pylist(), np.str_)[has],
    )


def why_not(data: LabelledImages, protocol: Protocol) -> str | None:
    """Why a modality cannot be evaluated, or None."""
    if len(data.classes) < 2:
        return "no labels" if not data.classes else "all labels are the same"
    if protocol == "repeated":
        of_class = list(splits.patient_classes(data.patients, data.labels).values())
        fewest = min(of_class.count(c) for c in range(len(data.classes)))
        if fewest < splits.MIN_PATIENTS:
            return f"a class has {fewest} patients, {splits.MIN_PATIENTS} are needed"
        return None
    for part in ("train", "val", "test"):
        if len(np.unique(data.labels[data.splits == part])) < len(data.classes):
            return f"the catalogue's {part} split does not hold every class"
    return None


def summarise(
    rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One dict a modality and probe, at the largest label fraction.

    `<encoder>`: {mean, min, max, n} over encoder seeds and split seeds; `margin`: difference of the means of
    pretrained and random; `outside_spread`: min(pretrained) > max(random); `every_seed`: on each split, every
    pretrained encoder beats every random one.
    """
    largest = max(row["fraction"] for row in rows)
    summary = []
    for modality, probe in dict.fromkeys((row["modality"], row["probe"]) for row in rows):
        aucs: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            if (row["modality"], row["probe"], row["fraction"]) == (modality, probe, largest):
                aucs.setdefault(row["encoder"], {}).setdefault(row["seed"], []).append(row["auc"])
        spread = {encoder: _spread([a for one in by.values() for a in one]) for encoder, by in aucs.items()}
        ours, chance = aucs[PRETRAINED], aucs[RANDOM]
        summary.append(
            {
                "modality": modality,
                "probe": probe,
                "fraction": largest,
                **facts.get(modality, {}),
                **spread,
                "margin": spread[PRETRAINED]["mean"] - spread[RANDOM]["mean"],
                "outside_spread": spread[PRETRAINED]["min"] > spread[RANDOM]["max"],
                "every_seed": all(min(ours[s]) > max(chance[s]) for s in ours),
            }
        )
    return summary


def _probe(
    data: LabelledImages,
    encoders: Mapping[str, Sequence[nn.Module]],
    parts: Sequence[tuple[int, float, ProbeSplit]],
    device: torch.device | str,
) -> list[dict[str, Any]]:
    features = [
        (name, seed, extract(backbone, data.images, device=device))
        for name, backbones in encoders.items()
        for seed, backbone in enumerate(backbones)
    ]
    features.append((PIXELS, 0, pixels(data.images)))
    rows = []
    for name, encoder_seed, x in features:
        for seed, fraction, part in parts:
            counts = {"n_train": len(part.train), "n_val": len(part.val), "n_test": len(part.test)}
            for probe, auc in _both_probes(x, data, part).items():
                drawn = {"encoder": name, "encoder_seed": encoder_seed, "seed": seed, "fraction": fraction}
                rows.append({**drawn, "probe": probe, "auc": auc, **counts})
    return rows


def _both_probes(x: Features, data: LabelledImages, part: ProbeSplit) -> dict[str, float]:
    y, fit, test = data.labels, np.concatenate([part.train, part.val]), part.test
    return {
        "linear": linear_probe_auc(x[fit], y[fit], x[test], y[test], data.patients[fit]),
        "knn": knn_auc(x[fit], y[fit], x[test], y[test]),
    }


def _split(data: LabelledImages, protocol: Protocol, seed: int, fraction: float) -> ProbeSplit:
    if protocol == "repeated":
        return splits.repeated(data.patients, data.labels, seed, fraction=fraction)
    return splits.catalogue(data.patients, data.labels, data.splits, seed, fraction=fraction)


def _facts(
    data: LabelledImages, parts: Sequence[tuple[int, float, ProbeSplit]], info: EncoderInfo
) -> dict[str, Any]:
    tested = np.concatenate([part.test for _, _, part in parts])
    seen = np.ones(len(tested), bool) if info.split == "all" else data.splits[tested] == info.split
    return {
        "classes": list(data.classes),
        "samples": len(data.labels),
        "patients": len(np.unique(data.patients)),
        "seen_in_pretraining": float(seen.mean()),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values), "n": len(values)}


def _same_kind(pretrained: Sequence[Encoder]) -> EncoderInfo:
    if not pretrained:
        raise UserError("no encoder was given: train one, then name its encoder.safetensors")
    kinds = {(i.backbone, i.in_channels, i.size, i.modalities) for _, i in pretrained}
    if len(kinds) > 1:
        raise UserError(
            "the encoders differ in backbone, channels, size or modalities: evaluate each kind alone"
        )
    info = pretrained[0][1]
    require_images(info.backbone, info.volume is not None)
    return info
