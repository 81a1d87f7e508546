"""The linear probe: multinomial logistic regression on frozen features."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from trainer.downstream.features import Features
from trainer.downstream.metrics import macro_auc

Labels = NDArray[np.int64]
C_GRID: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse L2 strength


def linear_probe_auc(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    val_x: Features,
    val_y: Labels,
) -> float:
    """Macro one-vs-rest ROC-AUC on the test set.

    Features are standardised with the training set's statistics. C is the one of C_GRID with the best AUC
    on the validation set (the smallest on ties); the probe is then fitted on training and validation
    samples together.
    Nothing in it is random.
    """
    classes = int(max(train_y.max(), val_y.max(), test_y.max())) + 1
    train, val = standardise(train_x, train_x), standardise(train_x, val_x)
    aucs = [macro_auc(val_y, _fit_scores(train, train_y, val, classes, c)) for c in C_GRID]
    best = C_GRID[int(np.argmax(aucs))]
    both_x, both_y = np.concatenate([train_x, val_x]), np.concatenate([train_y, val_y])
    both, test = standardise(both_x, both_x), standardise(both_x, test_x)
    return macro_auc(test_y, _fit_scores(both, both_y, test, classes, best))


def standardise(reference: Features, x: Features) -> NDArray[np.float64]:
    """x with the mean and standard deviation of the reference taken out; constant features become 0."""
    mean, std = reference.mean(axis=0, dtype=np.float64), reference.std(axis=0, dtype=np.float64)
    return (x - mean) / np.where(std > 1e-8, std, np.inf)


def _fit_scores(
    train: NDArray[np.float64], labels: Labels, test: NDArray[np.float64], classes: int, c: float
) -> NDArray[np.float64]:
    """Class probabilities f64 [n_test, classes]; classes without a training sample get 0."""
    if train.shape[1] > train.shape[0]:
        # The L2-penalised optimum lies in the span of the samples: fit there, exactly, with n unknowns.
        basis, _ = np.linalg.qr(train.T)
        train, test = train @ basis, test @ basis
    model = LogisticRegression(C=c, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties only; C is validated
        model.fit(train, labels)
    scores = np.zeros((len(test), classes))
    scores[:, model.classes_] = model.predict_proba(test)
    return scores
