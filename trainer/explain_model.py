"""What a network costs: parameters, operations, bytes of a checkpoint, counted without any contents."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from trainer.build import build_model
from trainer.config import OWN_BACKBONES, TrainConfig
from trainer.labels import LabelSet

_IMAGES = 2  # of each group: batch norm needs more than one


@dataclass(frozen=True)
class ModelCost:
    """parameters: by part. forward, backward: operations for all crops of an image; a product and its sum
    are two. checkpoint_bytes: weights, buffers and optimizer, without the queue. activation_bytes: what the
    backward keeps of all crops of an image, in float32 and without activation checkpointing."""

    parameters: dict[str, int]
    forward: float
    backward: float
    checkpoint_bytes: int
    activation_bytes: float

    def flop_per_sample(self, micro_batches: int = 1) -> float:
        """The codes need the scores of all micro-batches first: all but one go forward twice."""
        return self.forward * (2 - 1 / micro_batches) + self.backward


def measure_model(config: TrainConfig, labels: Sequence[LabelSet] = ()) -> ModelCost:
    """Our backbones are never allocated nor run; others are, on two images of each group."""
    ours = config.model.backbone in OWN_BACKBONES
    with torch.random.fork_rng(devices=[]), FakeTensorMode() if ours else nullcontext():
        model = build_model(config, labels)
        images = _IMAGES * len(model.groups)
        channels = config.model.in_channels
        crops = [torch.zeros(c, n, channels, *shape) for c, n, *shape in config.views.stack_shapes(images)]
        kept: dict[int, int] = {}
        with FlopCounterMode(display=False) as counter:
            with saved_tensors_hooks(partial(_note, kept), lambda tensor: tensor):
                out = model(crops)
            forward = counter.get_total_flops()
            parts = (out.features, *out.scores, *out.logits.values())
            torch.stack([t.sum() for t in parts]).sum().backward()
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parameters = {name: count for name, count in counted.items() if count}
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    moments = 2 if config.optim.optimizer == "adamw" else 1
    return ModelCost(
        parameters,
        forward / images,
        (counter.get_total_flops() - forward) / images,
        state + 4 * moments * sum(parameters.values()),
        max(sum(kept.values()) - state, 0) / images,
    )


def _note(kept: dict[int, int], tensor: Tensor) -> Tensor:
    """Add the storage of a tensor that the backward needs, each once. Those of the weights are among them."""
    storage = tensor.untyped_storage()
    kept[storage._cdata] = storage.nbytes()
    return tensor
