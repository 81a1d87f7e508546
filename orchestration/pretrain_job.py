"""`medswav pretrain`: Ray Train around trainer.loop.train, batches from augmentation actors.

State that survives anything: (configuration, step, checkpoint), all of it in the run folder. A killed rank
makes Ray Train start the ranks again; a killed augmentation actor is restarted by Ray Core; a killed driver
is started again by the user or by the job wrapper. Each goes on from the newest checkpoint, with the same
losses. SIGTERM or Ctrl-C: all ranks stop after the same step, save a checkpoint, exit code 130.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestration.cluster import (
    OBJECT_STORE_BYTES,
    THREAD_ENV,
    JobFailedError,
    StopFlag,
    connected,
    wanted_address,
)
from orchestration.elastic import RESIZE_SECONDS, Ranks, elastic_trainer, possible_ranks
from orchestration.feed import object_store_bytes, rank_resources
from orchestration.metrics import Metrics, observe_alarms, observe_not_finite, observe_step
from orchestration.metrics_endpoint import endpoint, forget_targets
from orchestration.pretrain_rank import Control, ControlState, RankSettings, run_rank
from orchestration.progress import Progress
from shards.errors import UserError
from trainer.feeding import most_makers, own_cpus

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.prepare import Prepared

POLL_SECONDS = 0.25
BATCH_NORM_WARNING = (
    "each rank normalises its own images, so with another number of ranks the losses move; "
    "model.sync_batchnorm=global keeps them"
)
STOP_TIMEOUT_SECONDS = 280.0  # below the stop time that `medswav submit` asks of Ray


@dataclass(frozen=True)
class PretrainResult:
    """`step`: optimizer steps done. `finished`: all of max_steps. `restarts`: of the ranks, in this call."""

    step: int
    finished: bool
    restarts: int
    seconds: float

    @property
    def exit_code(self) -> int:
        return 0 if self.finished else 130


class TrainingFailedError(JobFailedError):
    """The ranks failed again and again without getting on, or a loss is not finite."""


def pretrain(
    config: "TrainConfig",
    run_dir: Path,
    workers: int = 2,
    feeders: int | None = 1,
    *,
    overflow: int = 0,
    fewest: int | None = None,
    resize_seconds: float = RESIZE_SECONDS,
    address: str | None = None,
    gpu: bool | None = None,
    max_failures: int = 3,
    metrics_port: int = 0,
    metrics_host: str = "127.0.0.1",
    verbose: bool = False,
    stream: TextIO | None = None,
) -> PretrainResult:
    """Train to config.max_steps on `workers` ranks with `feeders` augmentation actors each (None: as many as
    the rates of the first steps ask for), and `overflow` more each on other nodes without GPU.

    Everything is written below run_dir, which all nodes must see. fewest: then as few ranks as that are
    enough, and there are as many of them, up to `workers`, as find a place, looked for every resize_seconds.
    max_failures: restarts in a row without a step gained. Raises UserError (configuration, disk),
    TrainingFailedError.
    """
    from trainer.config import check_device, few_samples_warning

    if overflow and wanted_address(address) is None:
        raise UserError("--overflow-feeders are for the other nodes of a cluster: name it with --address")
    say = _printer(stream)
    run_dir, config = run_dir.absolute(), with_absolute_weights(config)
    began = time.monotonic()
    with StopFlag() as stop:  # from here on a signal ends with 130
        try:
            ranks = possible_ranks(config, fewest or workers, workers)
            prepared = check(config, run_dir, ranks.most, say, stop, stream)
        except _StoppedError:
            return PretrainResult(newest_checkpoint(run_dir), False, 0, time.monotonic() - began)
        if is_complete(config, run_dir, prepared):
            forget_targets(run_dir, "pretrain")
            say(f"pretrain: nothing to do, the run is complete at step {config.max_steps}")
            return PretrainResult(config.max_steps, True, 0, 0.0)
        if warning := few_samples_warning(config):
            say(f"pretrain: {warning}")
        start = feeders or 1
        cpus = ranks.most * (1 + start) + 1
        if feeders is None:
            cpus = max(cpus, own_cpus())
        most = feeders or most_makers(cpus, ranks.most)
        store = object_store_bytes(config, ranks.most, most, OBJECT_STORE_BYTES)
        metrics = Metrics("train")
        with (
            connected(address, cpus=cpus, object_store_bytes=store, verbose=verbose) as cluster,
            endpoint(metrics, run_dir, "pretrain", metrics_port, metrics_host) as url,
        ):
            use_gpu = choose_gpu(gpu, ranks.fewest)
            check_device(config, "cuda" if use_gpu else "cpu")
            device = "GPU" if use_gpu else "CPU"
            shown = f"{start} augmentation actors each{', more as needed' * (feeders is None)}"
            say(f"pretrain: {ranks.text()} ranks on {device}, {shown}; metrics at {url}")
            if ranks.elastic and config.model.sync_batchnorm != "global":
                say(f"pretrain: {BATCH_NORM_WARNING}")
            needed = ranks.fewest * (1 + start)
            if not cluster.local and cluster.cpus < needed:
                say(
                    f"pretrain: the cluster has {cluster.cpus} CPUs, the job wants {needed}: waiting for more"
                )
            job = _Job(config, run_dir, metrics, max_failures, stop, say, stream)
            step, finished, restarts = job.run(ranks, feeders, overflow, prepared, use_gpu, resize_seconds)
    return PretrainResult(step, finished, restarts, time.monotonic() - began)


class _StoppedError(Exception):
    """A signal came before anything started."""


def check(
    config: "TrainConfig",
    run_dir: Path,
    workers: int,
    say: Callable[[str], None],
    stop: StopFlag,
    stream: TextIO | None = None,
) -> "Prepared":
    """Refuse what can be refused before anything starts; fit the band statistics, once.

    Raises UserError, _StoppedError as soon as `stop` is set.
    """
    from trainer.batches import BatchMaker
    from trainer.config import check_world
    from trainer.prepare import dataset_fingerprint, needs_fit, prepare

    check_world(config, workers)
    if not config.data.dataset:
        raise UserError("data.dataset is not set: name the folder of the dataset, data.dataset=FOLDER")
    dataset_fingerprint(config.data.dataset)  # is it one?
    shown: Any = contextlib.nullcontext()
    if needs_fit(config, run_dir):
        say("pretrain: fitting the band statistics")
        shown = Progress("band statistics", 0, "images", stream=stream)
    with shown as progress:

        def look(done: int, total: int) -> None:
            if stop:
                raise _StoppedError
            progress.total = total
            progress.update(done)

        prepared = prepare(config, run_dir, look)
    maker = BatchMaker(config, 0, workers, prepared.bands, prepared.dataset_fingerprint, prepared.labels)
    _ = maker.counts  # every modality has images
    if newest_checkpoint(run_dir) == 0:
        check_network(config, say)
    if stop:
        raise _StoppedError
    return prepared


def with_absolute_weights(config: "TrainConfig") -> "TrainConfig":
    """The ranks may have another working folder: a file of initial weights gets its whole path."""
    given = config.model.init_weights
    if given is None or given.startswith("torchvision:"):
        return config
    model = config.model.model_copy(update={"init_weights": str(Path(given).absolute())})
    return config.model_copy(update={"model": model})


def check_network(config: "TrainConfig", say: Callable[[str], None]) -> None:
    """A network that is not ours, and weights to begin with, are tried before any rank starts. Raises
    UserError."""
    if config.model.init_weights is None and ":" not in config.model.backbone:
        return  # and no torch is imported
    from trainer.models.initial import check_model

    for line in check_model(config):
        say(f"pretrain: {line}")


def is_complete(config: "TrainConfig", run_dir: Path, prepared: "Prepared") -> bool:
    """Nothing is left to do in a run folder. Raises UserError when it holds another run."""
    if not any((run_dir / "checkpoints").glob("step-*")):
        return False  # and no torch is imported
    from trainer import checkpoint

    found = checkpoint.newest(run_dir)
    if found is None:
        return False
    checkpoint.check_same_run(
        found.state, config, prepared.dataset_fingerprint, prepared.bands_digest, prepared.labels
    )
    return found.step >= config.max_steps and (run_dir / "encoder.safetensors").is_file()


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest checkpoint by name, 0 where there is none; without torch."""
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def choose_gpu(gpu: bool | None, workers: int) -> bool:
    """A GPU a rank where the cluster has them; `gpu` decides otherwise. Raises UserError for too few."""
    import ray

    available = int(ray.cluster_resources().get("GPU", 0))
    if gpu is False or (gpu is None and available == 0):
        return False
    if available < workers:
        raise UserError(
            f"{workers} ranks want a GPU each and the cluster has {available}: use fewer --ranks, or --cpu"
        )
    return True


class _Job:
    """The driver's side of one run: starts Ray Train in a thread, books what the ranks tell."""

    def __init__(
        self,
        config: "TrainConfig",
        run_dir: Path,
        metrics: Metrics,
        max_failures: int,
        stop: StopFlag,
        say: Callable[[str], None],
        stream: TextIO | None,
    ) -> None:
        self._config, self._run_dir, self._metrics, self._stop = config, run_dir, metrics, stop
        self._max_failures, self._say, self._stream = max_failures, say, stream
        from trainer.alarms import watch_of

        self._watch = watch_of(run_dir, config)  # reads along: what rank 0 writes to alarms.jsonl
        self._began = False  # a rank has asked for a batch
        self._restarts = 0
        self._fruitless, self._saved = 0, 0  # failures since the newest checkpoint, and its step
        self._last: dict[str, float] = {}
        self._failure: BaseException | None = None

    def run(
        self,
        ranks: Ranks,
        feeders: int | None,
        overflow: int,
        prepared: "Prepared",
        use_gpu: bool,
        resize_seconds: float,
    ) -> tuple[int, bool, int]:
        """(step, finished, restarts)."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # With the driver, not on a node whose death would end the job.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        control: Any = ray.remote(Control).options(num_cpus=0, scheduling_strategy=here).remote()
        settings = RankSettings(
            self._config.model_dump_json(),
            str(self._run_dir),
            feeders,
            overflow,
            prepared.bands,
            prepared.dataset_fingerprint,
            prepared.labels,
            control,
        )
        given = (settings, control, ranks, use_gpu, resize_seconds)
        thread = threading.Thread(target=self._fit, args=given, name="ray-train", daemon=True)
        thread.start()
        with Progress("pretrain", self._config.max_steps, "steps", stream=self._stream) as progress:
            result = self._follow(control, thread, progress)
        return int(result["step"]), bool(result["finished"]), self._restarts

    def _follow(self, control: Any, thread: threading.Thread, progress: Progress) -> dict[str, Any]:
        """Book what comes until the ranks end; hand a stop on to them."""
        asked_at = None
        while True:
            alive = thread.is_alive()  # before the look, so that the last words are not missed
            state = _drain(control)
            self._book(state, progress)
            if not alive:
                break
            if self._stop and asked_at is None:
                asked_at = time.monotonic()
                control.request_stop.remote()
                if not self._began:  # nothing to save: the newest checkpoint is where it stands
                    return {"step": newest_checkpoint(self._run_dir), "finished": False}
                self._say("pretrain: stopping after this step; a checkpoint is saved (again: stop at once)")
            if asked_at is not None and time.monotonic() - asked_at > STOP_TIMEOUT_SECONDS:
                raise TrainingFailedError("the ranks did not stop in time; the last checkpoint stands")
            thread.join(POLL_SECONDS)
        if state.result is None:
            raise TrainingFailedError(state.error or _short(self._failure))
        return state.result

    def _fit(
        self, settings: RankSettings, control: Any, ranks: Ranks, use_gpu: bool, resize_seconds: float
    ) -> None:
        import ray
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

        threads = {**THREAD_ENV, "OMP_NUM_THREADS": str(self._config.threads)}
        run_config: Any = RunConfig(
            name="train",  # of an empty folder: what we save does not go through Ray
            storage_path=str(self._run_dir / "ray"),
            failure_config=FailureConfig(max_failures=-1),  # the driver counts: it sees the checkpoints
            callbacks=[_failure_callback(control)],
            worker_runtime_env={"env_vars": threads},
            logging_config=LoggingConfig(log_level="ERROR"),
        )
        arguments: dict[str, Any] = {
            "train_loop_per_worker": run_rank,
            "train_loop_config": {"rank": settings},
            "torch_config": TorchConfig(backend="nccl" if use_gpu else "gloo"),
            "scaling_config": ScalingConfig(
                num_workers=(ranks.fewest, ranks.most) if ranks.elastic else ranks.most,
                use_gpu=use_gpu,
                resources_per_worker=rank_resources(settings.feeders or 1, use_gpu),
                elastic_resize_monitor_interval_s=resize_seconds,
            ),
            "run_config": run_config,
        }
        try:
            fixed = not ranks.elastic
            trainer = TorchTrainer(**arguments) if fixed else elastic_trainer(ranks, control, **arguments)
            trainer.fit()
        except (ray.exceptions.RayError, ray.train.TrainingFailedError, RuntimeError) as error:
            self._failure = error

    def _book(self, state: ControlState, progress: Progress) -> None:
        """Metrics, progress and the failures without headway. Raises UserError, TrainingFailedError."""
        if state.user_error is not None:
            raise UserError(state.user_error)
        if state.fatal is not None:
            observe_not_finite(self._metrics)
            raise TrainingFailedError(state.fatal)
        for _ in range(state.failures):
            self._count_failure(state.error)
        self._metrics.look_at_disk(self._run_dir)
        for start, world in state.starts:
            self._metrics.set("medswav_train_ranks", world)
            if self._began or start:
                self._say(f"pretrain: {world} ranks go on from step {start}")
            if not self._began:
                self._began = True
                progress.restart(start)
        for note in state.notes:
            self._say(f"pretrain: {note}")
        for step in state.steps:
            observe_step(self._metrics, step)
            self._metrics.set("medswav_train_steps_remaining", self._config.max_steps - 1 - step["step"])
            for event in self._watch.add(step):
                self._say(f"pretrain: {event.text()}")
            observe_alarms(self._metrics, self._watch)
            if step.get("checkpoint_failures", 0) > self._last.get("checkpoint_failures", 0):
                self._say("pretrain: WARNING: a checkpoint was NOT saved, the disk is full: free some space")
            self._last = step
        if state.steps:
            progress.update(int(self._last["step"]) + 1, _note(self._last))
            pointer = self._run_dir / "checkpoints" / "LATEST"
            with contextlib.suppress(FileNotFoundError):
                saved = pointer.stat().st_mtime
                self._metrics.set("medswav_train_checkpoint_timestamp_seconds", saved)

    def _count_failure(self, error: str | None) -> None:
        newest = newest_checkpoint(self._run_dir)
        self._fruitless = 1 if newest > self._saved else self._fruitless + 1
        self._saved = newest
        self._restarts += 1
        self._metrics.add("medswav_train_restarts_total")
        if 0 <= self._max_failures < self._fruitless:
            why = error or "a rank was killed"
            raise TrainingFailedError(
                f"the ranks failed {self._fruitless} times without a new checkpoint: {why}"
            )
        self._say(f"pretrain: a rank failed ({error or 'killed'}); starting the ranks again")


def _drain(control: Any) -> ControlState:
    import ray

    try:
        state: ControlState = ray.get(control.drain.remote(), timeout=60)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise TrainingFailedError(
            f"the Ray cluster does not answer ({type(error).__name__}); the same command continues"
        ) from None
    return state


def _failure_callback(control: Any) -> Any:
    """Tells the mailbox of each failure of the ranks; it runs in Ray Train's controller."""
    from ray.train import UserCallback

    class TellFailure(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            kinds = sorted({type(error).__name__ for error in worker_exceptions.values()})
            control.tell.remote("failure", ", ".join(kinds))

    return TellFailure()


def _note(step: Mapping[str, float]) -> str:
    wait, seconds = step.get("wait_seconds", 0.0), step.get("step_seconds", 0.0)
    share = f", data wait {100 * wait / seconds:.0f} %" if seconds else ""
    if "loss_minus_chance" in step:  # of method=simclr
        return f"loss - chance {step['loss_minus_chance']:+.3f}{share}"
    return f"loss - ln K {step.get('loss_minus_ln_k', float('nan')):+.3f}{share}"


def _short(error: BaseException | None) -> str:
    if error is None:
        return "the ranks ended without a result"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _printer(stream: TextIO | None) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(text, file=stream or sys.stderr, flush=True)

    return say
