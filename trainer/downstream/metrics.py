"""Scores to numbers."""

import numpy as np
from numpy.typing import NDArray


def macro_auc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """ROC-AUC, mean over one-vs-rest of the classes that the labels hold and do not fill; nan where none
    does.

    labels int [n] in 0..classes-1; scores f64 [n, classes], rows sum to 1. Of two classes one is computed:
    the AUC of the other is the same number.
    """
    from sklearn.metrics import roc_auc_score  # a second of CPU, which most ranks need not spend

    present = [c for c in range(scores.shape[1]) if 0 < np.count_nonzero(labels == c) < len(labels)]
    if not present:
        return float("nan")
    if scores.shape[1] == 2:
        present = present[:1]
    return float(np.mean([roc_auc_score(labels == c, scores[:, c]) for c in present]))
