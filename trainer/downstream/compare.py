"""Several encoders, several tasks, few labels: the figures of a comparison and their table. Pure.

A task is a table of labels of one modality. An encoder is judged by its frozen features: a linear probe is
fitted on labels of the splits train and val and judged on test. Its penalty is chosen by a cross-validation
over the patients that are fitted. No encoder has seen an image of test. For choosing settings there is
another test split, taken out of train (orchestration.compare_data.hold_out): the real one is looked at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.downstream.features import Features
from trainer.downstream.linear import linear_probe_auc

Labels = NDArray[np.int64]
LEAST = 5  # labelled images of each class, whatever the fraction

Row = Mapping[str, Any]  # arm, seed, modality, task, fraction, auc, n_fit, n_judged


def draw_labels(labels: Labels, fraction: float, seed: int) -> NDArray[np.int64]:
    """Indices, ascending, of `fraction` of the images of each class, LEAST or more: what is labelled.

    Images and not patients are drawn: the sets of a few dozen patients would be left with one or two of them.
    """
    if fraction >= 1:
        return np.arange(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, int(label))).permutation(members)
        chosen.append(order[: max(LEAST, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def judge(
    features: Features,
    labels: Labels,
    patients: NDArray[np.str_],
    splits: NDArray[np.str_],
    fraction: float,
    seed: int,
) -> dict[str, Any]:
    """auc, n_fit and n_judged of one task. All arguments are of its labelled images, in one order; splits:
    train, val, test. The labels that are fitted are those of draw_labels of the train images and, apart from
    them, of the val images."""
    fit = np.concatenate([_drawn(labels, splits == part, fraction, seed) for part in ("train", "val")])
    fit.sort()
    test = np.flatnonzero(splits == "test")
    auc = linear_probe_auc(features[fit], labels[fit], features[test], labels[test], patients[fit])
    return {"auc": auc, "n_fit": len(fit), "n_judged": len(test)}


def _drawn(labels: Labels, part: NDArray[np.bool_], fraction: float, seed: int) -> NDArray[np.int64]:
    where = np.flatnonzero(part)
    return where[draw_labels(labels[where], fraction, seed)]


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One dict a task and fraction, and one a modality (task `mean`, over its tasks): `arms`: arm to {mean,
    min, max, n} over the seeds. In the order of the rows."""
    found: dict[tuple[str, str, float], dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        for task in (row["task"], "mean"):
            of_arm = found.setdefault((row["modality"], task, row["fraction"]), {}).setdefault(row["arm"], {})
            of_arm.setdefault(row["seed"], []).append(row["auc"])
    return [
        {
            "modality": modality,
            "task": task,
            "fraction": fraction,
            "arms": {arm: _spread([float(np.mean(a)) for a in of.values()]) for arm, of in arms.items()},
        }
        for (modality, task, fraction), arms in found.items()
    ]


def less(rows: Sequence[Row], arm: str) -> list[Row]:
    """Rows of the other arms, less those of `arm` with the same seed, task and fraction: the auc is a
    difference. Of a seed both were judged on the same images, so it varies less than what it is made of."""
    reference = {(r["seed"], r["task"], r["fraction"]): r["auc"] for r in rows if r["arm"] == arm}
    pairs = [(r, reference.get((r["seed"], r["task"], r["fraction"]))) for r in rows if r["arm"] != arm]
    return [{**row, "auc": row["auc"] - other} for row, other in pairs if other is not None]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values), "n": len(values)}


def markdown(
    summary: Sequence[Mapping[str, Any]], arms: Sequence[str], fraction: float, seeds: int, sign: str = ""
) -> str:
    """A table of one fraction: a row a modality and task, a column an arm; mean (min to max) over the seeds,
    and of how many, where that is not all of `seeds`. sign: "+" for differences."""
    lines = [f"| | {' | '.join(arms)} |", f"|---|{'---|' * len(arms)}"]
    chosen = [one for one in summary if one["fraction"] == fraction]
    of_modality: dict[str, list[Mapping[str, Any]]] = {}
    for one in chosen:
        of_modality.setdefault(one["modality"], []).append(one)
    for modality, members in of_modality.items():
        tasks = [one for one in members if one["task"] != "mean"]
        mean = [one for one in members if one["task"] == "mean"]
        for one in [*tasks, *(mean if len(tasks) > 1 else [])]:
            name = f"**{modality}, mean**" if one["task"] == "mean" else one["task"]
            cells = [_cell(one["arms"].get(arm), seeds, sign) for arm in arms]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(spread: Mapping[str, float] | None, seeds: int, sign: str) -> str:
    if spread is None:
        return "-"
    mean, low, high = (format(spread[name], f"{sign}.3f") for name in ("mean", "min", "max"))
    parts = [] if spread["min"] == spread["max"] else [f"{low} to {high}"]
    parts += [] if spread["n"] == seeds else [f"{spread['n']} of {seeds} seeds"]
    return mean + (f" ({', '.join(parts)})" if parts else "")
