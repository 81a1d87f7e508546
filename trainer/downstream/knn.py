"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, section 3.4)."""

import numpy as np
from numpy.typing import NDArray

from trainer.downstream.features import Features
from trainer.downstream.metrics import macro_auc


def knn_scores(
    train_x: Features,
    train_y: NDArray[np.int64],
    test_x: Features,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> NDArray[np.float64]:
    """Class scores f64 [n_test, classes], rows sum to 1.

    Each of the k nearest training samples by cosine votes for its class with weight exp(cosine /
    temperature); k is the number of training samples where there are fewer.
    """
    similarity = _unit(test_x) @ _unit(train_x).T
    k = min(k, len(train_x))
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]  # stable: ties go to the earlier sample
    cosine = np.take_along_axis(similarity, nearest, axis=1)
    weights = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / temperature)
    votes = np.zeros((len(test_x), classes))
    rows = np.repeat(np.arange(len(test_x)), k)
    np.add.at(votes, (rows, train_y[nearest].ravel()), weights.ravel())
    return votes / votes.sum(axis=1, keepdims=True)


def knn_auc(
    train_x: Features,
    train_y: NDArray[np.int64],
    test_x: Features,
    test_y: NDArray[np.int64],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Macro one-vs-rest ROC-AUC of the kNN scores."""
    classes = int(max(train_y.max(), test_y.max())) + 1
    return macro_auc(test_y, knn_scores(train_x, train_y, test_x, classes, k=k, temperature=temperature))


def _unit(x: Features) -> NDArray[np.float64]:
    x64 = x.astype(np.float64)
    return x64 / np.maximum(np.linalg.norm(x64, axis=1, keepdims=True), 1e-12)
