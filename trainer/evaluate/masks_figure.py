"""Slices with the true and the predicted outline of a mask as PNG, and what they show as CSV. No torch."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer import files

TRUE, FOUND = "#009E73", "#D55E00"  # of Okabe and Ito (2008), as in figures
COLUMNS, DPI = 4, 110


@dataclass(frozen=True)
class MaskExample:
    """image: f32 [S, S] in [0, 1]; truth: bool [S, S]; probability: f32 [S, S], predicted."""

    name: str
    image: NDArray[np.float32]
    truth: NDArray[np.bool_]
    probability: NDArray[np.float32]


def masks_figure(
    out: Path, examples: Sequence[MaskExample], *, title: str = "", threshold: float = 0.5
) -> tuple[Path, Path]:
    """`out`, the PNG, and beside it the CSV: name, truth_pixels, found_pixels, dice, highest."""
    if not examples:
        raise ValueError("nothing to draw")
    lines = -(-len(examples) // COLUMNS)
    figure = Figure(figsize=(2.3 * COLUMNS, 2.5 * lines + 0.6), layout="constrained", facecolor="white")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    rows = []
    for ax in axes:
        ax.axis("off")
    for ax, one in zip(axes, examples, strict=False):
        found = one.probability >= threshold
        ax.imshow(one.image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for mask, colour in ((one.truth, TRUE), (found, FOUND)):
            if mask.any():
                ax.contour(
                    np.kron(mask, np.ones((4, 4))), [0.5], colors=colour, linewidths=1, extent=_extent(mask)
                )
        sizes = int(one.truth.sum()), int(found.sum())
        dice = 2 * int((one.truth & found).sum()) / sum(sizes) if sum(sizes) else float("nan")
        ax.set_title("no lesion" if sizes == (0, 0) else f"Dice {dice:.2f}", fontsize=8)
        rows.append(
            {
                "name": one.name,
                "truth_pixels": sizes[0],
                "found_pixels": sizes[1],
                "dice": "" if np.isnan(dice) else f"{dice:.6g}",
                "highest": f"{float(one.probability.max()):.6g}",
            }
        )
    figure.suptitle(f"{title} (green: true, red: found)".strip(), fontsize=10)
    png, table = out.with_suffix(".png"), out.with_suffix(".csv")
    picture, text = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.replace_file(png, picture.getvalue())
    files.replace_file(table, text.getvalue().encode())
    return png, table


def _extent(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    return (-0.5, mask.shape[1] - 0.5, -0.5, mask.shape[0] - 0.5)
