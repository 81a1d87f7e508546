"""The linear probe: multinomial logistic regression on frozen features."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from trainer.downstream.features import Features
from trainer.downstream.metrics import macro_auc

Labels = NDArray[np.int64]
FOLDS, REPEATS = 5, 3
C_GRID: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse L2 strength


def linear_probe_auc(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    groups: NDArray[np.str_],
) -> float:
    """Macro one-vs-rest ROC-AUC on the test set.

    groups: the patient of each training sample. C is the one of C_GRID with the best AUC over the pooled
    predictions of a cross-validation of FOLDS parts in which no patient is on both sides, mean over REPEATS
    divisions into parts (the smallest C on ties): with a few dozen patients, a single validation set, or a
    single division, would decide it by chance. Features are standardised with the statistics of the samples
    that are fitted. The divisions are the same in every call.
    """
    classes = int(max(train_y.max(), test_y.max())) + 1
    with threadpool_limits(1):  # matrices this small lose far more by waiting for threads than they gain
        best = C_GRID[int(np.argmax(held_out_aucs(train_x, train_y, groups, classes)))]
        train, test = _in_span(train_x, test_x)
        return macro_auc(test_y, _fit_scores(train, train_y, test, classes, best))


def held_out_aucs(x: Features, y: Labels, groups: NDArray[np.str_], classes: int) -> list[float]:
    """Of each C of C_GRID: the AUC over the pooled predictions of a cross-validation in which no patient is
    on both sides, mean over REPEATS divisions of the patients."""
    found = np.zeros((REPEATS, len(C_GRID)))
    with threadpool_limits(1):
        for repeat in range(REPEATS):
            folds = GroupKFold(min(FOLDS, len(np.unique(groups))), shuffle=True, random_state=repeat)
            held_out = np.zeros((len(C_GRID), len(y), classes))
            for fit, val in folds.split(x, y, groups):
                fit_x, val_x = _in_span(x[fit], x[val])
                for scores, c in zip(held_out, C_GRID, strict=True):
                    scores[val] = _fit_scores(fit_x, y[fit], val_x, classes, c)
            found[repeat] = [macro_auc(y, scores) for scores in held_out]
    return [float(mean) for mean in found.mean(axis=0)]


def standardise(reference: Features, x: Features) -> NDArray[np.float64]:
    """x with the mean and standard deviation of the reference taken out; constant features become 0."""
    mean, std = reference.mean(axis=0, dtype=np.float64), reference.std(axis=0, dtype=np.float64)
    return (x - mean) / np.where(std > 1e-8, std, np.inf)


def _in_span(fit_x: Features, x: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both standardised by fit_x, in coordinates of the span of fit_x when it has more features than samples.

    The optimum of the L2-penalised regression lies in that span, so the fit is the same with fewer unknowns.
    """
    fitted, other = standardise(fit_x, fit_x), standardise(fit_x, x)
    if fitted.shape[1] <= fitted.shape[0]:
        return fitted, other
    basis, _ = np.linalg.qr(fitted.T)
    return fitted @ basis, other @ basis


def _fit_scores(
    train: NDArray[np.float64], labels: Labels, test: NDArray[np.float64], classes: int, c: float
) -> NDArray[np.float64]:
    """Class probabilities f64 [n_test, classes]; classes without a training sample get 0."""
    if len(present := np.unique(labels)) == 1:  # a fold of few patients
        return np.eye(classes)[np.full(len(test), present[0])]
    model = LogisticRegression(C=c, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties only; C is validated
        model.fit(train, labels)
    scores = np.zeros((len(test), classes))
    scores[:, model.classes_] = model.predict_proba(test)
    return scores
