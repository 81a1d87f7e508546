"""What a downstream task is: data, network, loss, predictions, metrics. The loop that all of them share is
trainer.downstream.finetune; trainer.downstream.classify is a complete task.

A new task is one function that returns a Task, in one file:

    def task(encoder: Callable[[], nn.Module]) -> Task:
        return Task(
            name="lesions", train=Dataset(patients, sample), val=..., test=...,
            network=lambda: Detector(encoder()),
            loss=lambda network, inputs, targets: network.loss(inputs, targets),
            predict=lambda network, inputs: network.boxes(inputs),
            metrics=lambda predictions, targets: {"froc": ...},
            selection="froc",
        )
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from shards.errors import UserError
from trainer.evaluate.fractions import check_disjoint

Random = np.random.Generator | None


class Sample(NamedTuple):
    """input: f32, [C, H, W] or [C, Z, Y, X] or features [F], of one shape within a dataset (what differs
    belongs into the target). target: whatever the task's loss and metrics read: a class, a mask, boxes."""

    input: NDArray[np.float32]
    target: Any


@dataclass(frozen=True)
class Dataset:
    """One split. sample(i, random): the i-th sample; random: for augmentation, a stream of its own for each
    (seed, epoch, i), or None where the sample is evaluated. patients: of each sample."""

    patients: NDArray[np.str_]
    sample: Callable[[int, Random], Sample]

    def __len__(self) -> int:
        return len(self.patients)


@dataclass(frozen=True)
class Task:
    """network(): a fresh one, its random numbers from torch's generator, which the loop has seeded; only
    parameters that require a gradient are trained and stored. loss(network, inputs [n, ...], targets): a
    scalar, the network in training mode. predict(network, inputs): one prediction a sample, on the CPU, in
    evaluation mode without gradients. metrics(predictions, targets): numbers by name, of a whole split.
    selection: the one whose best epoch on val is taken, larger = better. strata: of each training patient,
    for label fractions (evaluate.fractions); none: all are alike. identity: what else decides the numbers
    (such as the digest of the encoder); a folder of another one is refused.
    """

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Sequence[Any]], Tensor]
    predict: Callable[[nn.Module, Tensor], Sequence[Any]]
    metrics: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]
    selection: str
    strata: Mapping[str, int] = field(default_factory=dict)
    identity: str = ""


def check_task(task: Task) -> None:
    """Splits hold samples, and no patient is in two of them. Raises UserError."""
    parts = {"train": task.train, "val": task.val, "test": task.test}
    for name, part in parts.items():
        if not len(part):
            raise UserError(f"{task.name}: the {name} split has no samples with labels")
    patients = np.concatenate([part.patients for part in parts.values()])
    check_disjoint(patients, np.repeat(list(parts), [len(part) for part in parts.values()]))
