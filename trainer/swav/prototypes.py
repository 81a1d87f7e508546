"""Prototypes of each group: unit vectors, no bias, frozen at first (method.md, traps 6)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class Prototypes(nn.ModuleDict):
    """A Linear [K, F] without bias per group of images; keys are the groups' names, in the batch's order."""

    def __init__(self, groups: Sequence[str], feature_dim: int, count: int) -> None:
        super().__init__({g: nn.Linear(feature_dim, count, bias=False) for g in groups})
        self.normalize()
        self.register_load_state_dict_post_hook(_normalize_after_load)

    @torch.no_grad()
    def normalize(self) -> None:
        """Unit rows, in place and outside the graph: the projection carries no gradient."""
        for layer in self.values():
            weight: Any = layer.weight
            weight.copy_(normalize(weight, dim=1))

    def scores(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of each group [V, b_m, F] (unit, float32) to scores [V, b_m, K], float32 whatever
        autocast says.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            return [layer(z.float()) for layer, z in zip(self.values(), features, strict=True)]


def _normalize_after_load(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, Prototypes)
    module.normalize()


def freeze_prototypes(prototypes: Prototypes, step: int, frozen_steps: int) -> None:
    """Drops their gradient during the first `frozen_steps` steps; a None gradient is skipped by every
    optimizer.
    """
    if step < frozen_steps:
        for parameter in prototypes.parameters():
            parameter.grad = None
