"""The label heads of a hybrid run beside its encoder: `heads.safetensors`, tensors and class names.

    heads = load_heads(Path("RUN/heads.safetensors"))
    logits = heads["findings"].logits(encoder(images))  # [n, len(heads["findings"].classes)]

Kind `classes`: softmax over the logits; `multi`: a sigmoid each.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from shards.errors import UserError
from trainer import files
from trainer.export import EncoderInfo
from trainer.labels import LabelSet, from_json
from trainer.models.embedder import Embedder
from trainer.models.heads import head_input, projection_head

HEADS_FILE = "heads.safetensors"
FORMAT_VERSION = 1
_PROJECTION = "projection head"  # no name of a label set has a space


@dataclass(frozen=True)
class Head:
    """linear: what the head `reads` to a logit for each of `classes`, in their order. projection: pooled
    features of the encoder to projected ones, for a head that reads them."""

    kind: str
    classes: tuple[str, ...]
    linear: nn.Linear
    reads: str = "pooled"
    projection: nn.Module | None = None

    def logits(self, features: Tensor) -> Tensor:
        """Features of the encoder [n, D] to [n, C]."""
        projected = features if self.projection is None else normalize(self.projection(features), dim=1)
        found: Tensor = self.linear(head_input(features, projected, self.reads))
        return found


def save_heads(path: Path, core: Embedder, labels: Sequence[LabelSet], info: EncoderInfo) -> None:
    """Atomically write the heads of an encoder, and the projection head where one of them reads behind it;
    the header holds the label sets and says which encoder."""
    parts: dict[str, nn.Module] = {one.name: core.label_heads[one.name] for one in labels}
    if set(core.head_reads.values()) - {"pooled"}:
        parts[_PROJECTION] = core.projection_head
    tensors = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    about = {
        "format": FORMAT_VERSION,
        "labels": [asdict(one) for one in labels],
        "reads": core.head_reads,
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
    heads, projection, reads = {}, _projection(tensors), about.get("reads", {})
    for one in from_json(about["labels"]):
        weight = tensors[f"{one.name}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": tensors[f"{one.name}.bias"]})
        own = reads.get(one.name, "pooled")
        behind = None if own == "pooled" else projection
        heads[one.name] = Head(one.kind, one.classes, linear.eval(), own, behind)
    return heads


def _projection(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    start = f"{_PROJECTION}."
    state = {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}
    if not state:
        return None
    first, last = state["0.weight"], state["3.weight"]
    head = projection_head(first.shape[1], first.shape[0], last.shape[0])
    head.load_state_dict(state)
    return head.eval()
