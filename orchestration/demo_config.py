"""How the demo preset is fitted to the images that there are; nothing is adapted without a sentence on it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.errors import UserError
from trainer.config import TrainConfig, load_config, text_setting

RANKS = 2
ENOUGH_IMAGES = 8  # of a modality, in the training split: fewer are left out when another modality has more
PASSES = 100  # over a small dataset; more would only repeat the same few pictures
LEAST_STEPS = 100


@dataclass(frozen=True)
class Fitted:
    """The configuration, and what was adapted, in sentences for people."""

    config: TrainConfig
    notes: tuple[str, ...]


def fit(
    dataset: str,
    counts: Mapping[str, Mapping[str, int]],
    overrides: Sequence[str] = (),
    seed: int = 0,
    ranks: int = RANKS,
) -> Fitted:
    """The demo preset for a dataset with `counts` {modality: {train, val, test: images}}.

    overrides: `a.b=value`; what the user sets is not adapted. Raises UserError for a dataset without images.
    """
    preset = load_config("demo", [o for o in overrides if not o.startswith("data.")])
    given = {item.partition("=")[0].strip() for item in overrides}
    notes: list[str] = []
    totals = {m: sum(by.values()) for m, by in counts.items() if sum(by.values())}
    if not totals:
        raise UserError(
            "no image was ingested, so there is nothing to train on: "
            "`ingest status` on the dataset lists the reasons of the refusals"
        )
    images, split = _split(counts, _enough(totals, notes), notes)
    share = _share(preset, images, ranks, notes)
    steps = preset.max_steps if "max_steps" in given else _steps(preset, images, share, notes)
    settings = {
        "data.modalities": f"[{', '.join(images)}]",
        "data.split": split,
        "data.batch_size": share * len(images),
        "seed": seed,
        "max_steps": steps,
        "swav.freeze_prototypes_steps": min(preset.swav.freeze_prototypes_steps, steps // 5),
        "checkpoint.every_steps": max(1, min(preset.checkpoint.every_steps, steps // 10)),
    }
    own = [f"{name}={value}" for name, value in settings.items() if name not in given]
    own += [] if "data.dataset" in given else [text_setting("data.dataset", dataset)]
    if overrides:
        notes.append(f"Settings of your own: {', '.join(overrides)}.")
    return Fitted(load_config("demo", [*own, *overrides]), tuple(notes))


def _enough(totals: Mapping[str, int], notes: list[str]) -> list[str]:
    """The modalities to train on, in the preset's order: those with hardly any image only if all are so."""
    order = load_config("demo").data.modalities
    names = sorted(totals, key=lambda m: (order.index(m) if m in order else len(order), m))
    kept = [m for m in names if totals[m] >= ENOUGH_IMAGES] or names
    left = [f"{m} ({totals[m]})" for m in names if m not in kept]
    if left:
        notes.append(
            f"Left out of the training, with fewer than {ENOUGH_IMAGES} images: {', '.join(left)}. "
            "They are in the dataset."
        )
    return kept


def _split(
    counts: Mapping[str, Mapping[str, int]], names: Sequence[str], notes: list[str]
) -> tuple[dict[str, int], str]:
    """Images to train on by modality: the training split, or all where patients are too few to split."""
    train = {m: counts[m].get("train", 0) for m in names}
    totals = {m: sum(counts[m].values()) for m in names}
    if all(train[m] >= max(ENOUGH_IMAGES, totals[m] / 2) for m in names):
        return train, "train"
    notes.append(
        "The training split alone would be too thin (whole patients go to a split, and they are few), so "
        "the encoder is trained on all splits; it sees no label."
    )
    return totals, "all"


def _share(preset: TrainConfig, images: Mapping[str, int], ranks: int, notes: list[str]) -> int:
    """Images of each modality in a batch: an equal part of the preset's batch, no more than there are."""
    most = max(ENOUGH_IMAGES, min(images.values()))
    share = max(1, min(preset.data.batch_size // len(images), most) // ranks) * ranks
    if share * len(images) != preset.data.batch_size:
        of_each = f" ({share} of each of {len(images)} modalities)" if len(images) > 1 else ""
        notes.append(
            f"Batch of {share * len(images)}{of_each} instead of the preset's {preset.data.batch_size}, to "
            "fit the images there are."
        )
    return share


def _steps(preset: TrainConfig, images: Mapping[str, int], share: int, notes: list[str]) -> int:
    """The preset's steps, or PASSES over a dataset that is too small for them."""
    enough = max(LEAST_STEPS, PASSES * math.ceil(max(images.values()) / share))
    if enough >= preset.max_steps:
        return preset.max_steps
    notes.append(
        f"{enough:,} steps instead of the preset's {preset.max_steps:,}: {sum(images.values()):,} images are "
        "too few for more. Take the figures as a check that everything works, not as a result."
    )
    return enough
