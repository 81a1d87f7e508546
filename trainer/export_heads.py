"""The label heads of a hybrid run beside its encoder: `heads.safetensors`, tensors and class names.

    heads = load_heads(Path("RUN/heads.safetensors"))
    logits = heads["findings"].linear(encoder(images))  # [n, len(heads["findings"].classes)]

Kind `classes`: softmax over the logits; `multi`: a sigmoid each.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from shards.errors import UserError
from trainer import files
from trainer.export import EncoderInfo
from trainer.labels import LabelSet, from_json

HEADS_FILE = "heads.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Head:
    """linear: pooled features of the encoder to a logit for each of `classes`, in their order."""

    kind: str
    classes: tuple[str, ...]
    linear: nn.Linear


def save_heads(path: Path, heads: nn.ModuleDict, labels: Sequence[LabelSet], info: EncoderInfo) -> None:
    """Atomically write the heads of an encoder; the header holds the label sets and says which encoder."""
    tensors = {
        f"{one.name}.{name}": value.detach().cpu().contiguous()
        for one in labels
        for name, value in heads[one.name].state_dict().items()
    }
    about = {
        "format": FORMAT_VERSION,
        "labels": [asdict(one) for one in labels],
        "backbone": info.backbone,
        "step": info.step,
        "dataset_fingerprint": info.dataset_fingerprint,
        "seed": info.seed,
    }
    with files.disk_full_is_clear("writing the label heads"):
        data = safetensors.torch.save(tensors, metadata={"medswav_heads": json.dumps(about)})
        files.replace_file(path, data)


def load_heads(path: Path) -> dict[str, Head]:
    """{label set: Head}, on the CPU. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no file {path.name}: a finished run with supervision.labels writes it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("medswav_heads")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError:
        raise UserError(f"{path.name} is not a safetensors file, or it is damaged") from None
    about = json.loads(text) if text is not None else {}
    if about.get("format") != FORMAT_VERSION:
        raise UserError(f"{path.name} holds no label heads of format {FORMAT_VERSION}: use RUN/{HEADS_FILE}")
    heads = {}
    for one in from_json(about["labels"]):
        weight = tensors[f"{one.name}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": tensors[f"{one.name}.bias"]})
        heads[one.name] = Head(one.kind, one.classes, linear.eval())
    return heads
