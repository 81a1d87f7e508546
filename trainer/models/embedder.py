"""Backbone and projection head: what every objective trains, and all that `method: simclr` needs."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.config import ModelConfig
from trainer.models.encoders import build_encoder, feature_dim
from trainer.models.heads import head_input, projection_head
from trainer.models.layout import channels_last


class Output(NamedTuple):
    """Of a forward: unit features [V, n, F] and, for each group with prototypes, scores [V, b, K]; all
    float32, with gradient. V: crops of an image, in the order of views.crops. n: images of this rank.
    logits: of each label set [A, n, C], of the A crops of the largest size."""

    features: Tensor
    scores: list[Tensor]
    logits: dict[str, Tensor]


class Embedder(nn.Module):
    """`backbone` and `projection_head`; `label_heads`, a Linear for each set of labels, and of each what it
    reads (LabelSetConfig.reads; not named: pooled features).

    groups: names of the parts of a batch, for metrics.
    """

    def __init__(self, model: ModelConfig, groups: Sequence[str]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.backbone: nn.Module = build_encoder(model.backbone, model.in_channels, model.backbone_options)
        self.projection_head: nn.Module = projection_head(
            feature_dim(self.backbone), model.hidden_dim, model.feature_dim
        )
        self.label_heads = nn.ModuleDict()
        self.head_reads: dict[str, str] = {}

    def forward(self, crops: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Output:
        """crops: per crop group [count, n, C, *spatial], float in [0, 1] or uint8; images are
        modality-major. sizes: of the groups; for those that have prototypes.
        """
        z, logits = self.embed(crops)
        return Output(z, [], logits)

    def embed(self, crops: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Unit features [V, n, F], the projection head sees all crops at once; and Output.logits."""
        n = crops[0].shape[1]
        pooled = self._pool(crops)  # [V * n, D]
        z = normalize(self.projection_head(pooled).float(), dim=1).unflatten(0, (-1, n))
        if not self.label_heads:
            return z, {}
        large, large_z = _large(pooled.unflatten(0, (-1, n)), crops), _large(z, crops)
        logits = {}
        for name, head in self.label_heads.items():
            logits[name] = head(head_input(large, large_z, self.head_reads.get(name, "pooled"))).float()
        return z, logits

    def _pool(self, crops: Sequence[Tensor]) -> Tensor:
        """One backbone forward per crop shape: batch-norm statistics are those of all crops of a
        resolution.
        """
        shapes = list(dict.fromkeys(c.shape[2:] for c in crops))
        pooled: list[Tensor] = [torch.empty(0)] * len(crops)
        for shape in shapes:
            members = [i for i, c in enumerate(crops) if c.shape[2:] == shape]
            flat = [_to_float(crops[i].flatten(0, 1)) for i in members]
            out = self.backbone(channels_last(flat[0] if len(flat) == 1 else torch.cat(flat)))
            for i, part in zip(members, out.split([len(f) for f in flat]), strict=True):
                pooled[i] = part
        return torch.cat(pooled)


def _large(pooled: Tensor, crops: Sequence[Tensor]) -> Tensor:
    """Of pooled [V, n, D] the views of the crop groups of the largest size: [A, n, D]."""
    areas = [prod(c.shape[3:]) for c in crops]
    views = pooled.split([len(c) for c in crops])
    return torch.cat([part for part, area in zip(views, areas, strict=True) if area == max(areas)])


def _to_float(crops: Tensor) -> Tensor:
    """uint8 travels over the bus and is scaled to [0, 1] on the device."""
    return crops.float().div_(255) if crops.dtype == torch.uint8 else crops
