"""First stage of metastases: the mask of lesions in a slice, from five slices (method.md section 7).

    medswav finetune metastases-mask --data DATASET --labels masks --output MASKS

It is trained before the classifier and frozen then, not with it: its loss is another one, every encoder that
is compared is shown the same masks, and a step of the classifier needs no more memory than without it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from shards.errors import UserError
from trainer.config import IntensityConfig
from trainer.config_data import Strict
from trainer.downstream.finetune import FinetuneConfig
from trainer.downstream.metastases_nets import MaskShape, Segmenter, load_segmenter, patient_digests
from trainer.downstream.slices import (
    SPLITS,
    Places,
    SliceAugment,
    SliceVolume,
    augmented,
    drawn,
    places_of,
    read_slices,
    stack,
    table_splits,
)
from trainer.downstream.tables import read_table
from trainer.downstream.task import Dataset, Random, Sample, Task
from trainer.evaluate import roc
from trainer.evaluate.masks_figure import MaskExample

THRESHOLD = 0.5  # of a pixel of the mask


class Config(Strict):
    """modality: whose volumes. size: px of a slice. slices: the middle one and its neighbours. width, levels,
    reduce: of the encoder-decoder (metastases_nets.MaskShape). positive_weight: of pixels of lesions in the
    cross-entropy; the loss is that and 1 - Dice of the batch. without_lesion: the share of the training
    slices without a lesion that an epoch takes, drawn anew."""

    modality: str = "mr"
    size: int = Field(default=96, ge=16)
    slices: int = Field(default=5, ge=1)
    width: int = Field(default=16, gt=0)
    levels: int = Field(default=3, gt=0)
    reduce: int = Field(default=2, gt=0)
    positive_weight: float = Field(default=10.0, gt=0)
    without_lesion: float = Field(default=0.35, gt=0, le=1)
    intensity: IntensityConfig = IntensityConfig()
    augment: SliceAugment | None = SliceAugment(turn_degrees=0, scale=(1, 1))
    finetune: FinetuneConfig = FinetuneConfig(
        epochs=24, patience=0, batch_size=8, learning_rate=2e-3, weight_decay=1e-4
    )

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.slices % 2 == 0:
            raise ValueError(f"slices={self.slices} has no middle: use an odd number")
        part = self.reduce << (self.levels - 1)
        if self.size % part:
            raise ValueError(
                f"size={self.size} is no multiple of reduce * 2**(levels - 1) = {part}: use "
                f"{max(self.size - self.size % part, part)}"
            )
        return self

    @property
    def shape(self) -> MaskShape:
        return MaskShape(self.slices, self.width, self.levels, self.reduce, self.size)


PRESETS = {
    "small": Config(),
    "full": Config(
        size=224,
        augment=SliceAugment(),
        width=32,
        levels=5,
        reduce=1,
        finetune=FinetuneConfig(
            epochs=100, patience=20, batch_size=32, learning_rate=1e-3, weight_decay=1e-4
        ),
    ),
}


class Found(NamedTuple):
    """A predicted mask: packed bits of its pixels from THRESHOLD on, and the highest probability in it."""

    bits: NDArray[np.uint8]
    top: float


def prepare(config: Config, dataset: str, labels: Sequence[str], encoder: Path | None = None) -> Task:
    """The task of the slices of a dataset that have a mask. labels: one table with a column `mask` (of
    `ingest label --kind masks`; a mask without a pixel: no lesion). Raises UserError."""
    if encoder is not None:
        raise UserError("the mask network takes no pretrained encoder: leave --encoder away")
    if len(labels) != 1:
        raise UserError(f"metastases-mask takes one table of masks, not {len(labels)}: give one --labels")
    table = read_table(dataset, labels[0], ["mask"])
    volumes = read_slices(
        dataset,
        config.modality,
        config.size,
        masks=mask_pictures(table, labels[0]),
        splits=table_splits(table),
        intensity=config.intensity,
    )
    return masks_task(config, volumes)


def example(config: Config, encoder: Path | None = None) -> Task:
    """The task on noise of the configured shape: to count what a step takes."""
    return masks_task(config, noise_volumes(config.size, config.slices))


def mask_pictures(table: pa.Table, name: str) -> dict[str, bytes]:
    """Key to PNG. Raises UserError."""
    pairs = zip(table["key"].to_pylist(), table["mask"].to_pylist(), strict=True)
    found = {str(key): mask for key, mask in pairs if mask is not None}
    if not all(isinstance(mask, bytes) for mask in found.values()):
        raise UserError(f"the masks of {name} are no pictures: join them with ingest label --kind masks")
    return found


def masks_task(config: Config, volumes: Sequence[SliceVolume]) -> Task:
    """The task of volumes that are in memory."""
    parts = {}
    for split in SPLITS:
        own = [v for v in volumes if v.split == split]
        places = places_of(own, config.without_lesion if split == "train" else 1.0, masks=True)
        patients = np.array([v.patient for v, _ in places], np.str_)
        parts[split] = Dataset(patients, partial(_sample, config, places))
    return Task(
        name="metastases-mask",
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        network=partial(Segmenter, config.shape),
        loss=partial(mask_loss, config.positive_weight),
        predict=predict,
        metrics=metrics,
        selection="dice",
        strata=patient_strata(volumes),
        identity=json.dumps(  # what metastases_nets reads
            {"shape": asdict(config.shape)}
            | {s: patient_digests(parts[s].patients.tolist()) for s in ("train", "val")}
        ),
    )


def patient_strata(volumes: Sequence[SliceVolume]) -> dict[str, int]:
    """Of each training patient: 1 with a lesion in any slice, else 0."""
    found: dict[str, int] = {}
    for v in volumes:
        if v.split == "train":
            lesion = bool((v.labels == 1).any()) or (v.masks is not None and bool(v.masks.any()))
            found[v.patient] = max(found.get(v.patient, 0), int(lesion))
    return found


def noise_volumes(size: int, slices: int) -> list[SliceVolume]:
    """One volume of noise a split, every second slice with a lesion."""
    random = np.random.default_rng(0)
    found = []
    for split in SPLITS:
        labels = (np.arange(slices + 1) % 2).astype(np.int8)
        masks = np.zeros((len(labels), size, size), np.uint8)
        masks[labels == 1, size // 4 : size // 2, size // 4 : size // 2] = 1
        pixels = random.integers(0, 256, masks.shape, np.uint8)
        found.append(SliceVolume(split, split, split, pixels, labels, masks, np.ones(len(labels), np.bool_)))
    return found


def mask_loss(positive_weight: float, network: nn.Module, inputs: Tensor, targets: Sequence[Any]) -> Tensor:
    """Binary cross-entropy of the pixels, and 1 - the soft Dice of the whole batch. targets: packed bits."""
    logits = network(inputs).float()
    bits = np.unpackbits(np.stack(targets), axis=1, count=logits[0].numel())
    truth = torch.from_numpy(bits).to(inputs.device).float().view_as(logits)
    weight = torch.full((), positive_weight, device=inputs.device)
    entropy = binary_cross_entropy_with_logits(logits, truth, pos_weight=weight)
    p = logits.sigmoid()
    dice = (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    return entropy + 1 - dice


def predict(network: nn.Module, inputs: Tensor) -> list[Found]:
    p = network(inputs).float().sigmoid().cpu().numpy()
    return [Found(np.packbits(one >= THRESHOLD), float(one.max())) for one in p]


def metrics(predictions: Sequence[Found], targets: Sequence[NDArray[np.uint8]]) -> Mapping[str, float]:
    """dice: over the pixels of all slices together; dice_slices: mean over the slices with a lesion; auc,
    average_precision: of the highest probability in the mask as the score of its slice."""
    truth, bits = np.stack(targets), np.stack([p.bits for p in predictions])
    both, mine, there = (np.bitwise_count(b).sum(1, dtype=np.int64) for b in (bits & truth, bits, truth))
    lesion, scores = there > 0, [p.top for p in predictions]
    if not lesion.any():
        return dict.fromkeys(("dice", "dice_slices", "auc", "average_precision"), float("nan"))
    return {
        "dice": float(2 * both.sum() / (mine.sum() + there.sum())),
        "dice_slices": float((2 * both[lesion] / (mine + there)[lesion]).mean()),
        "auc": roc.auc(lesion, scores),
        "average_precision": roc.average_precision(lesion, scores),
    }


def _sample(config: Config, places: Places, index: int, random: Random) -> Sample:
    volume, z = drawn(places, index, random)
    images = stack(volume.pixels, z, config.slices)
    assert volume.masks is not None
    mask = volume.masks[z]
    if random is not None and config.augment is not None:
        both = np.concatenate([images, mask[None].astype(np.float32)])
        both = augmented(both, config.augment, random, grey=config.slices)
        images, mask = both[:-1], (both[-1] >= 0.5).astype(np.uint8)
    return Sample(np.ascontiguousarray(images), np.packbits(mask))


def examples_of_test(
    config: Config, dataset: str, labels: str, run: Path, most: int = 12
) -> list[MaskExample]:
    """Slices of test patients for a figure: of `most`, two thirds with a lesion, evenly over the volumes."""
    table = read_table(dataset, labels, ["mask"])
    volumes = read_slices(
        dataset,
        config.modality,
        config.size,
        masks=mask_pictures(table, labels),
        splits=table_splits(table),
        intensity=config.intensity,
    )
    places = places_of([v for v in volumes if v.split == "test"], 1.0, masks=True)
    lesion = [i for i, (v, (z,)) in enumerate(places) if v.masks is not None and v.masks[z].any()]
    others = [i for i in range(len(places)) if i not in set(lesion)]
    network, found = load_segmenter(run), []
    for i in _spread(lesion, 2 * most // 3) + _spread(others, most - 2 * most // 3):
        volume, (z,) = places[i]
        images = stack(volume.pixels, z, config.slices)
        with torch.inference_mode():
            mask = network(torch.from_numpy(images)[None]).sigmoid()[0].numpy()
        assert volume.masks is not None
        name = f"{volume.key}, slice {z}"
        found.append(MaskExample(name, images[config.slices // 2], volume.masks[z] > 0, mask))
    return found


def _spread(values: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly."""
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[i] for i in places.tolist()]
