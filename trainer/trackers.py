"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow; optional, on rank 0 only.

All keep to the run folder and send nothing, unless the user's own environment says otherwise (WANDB_MODE,
MLFLOW_TRACKING_URI). A run that goes on does not show a step twice.
"""

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from shards.errors import UserError
from trainer import journal
from trainer.checkpoint import flat_settings
from trainer.config import TrainConfig
from trainer.step import is_logged

PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),  # the small package of MLflow leaves out the last two
}


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Numbers of a logged step; those that are not finite are left out."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there. Raises UserError."""
    for name in names:
        if any(importlib.util.find_spec(package) is None for package in PACKAGES[name]):
            raise UserError(
                f"trackers={name} needs a package that is not installed: pip install 'medswav[{name}]', or "
                "leave it out"
            )


def open_trackers(config: TrainConfig, run_dir: Path, step: int) -> list[Tracker]:
    """The trackers of config.trackers; `step`: the first that this attempt will log."""
    makers: dict[str, Callable[[TrainConfig, Path, int], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": Wandb,
        "mlflow": Mlflow,
    }
    return [makers[name](config, run_dir, step) for name in config.trackers]


class TensorBoard:
    """Event files in RUN/tensorboard. On disk after every call, so what a checkpoint is behind is there."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what older files hold of this step and later ones.
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step if step else None)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in _finite(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """RUN/wandb, offline: nothing is sent until `wandb sync`. WANDB_MODE=online sends it as it comes.

    Online its server leaves out steps that it has. An offline folder cannot be gone on with: a run that goes
    on writes a new one from metrics.jsonl (without times), and the old one goes.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        name, folder = _run_id(run_dir), run_dir / "wandb"
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for kind in ("CONFIG", "CACHE", "DATA"):  # else below the home directory
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(folder / kind.lower()))
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        for old in folder.glob(f"offline-run-*-{name}") if mode == "offline" else ():
            shutil.rmtree(old)
        settings = {"console": "off", "disable_git": True, "save_code": False, "silent": True}
        self._run: Any = wandb.init(
            project="medswav",
            name=run_dir.name,
            id=name,
            dir=str(run_dir),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=_settings(config),
            settings=wandb.Settings(**settings, x_disable_stats=True, x_disable_machine_info=True),
        )
        for row in journal.read(journal.journal_path(run_dir)) if mode == "offline" else ():
            if row["step"] < step and is_logged(int(row["step"]), config):
                self.log(int(row["step"]), row)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        self._run.log(_finite(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """RUN/mlflow.db (SQLite), or MLFLOW_TRACKING_URI; one run of the experiment medswav."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.absolute() / 'mlflow.db'}")
        self._client: Any = MlflowClient(uri)
        found = self._client.get_experiment_by_name("medswav")
        experiment = found.experiment_id if found else self._client.create_experiment("medswav")
        self._run_id, self._last = self._find(experiment, _run_id(run_dir))
        if self._run_id is None:
            tags = {"medswav": _run_id(run_dir)}
            self._run_id = self._client.create_run(experiment, tags=tags, run_name=run_dir.name).info.run_id
            for name, value in _settings(config).items():
                self._client.log_param(self._run_id, name, value)

    def _find(self, experiment: str, name: str) -> tuple[str | None, int]:
        """The run of this folder, and the last step that it holds."""
        runs = self._client.search_runs([experiment], f"tags.medswav = '{name}'")
        if not runs:
            return None, -1
        run_id = runs[0].info.run_id
        history = self._client.get_metric_history(run_id, "loss")
        return run_id, max((metric.step for metric in history), default=-1)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        if step <= self._last:
            return  # of an attempt before: the numbers are the same
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in _finite(values).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {n: v for n, v in values.items() if n != "step" and v is not None and math.isfinite(v)}


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Flat, without the place of the dataset, which is nobody else's business."""
    flat = flat_settings(config.model_dump(mode="json"))
    return {name: value for name, value in flat.items() if name != "data.dataset"}


def _run_id(run_dir: Path) -> str:
    """A name of the run folder that stays, and tells nothing of its path."""
    return sha256(str(run_dir.absolute()).encode()).hexdigest()[:16]
