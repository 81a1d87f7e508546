"""`medswav pretrain --explain`: all that follows from a configuration, a number of ranks and a dataset.

Nothing is written and nothing is trained. Without a dataset the images of each modality are the published
counts of the preset (its `about:`), where it has any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np

from shards import catalog
from shards.errors import UserError
from shards.order import lane_steps
from trainer.augment import crops
from trainer.batches import blocks_of
from trainer.config import CropConfig, TrainConfig, check_world, few_samples_warning
from trainer.labels import LabelSet, label_sets
from trainer.pool import cache_warning, mixed_images
from trainer.preset_files import preset_about
from trainer.rows import load_rows, none_there
from trainer.sampling import draws_taken, sampling_weights

SHAPES_UP_TO = 1_000_000  # images of a modality: more rows than these are not read for a median size
_SQUARE = (4096, 4096)
PERPLEXITY = (
    "for 64 images of each modality, K = 3000 and epsilon .03 the target perplexity is 303 without a queue, "
    "106 with 960 entries, 101 with 3840 (docs/training.md, G)"
)


@dataclass(frozen=True)
class Known:
    """What is known of the images: their number by modality, where that is from, a typical (H, W)."""

    images: Mapping[str, int]
    source: str
    shapes: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, float] = field(default_factory=dict)  # mean encoded bytes of an image


def look_at_data(config: TrainConfig, preset: str) -> Known:
    """The dataset of the configuration, or what the preset says. Raises UserError."""
    data = config.data
    if not data.dataset:
        about = {m: n for m, n in preset_about(preset).images.items() if m in data.modalities}
        return Known(about, "published counts of the preset" if about else "not known", {})
    images, shapes, sizes = {}, {}, {}
    counts = catalog.counts(data.dataset, volumes=config.views.volume is not None)
    split = None if data.split == "all" else data.split
    for name in data.modalities:
        by_split = counts.get(name, {})
        images[name] = sum(by_split.values()) if split is None else by_split.get(split, 0)
        if not images[name]:
            raise UserError(none_there(data.dataset, name, data.split))
        if images[name] <= SHAPES_UP_TO:
            table = load_rows(data.dataset, name, split).table
            sizes[name] = fmean(table["size"].to_pylist())
            rows, columns = (int(median(table[c].to_pylist())) for c in ("rows", "columns"))
            shapes[name] = (rows, columns)
    return Known(images, f"the dataset, split {data.split}", shapes, sizes)


def explain(config: TrainConfig, world: int, preset: str) -> dict[str, Any]:
    """Plain values by section, in the order in which they are shown. Raises UserError where a run would not
    start with these settings, this number of ranks or this dataset."""
    check_world(config, world)
    known = look_at_data(config, preset)
    from trainer.explain_model import measure_model  # torch, which takes seconds: after what can be refused

    labels = label_sets(config) if config.data.dataset else ()
    model = measure_model(config, labels)
    flop = model.flop_per_sample(config.optim.accumulation)
    samples = config.max_steps * config.data.batch_size
    queue = _queue(config, world)
    return {
        "preset": preset,
        "method": config.method,
        "batch": _batch(config, world, known),
        "horizon": {
            "steps": config.max_steps,
            "samples": samples,
            "epoch_samples": config.epoch_samples,
            "epochs": samples / config.epoch_samples if config.epoch_samples else None,
        },
        "learning_rate": _learning_rate(config),
        "data": {"dataset": config.data.dataset or None, "images_from": known.source},
        "modalities": _modalities(config, known),
        "order": _order(config, known),
        "labels": _labels(config, labels),
        "prototypes": _prototypes(config, known),
        "queue": queue,
        "crops": _crops(config, known),
        "compute": {
            "parameters": model.parameters,
            "gflop_per_sample": flop / 1e9,
            "gflop_per_step": flop * config.data.batch_size / 1e9,
            "gflop_per_step_and_rank": flop * config.data.batch_size / world / 1e9,
        },
        "samples": "images" if config.views.volume is None else "volumes",
        "bytes": {
            "batch": batch_bytes(config),
            "batch_of_a_rank": batch_bytes(config) // world,
            "gradients": 4 * sum(model.parameters.values()),
            "activations_of_a_rank": round(
                model.activation_bytes * config.data.batch_size / world / config.optim.accumulation
            ),
            "checkpoint": model.checkpoint_bytes + queue.get("bytes_of_every_rank", 0),
            "checkpoints_kept": _most_checkpoints(config)
            * (model.checkpoint_bytes + queue.get("bytes_of_every_rank", 0)),
        },
        "open_points": open_points(config),
        "warnings": _warnings(config, known),
    }


def batch_bytes(config: TrainConfig) -> int:
    """Bytes of the uint8 crops of a global batch, as they travel to the ranks: one channel."""
    return config.data.batch_size * config.views.crop_values


def _weights(config: TrainConfig, known: Known) -> Sequence[int] | None:
    """Long-run shares of the modalities; None where they depend on counts that are not known."""
    if config.data.sampling != "equal" and set(known.images) < set(config.data.modalities):
        return None
    return sampling_weights(config.data, known.images)


def _batch(config: TrainConfig, world: int, known: Known) -> dict[str, Any]:
    data, weights = config.data, _weights(config, known)
    found: dict[str, Any] = {
        "global": data.batch_size,
        "ranks": world,
        "per_rank": data.batch_size // world,
        "micro_batches": config.optim.accumulation,
        "sampling": data.sampling,
    }
    if weights is not None:
        each = [data.batch_size * w / sum(weights) for w in weights]
        found["per_modality"] = dict(zip(data.modalities, each, strict=True))
        found["per_modality_and_rank"] = {m: n / world for m, n in found["per_modality"].items()}
    return found


def _learning_rate(config: TrainConfig) -> dict[str, Any]:
    from trainer.optim import learning_rate, learning_rate_factor

    steps = {"first": 0, "middle": config.max_steps // 2, "last": config.max_steps - 1}
    return {
        "optimizer": config.optim.optimizer,
        "scaling": config.optim.lr_scaling,
        "factor": learning_rate_factor(config),
        "warmup_steps": config.optim.warmup_steps,
        "at": {name: {"step": step, "value": learning_rate(step, config)} for name, step in steps.items()},
    }


def _modalities(config: TrainConfig, known: Known) -> dict[str, Any]:
    """Images drawn in the whole run and passes over the modality."""
    weights = _weights(config, known)
    total = config.max_steps * config.data.batch_size
    drawn = (None,) * len(config.data.modalities) if weights is None else draws_taken(total, weights)
    return {
        m: {
            "images": known.images.get(m),
            "drawn": n,
            "passes": None if n is None or m not in known.images else n / known.images[m],
        }
        for m, n in zip(config.data.modalities, drawn, strict=True)
    }


def _order(config: TrainConfig, known: Known) -> dict[str, Any]:
    """pool: images of a modality that are shuffled with each other at a time, of all virtual ranks together;
    steps: in which a virtual rank draws from one group of blocks; pool_bytes: of those, encoded."""
    data, blocks = config.data, blocks_of(config.data)
    found: dict[str, Any] = {"layout": data.order.layout, "virtual_ranks": data.lanes, "modalities": {}}
    if blocks is None:
        return found
    found |= {"block_samples": blocks.samples, "group_blocks": blocks.per_group}
    for m, n in known.images.items():
        lanes = data.lanes if data.sampling == "equal" else 1
        steps = lane_steps(n, data.per_modality, lanes, blocks) if lanes > 1 else None
        pool = mixed_images(data, blocks, n)
        found["modalities"][m] = {
            "whole": blocks.shuffle_all(n),
            "pool": pool,
            "pool_bytes": pool * known.sizes[m] if m in known.sizes else None,
            "steps": None if blocks.shuffle_all(n) else steps,
        }
    return found


def _labels(config: TrainConfig, known: Sequence[LabelSet]) -> dict[str, Any]:
    """The label tables of the hybrid loss, and their classes where there is a dataset."""
    classes = {one.name: list(one.classes) for one in known}
    return {
        one.name: {
            "kind": one.kind,
            "alpha": config.supervision.alpha,
            "beta": one.beta,
            "modalities": list(one.modalities or config.data.modalities),
            "classes": classes.get(one.name),
        }
        for one in config.supervision.labels
    }


def _rarest(config: TrainConfig, known: Known) -> float | None:
    """Images of the group that has the fewest in a batch, in the long run."""
    if config.swav.groups == "shared":
        return float(config.data.batch_size)
    weights = _weights(config, known)
    return None if weights is None else config.data.batch_size * min(weights) / sum(weights)


def _prototypes(config: TrainConfig, known: Known) -> dict[str, Any]:
    """Of each group, and what shares them (method.md 3-G): with unequal groups, in the smallest."""
    if config.method != "swav":
        return {}
    swav, groups = config.swav, len(config.groups)
    rarest, queue = _rarest(config, known), swav.queue_length // groups
    batch = config.data.batch_size / groups if rarest is None else rarest
    return {
        "groups": list(config.groups),
        "of_each_group": swav.prototypes,
        "temperature": swav.temperature,
        "epsilon": swav.epsilon,
        "samples_of_a_group": batch,
        "queue_of_a_group": queue,
        "ratio": (batch + queue) / swav.prototypes,
        "ratio_without_queue": batch / swav.prototypes,
        "frozen": _when(config, swav.freeze_prototypes_steps),
    }


def _queue(config: TrainConfig, world: int) -> dict[str, Any]:
    swav, groups = config.swav, len(config.groups)
    if config.method != "swav" or swav.queue_length == 0:
        return {}
    length = swav.queue_length // groups
    batches = swav.queue_length // config.data.batch_size
    full = swav.queue_start_step + batches
    return {
        "length": swav.queue_length,
        "of_each_group_and_crop": length,
        "assigned_crops": list(swav.assign),
        "of_each_rank": -(-length // world),
        "batches": batches,
        "bytes_of_every_rank": groups * len(swav.assign) * length * config.model.feature_dim * 4,
        "starts": _when(config, swav.queue_start_step),
        "used_from": _when(config, full),
        "oldest_entry_steps": batches,
    }


def _when(config: TrainConfig, step: int) -> dict[str, Any]:
    samples = step * config.data.batch_size
    return {
        "step": step,
        "samples": samples,
        "epoch": samples / config.epoch_samples if config.epoch_samples else None,
        "of_the_run": step / config.max_steps,
    }


def _crops(config: TrainConfig, known: Known) -> dict[str, Any]:
    """Share of the whole image that a crop covers, smallest and largest, for the typical shape."""
    found = {}
    volume = config.views.volume
    for name in config.data.modalities:
        shape = known.shapes.get(name, _SQUARE) if volume is None else volume.box[1:]
        size_range = config.views.size_range.get(name, config.views.default_size_range)
        found[name] = {
            "image": list(shape) if name in known.shapes or volume is not None else "square",
            "slices": None if volume is None else volume.box[0],
            "longer_side": list(size_range) if config.views.geometry == "paper" and volume is None else None,
            "planes": volume.size_range if config.views.geometry == "paper" and volume is not None else None,
            "crops": [
                {"count": c.count, "size": c.size, "share": _share(config, c, shape, size_range)}
                for c in config.views.crops
            ],
        }
    return found


def _share(
    config: TrainConfig, crop: CropConfig, shape: tuple[int, int], size_range: tuple[float, float]
) -> list[float]:
    shares = []
    for end in (0.0, 1.0):
        u = np.zeros(crops.DRAWS_PER_CROP)
        u[crops.SCALE] = end
        place = crops.place(shape, crop, config.views, size_range, u)
        covered = min(place.height, place.rows) * min(place.width, place.columns)
        shares.append(covered / (place.rows * place.columns))
    return sorted(shares)


def _warnings(config: TrainConfig, known: Known) -> list[str]:
    found = []
    if warning := few_samples_warning(config, _rarest(config, known)):
        found.append(f"{warning}; {PERPLEXITY}")
    if warning := cache_warning(config.data, known.images, known.sizes):
        found.append(warning)
    swav = config.swav
    if config.method == "swav" and swav.freeze_prototypes_steps >= config.max_steps:
        found.append("the prototypes stay frozen for the whole run: lower swav.freeze_prototypes_steps")
    started = swav.queue_start_step + swav.queue_length // config.data.batch_size
    if config.method == "swav" and swav.queue_length and started >= config.max_steps:
        found.append("the queue is never used: it is full only after the last step")
    wide = config.model.backbone in ("resnet50w2", "resnet50w4")
    if wide and config.model.hidden_dim != 8192:
        found.append(
            f"model.hidden_dim={config.model.hidden_dim}: the projection head of {config.model.backbone} has "
            "8192 in SwAV"
        )
    return found


_POINTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "A": (
        "crops: `paper` rescales the longer side and cuts as printed, `recommended` draws their share",
        (
            "views.geometry",
            "views.default_size_range",
            "views.size_range",
            "views.volume",
            "views.crops",
        ),
    ),
    "B": (
        "order rescale, energy, gamma, linear, crop; probabilities are not printed",
        (
            "views.energy_probability",
            "views.gamma_probability",
            "views.gamma",
            "views.linear_probability",
            "views.linear_gain",
            "views.linear_offset",
            "views.border",
        ),
    ),
    "C": (
        "a queue that is no multiple of the global batch is an error, never shortened",
        ("swav.queue_length", "data.batch_size"),
    ),
    "D": (
        "the learning rate is not scaled with the batch unless asked for",
        ("optim.lr_scaling", "optim.reference_global_batch"),
    ),
    "E": (
        "equal subsets of each modality in every batch, unless another sampling is asked for",
        ("data.sampling", "data.sampling_temperature"),
    ),
    "F": (
        "the horizon is in samples or steps, an epoch is a number of samples",
        (
            "max_samples",
            "max_steps",
            "epoch_samples",
            "swav.queue_start_epoch",
            "swav.queue_start_step",
            "swav.freeze_prototypes_epochs",
            "swav.freeze_prototypes_steps",
        ),
    ),
    "G": (
        "with several modalities the queue is needed: (B_m + queue) / K of .3 or more",
        ("swav.queue_length", "swav.prototypes", "swav.epsilon"),
    ),
    "H": (
        "six bands by Gaussians in cascade, energy is their standard deviation, the low band keeps its mean",
        ("views.sigmas", "views.band_statistics"),
    ),
    "I": ("the detector of the chest X-ray task is FCOS with FPN: no setting of pretraining", ()),
    "J": ("for MR a ResNet-50w2 with hidden_dim 8192", ("model.backbone", "model.hidden_dim")),
}


def open_points(config: TrainConfig) -> dict[str, Any]:
    """What the paper leaves open (method.md section 3): our reading, and the settings that hold it."""
    tree = config.model_dump(mode="json")
    return {
        point: {"reading": reading, "settings": {key: _at(tree, key) for key in keys}}
        for point, (reading, keys) in _POINTS.items()
    }


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _most_checkpoints(config: TrainConfig) -> int:
    """At the end of a run; one more while the last is written."""
    every = config.checkpoint.keep_every_steps
    return config.checkpoint.keep + (config.max_steps // every if every else 0)
