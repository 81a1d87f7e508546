"""A task of one's own in one file: a detector of small spots, judged by fROC (docs/evaluation.md)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d

from trainer.downstream.finetune import FinetuneConfig, evaluate, finetune, load_best, metric_curve
from trainer.downstream.task import Dataset, Sample, Task
from trainer.evaluate import froc, roc

SIDE, HALF = 20, 1.5  # px of an image, half a spot


def data(prefix: str, n: int, seed: int) -> Dataset:
    """Noise with no, one or two spots of 3 px; the target is their boxes."""
    random = np.random.default_rng(seed)
    images, targets = random.random((n, 1, SIDE, SIDE), np.float32), []
    for i in range(n):
        corners = [random.integers((0, 10 * k), (SIDE - 3, 10 * k + 7)) for k in range(i % 3)]
        for y, x in corners:
            images[i, 0, y : y + 3, x : x + 3] += 0.5
        targets.append(np.array([(x, y, x + 3, y + 3) for y, x in corners], float).reshape(-1, 4))
    return Dataset(np.array([f"{prefix}{i}" for i in range(n)]), lambda i, _: Sample(images[i], targets[i]))


def network() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 8, 5, padding=2), nn.LeakyReLU(), nn.Conv2d(8, 1, 1))


def loss(net: nn.Module, inputs: Tensor, targets: Sequence[Any]) -> Tensor:
    centres = torch.zeros_like(inputs)
    for heat, boxes in zip(centres, targets, strict=True):
        for x, y in (boxes[:, :2] + HALF).astype(int):
            heat[0, y, x] = 1
    return binary_cross_entropy_with_logits(net(inputs), centres, pos_weight=torch.tensor(10.0))


def predict(net: nn.Module, inputs: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """The five highest peaks of an image, as boxes and scores."""
    heat = net(inputs).sigmoid()
    peaks = heat * (heat == max_pool2d(heat, 5, 1, 2))
    found = []
    for one in peaks[:, 0].numpy():
        best = np.argsort(-one, axis=None)[:5]
        y, x = np.unravel_index(best, one.shape)
        centre = np.stack([x, y], 1) + 0.5
        found.append((np.concatenate([centre - HALF, centre + HALF], 1), one.flat[best].astype(float)))
    return found


def metrics(predictions: Sequence[Any], targets: Sequence[Any]) -> dict[str, float]:
    images = [froc.ImageBoxes(t, *p) for t, p in zip(targets, predictions, strict=True)]
    ready = froc.matched(images)
    return {"froc": froc.froc(ready).mean(), "auc": roc.auc(*froc.image_scores(ready))}


def test_a_detector_is_trained_and_judged_by_the_same_loop(tmp_path):
    parts = {"train": data("t", 60, 0), "val": data("v", 30, 1), "test": data("e", 30, 2)}
    task = Task(
        "spots", **parts, network=network, loss=loss, predict=predict, metrics=metrics, selection="froc"
    )
    result = finetune(task, FinetuneConfig(epochs=8, batch_size=6, learning_rate=0.05), tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = evaluate(task, network(), task.test, 30)
    assert result.test["froc"] > 0.75 > 0.5 > untrained["froc"] and result.test["auc"] > 0.8
    assert max(metric_curve(tmp_path, "froc")) == result.val["froc"]
    net = network()
    load_best(net, tmp_path)
    assert evaluate(task, net, task.test, 30) == result.test
