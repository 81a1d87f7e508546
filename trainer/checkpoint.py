"""Checkpoints of a run: `RUN/checkpoints/step-00000100/{state.safetensors, state.json, manifest.json}`.

Promises, each with a test in tests/trainer/test_checkpoint.py:

* A checkpoint is complete or it is not there: it is written into `step-N.tmp-<attempt>/`, files and folder
  are fsynced, the manifest (sizes, sha256) comes last, then one rename, then the fsync of the parent, and
  only then is the pointer `LATEST` replaced. `LATEST` is for people and tools: a load trusts the manifests
  alone.
* The newest checkpoint that verifies wins; older ones go only after the newest was read back.
* Two live attempts (a driver that was killed, its ranks that lived on for seconds) do not harm each other.
* No pickle. `torch.distributed.checkpoint` writes its `.metadata` as one, so it is not used; nothing is
  lost by that, since all state of this trainer is either the same on every rank (model, optimizer) or
  global (queues): rank 0 writes it and every world size can load it.
"""

import errno
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from shards.errors import UserError
from trainer import files
from trainer.config import TrainConfig
from trainer.labels import LabelSet, from_json

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
TENSORS, STATE, MANIFEST, LATEST = "state.safetensors", "state.json", "manifest.json", "LATEST"
_NAME = re.compile(r"step-(\d{8,})$")
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


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def path_of(run_dir: Path, step: int) -> Path:
    return folder(run_dir) / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps of all complete-looking checkpoints, ascending; nothing is verified."""
    if not folder(run_dir).is_dir():
        return []
    matches = (_NAME.match(path.name) for path in folder(run_dir).iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def save(
    run_dir: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write checkpoint `step`, verify it, then drop all but the newest `keep` up to it.

    A verified checkpoint of the same step is left as it is. Raises UserError when the disk is full.
    """
    final = path_of(run_dir, step)
    if problem(final) is not None:
        with files.disk_full_is_clear("saving a checkpoint"):
            _publish(final, step, tensors, state)
    trouble = problem(final)
    if trouble is not None:
        raise OSError(errno.EIO, f"{final.name} was written but does not verify ({trouble}): check the disk")
    with files.disk_full_is_clear("saving a checkpoint"):
        files.replace_file(folder(run_dir) / LATEST, f"{final.name}\n".encode())
    for old in [s for s in list_steps(run_dir) if s <= step][:-keep]:
        _remove(path_of(run_dir, old))
    return final


def problem(path: Path) -> str | None:
    """Why a checkpoint must not be loaded, or None: manifest, sizes and sha256 of every file."""
    try:
        _read_verified(path)
    except BrokenCheckpointError as error:
        return str(error)
    return None


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Raises UserError when there are checkpoints, but none of them verifies: starting over in the same folder
    would hide the loss.
    """
    steps = list_steps(run_dir)
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


def sweep(run_dir: Path) -> None:
    """Remove what interrupted attempts left: they never had a final name."""
    for place in (run_dir, folder(run_dir)):
        if place.is_dir():
            for path in place.glob("*.tmp-*"):
                _remove(path)


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
    """Load what `optimizer_tensors` gave into a freshly built optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class BrokenCheckpointError(Exception):
    """The files of a checkpoint are not those that were written."""


def _read_verified(path: Path) -> dict[str, bytes]:
    """Each file read once, checked, and only those bytes are used."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        listed = manifest["files"]
        contents = {name: (path / name).read_bytes() for name in (TENSORS, STATE)}
        for name, data in contents.items():
            if len(data) != listed[name]["size"] or files.sha256(data) != listed[name]["sha256"]:
                raise BrokenCheckpointError(f"{name} is not what the manifest says")
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenCheckpointError("a file is missing") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenCheckpointError("the manifest is damaged") from None
    return contents


def _publish(final: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{final.name}.tmp-{files.new_attempt()}")
    temporary.mkdir()
    # Copies: safetensors refuses tensors that share memory, and the step may go on writing into these.
    staged = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    contents = {
        TENSORS: safetensors.torch.save(staged),
        STATE: json.dumps({"format": FORMAT_VERSION, "step": step, **state}, indent=1).encode(),
    }
    for name, data in contents.items():
        files.write_synced(temporary / name, data)
    listed = {name: {"size": len(data), "sha256": files.sha256(data)} for name, data in contents.items()}
    manifest = {"format": FORMAT_VERSION, "step": step, "files": listed}
    files.write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    files.sync_folder(temporary)
    # Out of the way, under a name that `sweep` removes; a good one of another attempt stays where it is.
    if final.exists() and problem(final) is not None:
        files.rename(final, final.with_name(f"{final.name}.tmp-broken-{files.new_attempt()}"))
    try:
        files.rename(temporary, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _remove(temporary)  # another live attempt was faster; `save` verifies what it wrote
    files.sync_folder(final.parent)


def _remove(path: Path) -> None:
    """Delete under a temporary name, so that no half-deleted folder bears a checkpoint's name."""
    if ".tmp-" not in path.name:
        aside = path.with_name(f"{path.name}.tmp-old-{files.new_attempt()}")
        files.rename(path, aside)
        path = aside
    files.before("remove", path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another attempt may be sweeping the same names
    else:
        path.unlink(missing_ok=True)


def _text(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
