"""How soon a training is done: the earliest epoch at 98 % of the final best, and who is there faster."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SHARE = 0.98

Curve = Sequence[float]  # the metric on validation after each epoch, larger = better; nan: not evaluated


def convergence_epoch(values: Curve, share: float = SHARE) -> int:
    """Epochs trained until the metric first reached `share` of its best over the whole training; from 1 on.

    Raises ValueError where there is no number, or the best is not above 0 (98 % of it would be more).
    """
    curve = np.asarray(values, np.float64)
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0, up to 1")
    if not np.isfinite(curve).any():
        raise ValueError("the curve has no number")
    best = np.nanmax(curve)
    if not best > 0:
        raise ValueError(f"the best value is {best:g}: a share of it needs a metric above 0")
    reached = curve >= share * best  # comparisons with nan are false
    return int(np.argmax(reached)) + 1


def percent_faster(epochs: float, reference: float) -> float:
    """100 (1 - epochs / reference): 72 where 28 epochs do what the reference takes 100 for; negative where
    it is slower."""
    if not (epochs > 0 and reference > 0):
        raise ValueError(f"epochs must be above 0, not {epochs:g} and {reference:g}")
    return 100 * (1 - epochs / reference)


def compare(runs: Mapping[str, Sequence[Curve]], share: float = SHARE) -> list[dict[str, Any]]:
    """A row a name of `runs` (its curves are of several seeds): name, epochs {mean, min, max, n}, best
    {mean, min, max, n}, faster: {other name: percent}, of the mean epochs."""
    epochs = {name: [convergence_epoch(c, share) for c in curves] for name, curves in runs.items()}
    means = {name: float(np.mean(found)) for name, found in epochs.items()}
    return [
        {
            "name": name,
            "epochs": _spread(epochs[name]),
            "best": _spread([float(np.nanmax(c)) for c in curves]),
            "faster": {o: percent_faster(means[name], means[o]) for o in runs if o != name},
        }
        for name, curves in runs.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values), "n": len(values)}
