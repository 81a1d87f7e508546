"""Brain metastases on MR, slice by slice (method.md section 7): five neighbouring slices and the mask that
the encoder-decoder of metastases_mask finds in them are six channels, a 1x1 convolution makes three of them,
and the pretrained encoder with a linear head tells whether the middle slice shows a lesion.

    medswav finetune metastases-mask --data DATASET --labels masks --output MASKS
    medswav finetune metastases --data DATASET --labels slices --set segmenter=MASKS --encoder RUN --output O

AUC, average precision and accuracy at .6 on the authors' data: no pretraining .913/.799/.910, theirs
.932/.856/.943.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from shards.errors import UserError
from shards.ids import digest
from shards.store import file_sha256
from trainer.config import IntensityConfig, check_backbone
from trainer.config_data import Strict
from trainer.downstream.finetune import FinetuneConfig
from trainer.downstream.metastases_mask import noise_volumes, patient_strata
from trainer.downstream.metastases_nets import (
    MIXED,
    Segmenter,
    SliceClassifier,
    load_segmenter,
    mask_file,
    patient_digests,
    seen_patients,
)
from trainer.downstream.slices import (
    SPLITS,
    Places,
    SliceAugment,
    SliceVolume,
    augmented,
    drawn,
    places_of,
    read_slices,
    slice_labels,
    stack,
    table_splits,
)
from trainer.downstream.tables import read_table
from trainer.downstream.task import Dataset, Random, Sample, Task
from trainer.evaluate import roc
from trainer.export import load_encoder
from trainer.formats import with_channels
from trainer.models.encoders import build_encoder, check_encoder, require_images

_BATCH = 16  # slices at a time, of the frozen mask network

Masks = Mapping[str, NDArray[np.uint8]]  # of a volume by its key: predicted, [Z, S, S], 255 is certain


def _text(value: object) -> object:
    """YAML reads 1 as a number."""
    return str(value) if type(value) is int else value


class Config(Strict):
    """modality, size, slices: as of the mask network, whose folder is `segmenter`. attention: its mask is the
    sixth channel; false: five channels, no mask network. backbone: of an encoder with random weights; that
    of an encoder file must be the same. positive: the label of a slice with a lesion. without_lesion: the
    share of the training slices without one that an epoch takes, drawn anew; less than 1 raises the
    probabilities. threshold: from which probability on a slice is called positive. mask_device: where the
    masks are predicted."""

    modality: str = "mr"
    size: int = Field(default=96, ge=16)
    slices: int = Field(default=5, ge=1)
    attention: bool = True
    segmenter: str = ""
    backbone: str = "resnet-tiny"
    positive: Annotated[str, BeforeValidator(_text)] = "1"
    without_lesion: float = Field(default=1.0, gt=0, le=1)
    threshold: float = Field(default=roc.THRESHOLD, gt=0, lt=1)
    mask_device: Literal["auto", "cpu", "cuda"] = "auto"
    intensity: IntensityConfig = IntensityConfig()
    augment: SliceAugment | None = SliceAugment(turn_degrees=0, scale=(1, 1))
    finetune: FinetuneConfig = FinetuneConfig(epochs=12, patience=0, batch_size=16, learning_rate=1e-3)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        check_backbone(self.backbone, {})
        if self.slices % 2 == 0:
            raise ValueError(f"slices={self.slices} has no middle: use an odd number")
        if self.segmenter and not self.attention:
            raise ValueError("attention=false has no use for a segmenter: leave one of them away")
        return self

    @property
    def channels(self) -> int:
        return self.slices + self.attention


PRESETS = {
    "small": Config(),
    "full": Config(
        size=224,
        augment=SliceAugment(),
        backbone="resnet50w2",
        finetune=FinetuneConfig(epochs=300, patience=50, batch_size=32, learning_rate=1e-4),
    ),
}


def prepare(
    config: Config,
    dataset: str,
    labels: Sequence[str],
    encoder: Path | None,
) -> Task:
    """The task of the labelled slices of a dataset's volumes. labels: one table with `label`. encoder: an
    encoder file; None: random weights. The masks are predicted here, once. Raises UserError."""
    if len(labels) != 1:
        raise UserError(f"metastases takes one table of slice labels, not {len(labels)}: give one --labels")
    segmenter = _segmenter(config)
    table = read_table(dataset, labels[0], ["label"])
    known = slice_labels(table, config.positive)
    make, name = encoder_maker(config, encoder)
    volumes = read_slices(
        dataset,
        config.modality,
        config.size,
        labels=known,
        splits=table_splits(table),
        intensity=config.intensity,
    )
    if segmenter is not None:
        _check_unseen(Path(config.segmenter), volumes)
    masks = None if segmenter is None else predicted(segmenter, volumes, _device(config))
    used = digests(config)["segmenter"] if config.attention else "no mask"
    return slices_task(config, volumes, masks, make, digest("metastases", name, used))


def digests(config: Config) -> dict[str, str]:
    """What else than the settings decides the numbers: the weights of the mask network. Raises UserError."""
    return {"segmenter": digest(file_sha256(mask_file(Path(config.segmenter))))} if config.segmenter else {}


def example(config: Config, encoder: Path | None) -> Task:
    """The task on noise of the configured shape: to count what a step takes."""
    volumes = noise_volumes(config.size, config.slices)
    masks = {v.key: v.pixels for v in volumes} if config.attention else None
    return slices_task(config, volumes, masks, encoder_maker(config, encoder)[0], "noise")


def slices_task(
    config: Config,
    volumes: Sequence[SliceVolume],
    masks: Masks | None,
    encoder: Callable[[], nn.Module],
    identity: str,
) -> Task:
    """The task of volumes that are in memory; encoder() takes 3 channels."""
    parts = {}
    for split in SPLITS:
        own = [v for v in volumes if v.split == split]
        places = places_of(own, config.without_lesion if split == "train" else 1.0, masks=False)
        patients = np.array([v.patient for v, _ in places], np.str_)
        parts[split] = Dataset(patients, partial(_sample, config, places, masks))
    return Task(
        name="metastases" if config.attention else "metastases, no mask",
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        network=lambda: SliceClassifier(encoder(), config.slices, config.attention),
        loss=_loss,
        predict=_probabilities,
        metrics=partial(_metrics, config.threshold),
        selection="auc",
        strata=patient_strata(volumes),
        identity=identity,
    )


def encoder_maker(config: Config, encoder: Path | None) -> tuple[Callable[[], nn.Module], str]:
    """How the encoder with 3 channels is made, and a name of its weights. Raises UserError."""
    require_images(config.backbone)
    if encoder is None:
        trial = build_encoder(config.backbone, MIXED)
        check_encoder(trial, config.backbone, MIXED, [config.size], fix="set another size")
        return partial(build_encoder, config.backbone, MIXED), "none"
    network, info = load_encoder(encoder, config.backbone if ":" in config.backbone else None)
    if info.backbone != config.backbone:
        raise UserError(
            f"{encoder.name} holds a {info.backbone}, not backbone={config.backbone}: give another encoder, "
            f"or --set backbone={info.backbone}"
        )
    network, info = with_channels(network, info, MIXED)
    check_encoder(network, info.backbone, MIXED, [config.size], fix="set another size")
    return partial(copy.deepcopy, network), file_sha256(encoder)


@torch.inference_mode()
def predicted(segmenter: Segmenter, volumes: Sequence[SliceVolume], device: torch.device | str) -> Masks:
    """The masks of all slices."""
    segmenter = copy.deepcopy(segmenter).to(device).eval()
    slices, found = segmenter.shape.slices, {}
    for volume in volumes:
        parts = []
        for first in range(0, len(volume.pixels), _BATCH):
            near = range(first, min(first + _BATCH, len(volume.pixels)))
            inputs = torch.from_numpy(np.stack([stack(volume.pixels, z, slices) for z in near]))
            parts.append(segmenter(inputs.to(device)).float().sigmoid().mul(255).round().byte().cpu().numpy())
        found[volume.key] = np.concatenate(parts)
    return found


def _device(config: Config) -> str:
    there = torch.cuda.is_available()
    if config.mask_device == "cuda" and not there:
        raise UserError("no GPU can be used here: set mask_device=cpu")
    return "cuda" if there and config.mask_device != "cpu" else "cpu"


def _segmenter(config: Config) -> Segmenter | None:
    if not config.attention:
        return None
    if not config.segmenter:
        raise UserError(
            "the attention channel needs a mask network: train metastases-mask, then --set segmenter=ITS "
            "OUTPUT (or --set attention=false)"
        )
    network = load_segmenter(Path(config.segmenter))
    was, now = (network.shape.size, network.shape.slices), (config.size, config.slices)
    if was != now:
        raise UserError(
            f"the mask network was trained on {was[1]} slices of {was[0]} px, not {now[1]} of {now[0]}: set "
            f"size={was[0]} and slices={was[1]}, or train another"
        )
    return network


def _check_unseen(segmenter: Path, volumes: Sequence[SliceVolume]) -> None:
    """The masks of val and test must be as those of new patients. Raises UserError."""
    trained, chosen = seen_patients(segmenter)
    for split, seen in (("val", trained), ("test", trained | chosen)):
        count = len(seen.intersection(patient_digests(v.patient for v in volumes if v.split == split)))
        if count:
            raise UserError(
                f"the mask network was trained or chosen on {count} patients of the {split} split: give "
                "both tables the same splits, and train it again"
            )


def _sample(
    config: Config,
    places: Places,
    masks: Masks | None,
    index: int,
    random: Random,
) -> Sample:
    volume, z = drawn(places, index, random)
    images = stack(volume.pixels, z, config.slices)
    if masks is not None:
        mask = masks[volume.key][z].astype(np.float32) * np.float32(1 / 255)
        images = np.concatenate([images, mask[None]])
    if random is not None and config.augment is not None:
        images = augmented(images, config.augment, random, grey=config.slices)
    return Sample(images, int(volume.labels[z]))


def _loss(network: nn.Module, inputs: Tensor, targets: Sequence[Any]) -> Tensor:
    truth = torch.tensor(targets, dtype=torch.float32, device=inputs.device)
    return binary_cross_entropy_with_logits(network(inputs).float(), truth)


def _probabilities(network: nn.Module, inputs: Tensor) -> list[float]:
    found: list[float] = network(inputs).double().sigmoid().cpu().tolist()
    return found


def _metrics(threshold: float, predictions: Sequence[float], targets: Sequence[int]) -> dict[str, float]:
    return {name: metric(targets, predictions) for name, metric in roc.metrics_at(threshold).items()}
