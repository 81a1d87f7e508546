"""Backbone, projection head and the prototypes of each group as one module: DDP sees all parameters."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from trainer.config import ModelConfig, SwavConfig
from trainer.models.embedder import Embedder, Output
from trainer.swav.prototypes import Prototypes


class MultiModalSwav(Embedder):
    """method.md eq. 3: shared `backbone` and `projection_head`, `prototypes` of each modality's own.

    groups: names of what has prototypes of its own, the modalities or, with swav.groups=shared, one for all.
    """

    def __init__(self, model: ModelConfig, swav: SwavConfig, modalities: Sequence[str]) -> None:
        super().__init__(model, swav.names(modalities))
        self.prototypes = Prototypes(self.groups, model.feature_dim, swav.prototypes)

    def forward(self, crops: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Output:
        """See Embedder.forward. sizes: images of each group in n; default: equal parts."""
        self.prototypes.normalize()
        return self.look(crops, sizes)

    def look(self, crops: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Output:
        """The forward with the prototypes as they are: a graph that waits for its backward needs them so."""
        z, logits = self.embed(crops)
        parts = group_slices(z.shape[1], len(self.groups), sizes)
        return Output(z, self.prototypes.scores([z[:, part] for part in parts]), logits)


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
