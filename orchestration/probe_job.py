"""`medswav probe`: AUC on frozen features, as a table or JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import UserError


def probe(
    dataset: Path,
    encoders: Sequence[Path],
    labels: str,
    as_json: bool,
    fractions: Sequence[float] = (1.0,),
    backbone: str | None = None,
) -> str:
    """The text to print: a line for each modality, encoder and probe, or the whole evaluation as JSON."""
    from shards import catalog
    from trainer.downstream.probe import evaluate
    from trainer.export import load_encoder

    for path in encoders:
        if not path.is_file():
            raise UserError(f"{path} does not exist: give the encoder.safetensors of a finished run")
    table = catalog.labels(dataset, labels)
    loaded = [load_encoder(path, backbone) for path in encoders]
    evaluation = evaluate(str(dataset), table, loaded, fractions=fractions)
    if as_json:
        return json.dumps(dataclasses.asdict(evaluation), indent=1)
    lines = [_line(row) for row in evaluation.summary]
    return "\n".join(lines + [f"{name}: not evaluated, {why}" for name, why in evaluation.skipped.items()])


def _line(row: Mapping[str, Any]) -> str:
    """`ct  linear  pretrained .81 (.79-.83)  random .70 (...)  pixels ...`: means and ranges of the AUC."""
    parts = []
    for name in ("pretrained", "random", "pixels"):
        if name in row:
            spread = row[name]
            parts.append(f"{name} {spread['mean']:.3f} ({spread['min']:.3f}-{spread['max']:.3f})")
    return f"{row['modality']:6} {row['probe']:7} " + "  ".join(parts)
