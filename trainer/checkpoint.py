"""Checkpoints of a run: `RUN/checkpoints/step-00000100/{state.safetensors, state.json, manifest.json}`.

Promises, each with a test in tests/trainer/test_checkpoint.py:

* A checkpoint is complete or it is not there: it is written into `step-N.tmp-<attempt>/`, files and folder
  are fsynced, the manifest (sizes, sha256) comes last, then one rename, then the fsync of the parent, and
  only then is the pointer `LATEST` replaced. `LATEST` is for people and tools: a load trusts the manifests
  alone.
* The newest checkpoint that verifies wins; older ones go only after the newest was read back.
* Two live attempts (a driver that was killed, its ranks that lived on for seconds) do not harm each other:
  an older one commits nothing once a newer one has begun (trainer.attempts).
* A full disk costs the checkpoint that was being written, and no other.
* No pickle. `torch.distributed.checkpoint` writes its `.metadata` as one, so it is not used; nothing is
  lost by that, since all state of this trainer is either the same on every rank (model, optimizer) or
  global (queues): rank 0 writes it and every world size can load it.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from shards.errors import UserError
from trainer import attempts, checkpoint_files, files
from trainer.attempts import Attempt
from trainer.checkpoint_files import (
    LATEST,
    MANIFEST,
    STATE,
    TENSORS,
    BrokenCheckpointError,
    folder,
    path_of,
    problem,
)
from trainer.checkpoint_files import list_steps as list_steps
from trainer.checkpoint_files import sweep as sweep
from trainer.config import TrainConfig
from trainer.labels import LabelSet, from_json

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# What may change between two attempts of one run: none of it changes a sample (threads and model.compile may
# move the last bits of a loss). The dataset may move to another folder: what it holds is held to its
# fingerprint.
FREE_SETTINGS = (
    "threads",
    "log_every_steps",
    "gc_every_steps",
    "checkpoint.",
    "online.",
    "trackers",
    "data.dataset",
    "data.cache_bytes",
    "data.catalogue_cache",
    "data.read_",
    "data.node_cache",
    "model.compile",
    "model.activation_checkpointing",
)


@dataclass(frozen=True)
class Checkpoint:
    """`step` optimizer steps are done; `tensors` by name, on the CPU; `state` is plain JSON."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix.`, without the prefix."""
        start = len(prefix) + 1
        return {name[start:]: value for name, value in self.tensors.items() if name.startswith(f"{prefix}.")}


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int | None = None,
    attempt: Attempt | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Write checkpoint `step`, verify it, then drop what is older and not kept.

    A verified checkpoint of the same step is left as it is. before_commit runs when all is written, right
    before the rename. Raises DiskFullError and leaves no part behind; ReplacedError when a newer attempt has
    begun (attempt None: not looked at).
    """
    final = path_of(run_dir, step)
    temporary = final.with_name(f"{final.name}.tmp-{files.new_attempt()}")
    check = attempt.check if attempt is not None else lambda: None

    def bad() -> bool:
        if problem(final) is not None:
            return True
        return checkpoint_files.replaced_by(final, step, attempts.starts(run_dir)) is not None

    try:
        with files.disk_full_is_clear("saving a checkpoint"):
            missing = bad()
            if missing:
                _write(temporary, step, tensors, state, attempt)
            before_commit()
            check()
            if missing:
                checkpoint_files.publish(temporary, final, bad)
        trouble = problem(final)
        if trouble is not None:
            raise OSError(
                errno.EIO, f"{final.name} was written but does not verify ({trouble}): check the disk"
            )
        with files.disk_full_is_clear("saving a checkpoint"):
            files.replace_file(folder(run_dir) / LATEST, f"{final.name}\n".encode())
        check()  # what a newer attempt goes on from is not removed
        checkpoint_files.prune(run_dir, step, keep, keep_every)
    except (OSError, UserError):
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk must not be filled further
        check()  # a newer attempt sweeps away what an older one is writing
        raise
    return final


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that counts and verifies; None where there is none at all.

    Raises UserError when there are checkpoints, but none of them verifies: starting over in the same folder
    would hide the loss.
    """
    steps = checkpoint_files.steps_that_count(run_dir)
    for step in reversed(steps):
        try:
            return load(run_dir, step)
        except BrokenCheckpointError as error:
            log.warning("checkpoint of step %d does not verify (%s): trying the one before", step, error)
    if steps:
        raise UserError(
            f"none of the {len(steps)} checkpoints of this run verifies: "
            "restore one from a backup, or start over in another run folder"
        )
    return None


def load(run_dir: Path, step: int) -> Checkpoint:
    """Verify and read one checkpoint, whatever the world size it was written on.

    Raises BrokenCheckpointError; UserError for another format version.
    """
    contents = _read_verified(path_of(run_dir, step))
    state = json.loads(contents[STATE])
    if state.get("format") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint format {state.get('format')} is not {FORMAT_VERSION}: use the version that wrote it"
        )
    # Cloned: as read they are unaligned views of one buffer, which any one of them would keep in memory.
    tensors = {name: value.clone() for name, value in safetensors.torch.load(contents[TENSORS]).items()}
    return Checkpoint(step, tensors, state)


def check_same_run(
    state: Mapping[str, Any],
    config: TrainConfig,
    dataset_fingerprint: str,
    bands_digest: str | None = None,
    labels: Sequence[LabelSet] | None = None,
) -> None:
    """Refuse to go on with another dataset, other settings, labels or band statistics (None: not compared).

    Raises UserError naming what differs.
    """
    was, now = flat_settings(state["config"]), flat_settings(config.model_dump(mode="json"))
    if "data.order.layout" not in was:  # it began before there were blocks: goes on with layout=keys only
        was |= {n: value for n, value in now.items() if n.startswith("data.order.")}
        was["data.order.layout"] = "keys"
    names = sorted(name for name in was.keys() | now.keys() if not name.startswith(FREE_SETTINGS))
    differs = [name for name in names if was.get(name) != now.get(name)]
    if differs:
        listed = "; ".join(f"{n} was {_text(was.get(n))}, now {_text(now.get(n))}" for n in differs)
        raise UserError(
            f"the run folder holds a run with other settings: {listed}. "
            "Set them back to continue it, or choose another run folder"
        )
    if state["dataset_fingerprint"] != dataset_fingerprint:
        raise UserError(
            f"the run folder holds a run on another dataset: fingerprint was {state['dataset_fingerprint']}, "
            f"now {dataset_fingerprint} (adding data changes it too). "
            "Set data.dataset back to continue it, or choose another run folder"
        )
    then = from_json(state.get("labels", []))
    for was_then, known in zip(then, then if labels is None else labels, strict=True):
        if was_then != known:
            raise UserError(
                f"the labels {known.name!r} are not those that the run began with: put the table back "
                "(labels/ of the dataset) to continue it, or choose another run folder"
            )
    bands = state.get("bands_digest")
    if None not in (bands, bands_digest) and bands != bands_digest:
        raise UserError(
            "the band statistics are not those that the run began with: put its file back "
            "(views.band_statistics, or RUN/bands.json), or choose another run folder"
        )


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as {"a.b": value}; lists are values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flat_settings(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter index>.<name>` tensors; its settings come from the config."""
    state = optimizer.state_dict()["state"]
    flat: dict[str, Tensor] = {}
    for index, values in state.items():
        for name, value in values.items():
            if value is not None:  # SGD keeps None until the first step
                flat[f"{index}.{name}"] = torch.as_tensor(value)
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_tensors` gave into a freshly built optimizer of the same parameters.

    A tensor of a parameter's shape gets its layout too (channels last): fused kernels go through both in
    the order of memory.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_verified(path: Path) -> dict[str, bytes]:
    """Each file read once, checked, and only those bytes are used. Raises BrokenCheckpointError."""
    contents = {}
    for name, (size, digest) in checkpoint_files.read_manifest(path).files.items():
        try:
            data = (path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise BrokenCheckpointError("a file is missing") from None
        if len(data) != size or files.sha256(data) != digest:
            raise BrokenCheckpointError(f"{name} is not what the manifest says")
        contents[name] = data
    return contents


def _write(
    temporary: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    attempt: Attempt | None,
) -> None:
    temporary.mkdir(parents=True)
    text = json.dumps({"format": FORMAT_VERSION, "step": step, **state}, indent=1).encode()
    written = {
        TENSORS: files.write_parts(temporary / TENSORS, safetensors_parts(tensors)),
        STATE: files.write_parts(temporary / STATE, [memoryview(text)]),
    }
    manifest = {
        "format": FORMAT_VERSION,
        "step": step,
        "attempt": None if attempt is None else attempt.number,
        "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in written.items()},
    }
    files.write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    files.sync_folder(temporary)


def safetensors_parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, tensor by tensor.

    The library makes them all at once: a second copy of the state, and Python held up meanwhile, with it the
    step that a save in the background must not disturb. The format is a length, a JSON header and the values.
    """
    # Widest first, so that each tensor is aligned to its own width, as the library does it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        shape = list(value.shape)
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        plain = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield plain.numpy().data


def _text(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
