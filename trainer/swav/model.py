"""Backbone, projection head and the prototypes of each group as one module: DDP sees all parameters."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.config import ModelConfig, SwavConfig
from trainer.models.encoders import build_encoder, feature_dim
from trainer.models.heads import projection_head
from trainer.swav.prototypes import Prototypes


class MultiModalSwav(nn.Module):
    """method.md eq. 3: shared `backbone` and `projection_head`, `prototypes` of each modality's own.

    groups: names of what has prototypes of its own, the modalities or, with swav.groups=shared, one for all.
    """

    def __init__(self, model: ModelConfig, swav: SwavConfig, modalities: Sequence[str]) -> None:
        super().__init__()
        self.groups = swav.names(modalities)
        backbone = build_encoder(model.backbone, model.in_channels, model.backbone_options)
        head = projection_head(feature_dim(backbone), model.hidden_dim, model.feature_dim)
        if model.sync_batchnorm:
            backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
            head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        self.backbone: nn.Module = backbone
        self.projection_head: nn.Module = head
        self.prototypes = Prototypes(self.groups, model.feature_dim, swav.prototypes)

    def forward(
        self, crops: Sequence[Tensor], sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Unit features [V, n, F] and, for each group, scores [V, b_m, K]; both float32, with gradient.

        crops: per crop group [count, n, C, *spatial], float in [0, 1] or uint8; images are modality-major.
        sizes: images of each group in n; default: equal parts. V = sum of the counts, in the groups'
        order.
        """
        self.prototypes.normalize()
        n = crops[0].shape[1]
        pooled = self._pool(crops)  # [V * n, D]
        z = normalize(self.projection_head(pooled).float(), dim=1).unflatten(0, (-1, n))
        parts = group_slices(n, len(self.groups), sizes)
        return z, self.prototypes.scores([z[:, part] for part in parts])

    def _pool(self, crops: Sequence[Tensor]) -> Tensor:
        """One backbone forward per crop shape: batch-norm statistics are those of all crops of a
        resolution.
        """
        shapes = list(dict.fromkeys(c.shape[2:] for c in crops))
        pooled: list[Tensor] = [torch.empty(0)] * len(crops)
        for shape in shapes:
            members = [i for i, c in enumerate(crops) if c.shape[2:] == shape]
            flat = [_to_float(crops[i].flatten(0, 1)) for i in members]
            out = self.backbone(flat[0] if len(flat) == 1 else torch.cat(flat))
            for i, part in zip(members, out.split([len(f) for f in flat]), strict=True):
                pooled[i] = part
        return torch.cat(pooled)


def group_slices(n: int, n_groups: int, sizes: Sequence[int] | None = None) -> list[slice]:
    """Where each group's images lie in a modality-major batch of n."""
    if sizes is None:
        if n % n_groups:
            raise ValueError(f"{n} images are no multiple of {n_groups} groups")
        sizes = [n // n_groups] * n_groups
    if len(sizes) != n_groups or sum(sizes) != n:
        raise ValueError(f"sizes {list(sizes)} do not share {n} images among {n_groups} groups")
    edges = [sum(sizes[:i]) for i in range(n_groups + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _to_float(crops: Tensor) -> Tensor:
    """uint8 travels over the bus and is scaled to [0, 1] on the device."""
    return crops.float().div_(255) if crops.dtype == torch.uint8 else crops
