"""The settings of what is learnt: SwAV, SimCLR, and the labels of the hybrid loss. Part of trainer.config."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from trainer.config_data import Strict

SHARED = "all"  # name of the one group of swav.groups=shared, in metrics and prototypes


class SwavConfig(Strict):
    """`groups`: which images share prototypes, codes (one Sinkhorn), softmax and queue. `per-modality` is the
    method (method.md eq. 3); `shared` is the baseline, one SwAV over the whole batch as if M = 1."""

    groups: Literal["per-modality", "shared"] = "per-modality"
    prototypes: int = Field(default=3000, gt=1)  # of each group
    assign: tuple[int, ...] = (0, 1)  # crops that give codes
    temperature: float = Field(default=0.1, gt=0)
    epsilon: float = Field(default=0.03, gt=0)
    sinkhorn_iterations: int = Field(default=3, gt=0)
    queue_length: int = Field(default=3840, ge=0)  # global, per assigned crop; of all groups; 0: none. C, G
    queue_start_step: int = Field(default=0, ge=0)
    queue_start_epoch: float | None = Field(default=None, ge=0)  # instead of the step; needs epoch_samples. F
    freeze_prototypes_steps: int = Field(default=10_000, ge=0)
    freeze_prototypes_epochs: float | None = Field(default=None, ge=0)  # instead of the steps. F

    def names(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """Of the groups, in the order of their images in a batch."""
        return (SHARED,) if self.groups == "shared" else tuple(modalities)


class SimclrConfig(Strict):
    """method=simclr: NT-Xent over the two crops of an image (Chen et al. 2020), the baseline without
    prototypes."""

    temperature: float = Field(default=0.1, gt=0)


class LabelSetConfig(Strict):
    """A label table of the dataset, DATASET/labels/<name>.parquet (`ingest label`), with a head of its own.

    kind: `classes`, one of several (cross-entropy), or `multi`, any of several (binary cross-entropy, entries
    may be unknown one by one). modalities: whose labels count; none named: all. reads: what g is linear in,
    the pooled features of the backbone (`pooled`, intermediate), the unit features behind the projection head
    (`projected`, the output), or `both` side by side.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    kind: Literal["classes", "multi"] = "classes"
    beta: float = Field(default=1.0, ge=0)
    modalities: tuple[str, ...] = ()
    reads: Literal["pooled", "projected", "both"] = "pooled"


class SupervisionConfig(Strict):
    """method.md eq. 4: `1/N sum_k [alpha L_ss(x_k) + 1[k labelled] beta L_sup(g(x_k), y_k)]`, one linear g
    for each set of labels. denominator: N of the second term, the whole batch or its labelled images."""

    labels: tuple[LabelSetConfig, ...] = ()
    alpha: float = Field(default=1.0, ge=0)
    denominator: Literal["batch", "labelled"] = "batch"

    @model_validator(mode="after")
    def _sets_differ(self) -> "SupervisionConfig":
        names = [one.name for one in self.labels]
        if len(set(names)) != len(names):
            raise ValueError("labels must name each table once")
        if not names and (self.alpha, self.denominator) != (1.0, "batch"):
            raise ValueError("alpha and denominator go with labels, and no table is named: set labels")
        return self
