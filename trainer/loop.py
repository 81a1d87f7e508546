"""The training loop: (config, step, checkpoint) is all the state there is.

`train` is the same under torchrun, under Ray Train and in a test. Every source of randomness is a function of
(seed, sample, pass, crop), the learning rate one of the step, so a run that was interrupted anywhere gives
the same losses, exactly on a CPU, as one that was not.
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer import alarms, attempts, checkpoint, files, journal, run_state
from trainer.attempts import Attempt
from trainer.build import build_model
from trainer.compute import fixed_compute, prepare_network, scheduled_collection, upload
from trainer.config import TrainConfig, check_device, check_world, few_samples_warning
from trainer.distributed import from_rank_zero, tensors_from_rank_zero
from trainer.export import encoder_info, save_encoder
from trainer.export_heads import HEADS_FILE, save_heads
from trainer.labels import LabelSet
from trainer.meter import Meter, OnMetrics, not_finite
from trainer.models.initial import load_initial
from trainer.online import Online, load_labelled
from trainer.optim import build_optimizer
from trainer.precision import Precision, build_precision
from trainer.saver import Saver
from trainer.step import is_logged, train_step, unwrap
from trainer.swav.diagnostics import PrototypeUse, queue_diagnostics
from trainer.swav.queue import FeatureQueue, build_queue
from trainer.trackers import check_trackers

if TYPE_CHECKING:
    from trainer.batches import Batch

log = logging.getLogger(__name__)
NextBatch = Callable[[int], "Batch"]


@dataclass(frozen=True)
class TrainResult:
    """`step`: optimizer steps done so far; `losses`: of the steps of this call, from `started_at` on."""

    step: int
    finished: bool
    started_at: int
    losses: list[float] = field(default_factory=list)
    was_complete: bool = False
    encoder: Path | None = None


@dataclass(frozen=True)
class Run:
    """What does not change during a run."""

    config: TrainConfig
    folder: Path
    dataset_fingerprint: str
    rank: int
    world: int
    device: torch.device
    bands_digest: str | None = None
    labels: tuple[LabelSet, ...] = ()


@dataclass
class TrainState:
    """What a checkpoint holds, beside the step."""

    model: nn.Module
    optimizer: Optimizer
    queue: FeatureQueue | None
    use: PrototypeUse
    precision: Precision


def train(
    config: TrainConfig,
    next_batch: NextBatch,
    run_dir: Path,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    dataset_fingerprint: str,
    bands_digest: str | None = None,
    labels: Sequence[LabelSet] = (),
    on_metrics: OnMetrics | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train from the newest checkpoint of `run_dir` that verifies to `config.max_steps`.

    next_batch(step) gives this rank's part of that step's batch; steps are asked for in rising order. With
    world > 1 torch.distributed is initialised. on_metrics is called on every rank, on logged steps, with
    floats (`samples`: global images since the last call; seconds: means per step since then). When
    should_stop() is true on any rank, all ranks stop after the same step, with a checkpoint. Rank 0 writes
    metrics.jsonl, timing.jsonl, run.json, alarms.jsonl (where there are any), checkpoints/ and, at the end,
    encoder.safetensors.
    bands_digest: of the band statistics that the batches are made with; labels: those of supervision.labels;
    one run keeps to them. Raises UserError for a run folder of another run and when another attempt has
    begun, NotFiniteError.
    """
    check_world(config, world)
    check_device(config, torch.device(device).type)
    check_trackers(config.trackers)
    if [one.name for one in labels] != [one.name for one in config.supervision.labels]:
        raise ValueError("labels are not those of supervision.labels")
    device = torch.device(device)
    run = Run(config, Path(run_dir), dataset_fingerprint, rank, world, device, bands_digest, tuple(labels))
    with fixed_compute(device, config.threads), ExitStack() as stack:
        state = build_state(run)
        start, attempt = resume(run, state)
        step = start
        meter = Meter(config, attempt, rank, world, run.device, on_metrics, start)
        told = stack.enter_context(telling(run, attempt, start))
        stack.callback(meter.close)
        online = open_online(run) if start < config.max_steps else None
        stopping = False
        collect = stack.enter_context(scheduled_collection(config.gc_every_steps))
        while step < config.max_steps and not stopping:
            with meter.waiting():
                batch = next_batch(step)
            crops = to_device(run, batch)
            metrics = train_step(
                state.model,
                state.optimizer,
                state.queue,
                crops,
                step,
                config,
                precision=state.precision,
                sizes=batch.sizes if config.swav.groups == "per-modality" else None,
                labels=labels_to_device(run, batch),
            )
            if is_logged(step, config):
                metrics = of_last_steps(run, state, metrics)
            if online is not None and online.is_due(step):
                metrics |= online.evaluate(unwrap(state.model).backbone)
            meter.add(step, metrics, batch.seconds)
            if meter.saver is not None:
                meter.saver.check()
            step += 1
            told.step = step
            saving = step % config.checkpoint.every_steps == 0 or step == config.max_steps
            if saving or meter.is_due(step):
                stopping = meter.settle(should_stop is not None and should_stop())
            if saving or stopping:
                last = stopping or step == config.max_steps
                save(run, state, step, meter.saver, last=last)
            collect(step)
        finished = step >= config.max_steps
        was_complete = start >= config.max_steps
        encoder = export(run, state, step, attempt, again=not was_complete) if finished else None
        told.finished = finished
    return TrainResult(step, finished, start, meter.losses, was_complete=was_complete, encoder=encoder)


def build_state(run: Run) -> TrainState:
    """Model, optimizer and queue before the first step: a function of config.seed."""
    config = run.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_model(config, run.labels)
    prepare_network(network, config.model, run.device, run.world)
    optimizer = build_optimizer(network, config.optim)
    model = network if run.world == 1 else in_parallel(network, run.device)
    precision = build_precision(config.precision, run.device)
    return TrainState(model, optimizer, build_queue(config, run.device), PrototypeUse(), precision)


def in_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Gradients averaged over the ranks."""
    on_gpu = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor: torch >= 2.13
        return DistributedDataParallel(
            model,
            device_ids=[device] if on_gpu else None,
            # Running batch statistics play no part in training; rank 0's are saved. Gradients are summed in
            # buckets whose layout DDP changes after its first step, unless it looks for unused parameters:
            # with three ranks or more that would move the last bits of the step after a resume.
            broadcast_buffers=False,
            find_unused_parameters=not on_gpu,
        )


def resume(run: Run, state: TrainState) -> tuple[int, Attempt]:
    """Load the newest good checkpoint into `state`; the number of steps that are done, and this attempt.

    Rank 0 decides.
    """

    found: list[checkpoint.Checkpoint] = []

    def decide() -> dict[str, Any]:
        found[:] = newest(run)  # a command that is refused must not stop the attempt that is at work
        with files.disk_full_is_clear("starting the run"):
            attempt = attempts.begin(run.folder)
        checkpoint.sweep(run.folder)
        if checkpoint.list_steps(run.folder)[-1:] != [one.step for one in found]:
            found[:] = newest(run)  # again: now nobody else adds one
        step = found[0].step if found else 0
        if step < run.config.max_steps and (warning := few_samples_warning(run.config)):
            log.warning("%s", warning)
        with files.disk_full_is_clear("starting the run"):
            attempt.begin_from(step)
        journal.truncate(journal.journal_path(run.folder), step)
        for path in (alarms.alarms_path(run.folder), run_state.timing_path(run.folder)):
            if path.is_file():
                journal.truncate(path, step)
        return {"step": step, "attempt": attempt.number}

    answer = from_rank_zero(decide, rank=run.rank, world=run.world, device=run.device)
    step = int(answer["step"])
    if step == 0:
        begin_with_weights(run, state)
    if step > 0:
        # Rank 0's bytes, which it has verified: what another rank would find on a parallel file system may
        # not be there yet, or no more.
        read = found[0].tensors if found else {}
        tensors = tensors_from_rank_zero(read, rank=run.rank, world=run.world, device=run.device)
        restore(run, state, checkpoint.Checkpoint(step, tensors, {}))
    return step, Attempt(run.folder, int(answer["attempt"]))


def telling(run: Run, attempt: Attempt, start: int) -> AbstractContextManager[run_state.Told]:
    """run.json of rank 0, of an attempt that has something to do."""
    if run.rank or start >= run.config.max_steps:
        return nullcontext(run_state.Told())
    config, device = run.config.model_dump(mode="json"), run.device.type
    about = (attempt.number, start, run.world, device, run.dataset_fingerprint, config)
    return run_state.telling(attempt, run_state.of_this_process(*about))


def restore(run: Run, state: TrainState, found: checkpoint.Checkpoint) -> None:
    restore_model(unwrap(state.model), found.part("model"))
    checkpoint.restore_optimizer(state.optimizer, found.part("optimizer"))
    if state.queue is not None:
        state.queue.load_state_dict(found.part("queue"))
    state.use.load_state_dict(found.part("use"), run.device)
    state.precision.load_state(found.part("precision"))


def begin_with_weights(run: Run, state: TrainState) -> None:
    """model.init_weights into the backbone; rank 0 writes what was loaded to RUN/initial_weights.json."""
    found = load_initial(unwrap(state.model).backbone, run.config.model)
    if found is not None and run.rank == 0:
        with files.disk_full_is_clear("starting the run"):
            files.replace_file(
                run.folder / "initial_weights.json", json.dumps(asdict(found), indent=1).encode()
            )


def newest(run: Run) -> list[checkpoint.Checkpoint]:
    """The newest checkpoint that verifies, or nothing. Raises UserError for another run."""
    found = checkpoint.newest(run.folder)
    if found is None:
        return []
    checkpoint.check_same_run(found.state, run.config, run.dataset_fingerprint, run.bands_digest, run.labels)
    return [found]


@torch.no_grad()
def restore_model(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Strict, and to the last bit: prototypes normalise themselves after a load, and again in the forward,
    which would be once more than in a run that was not interrupted."""
    model.load_state_dict(saved)
    for name, value in model.state_dict().items():
        value.copy_(saved[name])


def save(run: Run, state: TrainState, step: int, saver: Saver | None, *, last: bool) -> None:
    """Rank 0, which has the saver, saves checkpoint `step`; `last`: and waits until it is there.

    Raises NotFiniteError, on every rank, before a bad weight is saved.
    """
    model = unwrap(state.model)
    good = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    if not bool(good):
        if saver is not None:
            saver.wait()  # the message names the last good checkpoint
        raise not_finite("a weight", step - 1, run.folder)
    if saver is None:
        return
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    optimizer = checkpoint.optimizer_tensors(state.optimizer)
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    if state.queue is not None:
        tensors |= {f"queue.{name}": value for name, value in state.queue.state_dict().items()}
    tensors |= {f"use.{name}": value for name, value in state.use.state_dict().items()}
    tensors |= {f"precision.{name}": value for name, value in state.precision.state().items()}
    about = {
        "config": run.config.model_dump(mode="json"),
        "dataset_fingerprint": run.dataset_fingerprint,
        "bands_digest": run.bands_digest,
        "labels": [asdict(one) for one in run.labels],
        "world": run.world,
        "torch": torch.__version__,
    }
    saver.save(step, tensors, about, last=last)


def export(run: Run, state: TrainState, step: int, attempt: Attempt, *, again: bool) -> Path:
    """Rank 0 writes RUN/encoder.safetensors, and heads.safetensors where there are labels (`again`: even if
    they are there); all ranks return when they are."""
    path = run.folder / "encoder.safetensors"

    def write() -> dict[str, Any]:
        attempt.check()
        if again or not path.is_file():
            info = encoder_info(run.config, step, run.dataset_fingerprint)
            core = unwrap(state.model)
            if run.labels:
                save_heads(run.folder / HEADS_FILE, core, run.labels, info)
            save_encoder(path, core.backbone, info)
        return {}

    from_rank_zero(write, rank=run.rank, world=run.world, device=run.device)
    return path


def of_last_steps(run: Run, state: TrainState, metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a logged step, with what it alone does not show: use of prototypes, age of the queue."""
    config = run.config
    images = config.data.batch_size // len(config.groups)
    metrics = state.use.replace(metrics, images * config.views.n_crops)
    queue = queue_diagnostics(state.queue, images)
    return metrics | {f"m/{group}/{name}": value for group in config.groups for name, value in queue.items()}


def open_online(run: Run) -> Online | None:
    """Rank 0 evaluates, and the others wait for it in the next step. Raises UserError, on every rank."""
    opened: list[Online] = []

    def load() -> dict[str, Any]:
        opened.append(Online(run.config, load_labelled(run.config), run.device))
        return {}

    if run.config.online.labels:
        from_rank_zero(load, rank=run.rank, world=run.world, device=run.device)
    return opened[0] if opened else None


def to_device(run: Run, batch: "Batch") -> list[Tensor]:
    """A batch's crops, each uint8 [count, n, C, *crop shape], on the device. Raises ValueError for others."""
    config = run.config
    n = config.data.batch_size // run.world
    expected = config.views.stack_shapes(n)
    if [crop.shape for crop in batch.crops] != expected or batch.modalities != config.data.modalities:
        raise ValueError(f"batch {batch.step} is not as configured: {[c.shape for c in batch.crops]}")
    crops = []
    for array in batch.crops:
        crop = upload(array, run.device)
        spatial = [-1] * (crop.ndim - 2)
        crops.append(crop.unsqueeze(2).expand(-1, -1, config.model.in_channels, *spatial))
    return crops


def labels_to_device(run: Run, batch: "Batch") -> dict[str, Tensor]:
    """A batch's labels. Raises ValueError where they are of other sets."""
    if list(batch.labels) != [one.name for one in run.labels]:
        raise ValueError(f"batch {batch.step} has the labels {list(batch.labels)}")
    return {name: upload(values, run.device) for name, values in batch.labels.items()}
