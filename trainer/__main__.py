"""Pretraining without Ray: `python -m trainer`, or on several ranks

    torchrun --nproc-per-node 2 -m trainer --preset demo --set data.dataset=DATASET --run-dir RUN

The same command again continues the run. Exit code: 0 finished, 1 failed, 2 a mistake in the settings (one
line says what to change), 130 stopped by SIGTERM or Ctrl-C with a checkpoint saved.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from trainer.config import TrainConfig, check_device, check_world, load_config
from trainer.feeding import parse_count

if TYPE_CHECKING:  # imported where it is needed: a mistake in the settings is told at once
    import torch

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        config = load_config(options.preset, options.set)
        if options.explain:
            from trainer.explain_text import explained

            if os.environ.get("RANK", "0") == "0":
                print(explained(config, options.ranks or world, options.preset, as_json=options.json))
            return 0
        check_world(config, world)
    except UserError as error:
        return _mistake(error, first_only=True)  # every rank sees the same
    return run(config, Path(options.run_dir), workers=options.workers, device_name=options.device)


def run(config: TrainConfig, run_dir: Path, *, workers: int | None, device_name: str) -> int:
    """Train to the end or to a signal; the exit code. workers: None for as many as the rates ask for."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice on find_unused_parameters
    import torch

    from trainer.checkpoint import list_steps
    from trainer.distributed import ReportedError, from_rank_zero, process_group
    from trainer.labels import from_json
    from trainer.loop import train
    from trainer.meter import NotFiniteError
    from trainer.models.initial import check_model
    from trainer.prepare import bands_digest, load_bands, prepare
    from trainer.workers import make_batches

    def show(metrics: dict[str, float]) -> None:
        print(progress_line(metrics, config.max_steps), file=sys.stderr, flush=True)

    try:
        device = _device(device_name)
        check_device(config, device.type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with stop_flag() as stop, process_group(device) as (rank, world):

            def identify() -> dict[str, Any]:
                if not list_steps(run_dir):
                    for line in check_model(config):
                        print(line, file=sys.stderr)
                try:
                    found = prepare(config, run_dir, stop.look)
                except StoppedError:
                    return {"dataset": None, "labels": []}
                return {"dataset": found.dataset_fingerprint, "labels": [asdict(s) for s in found.labels]}

            answer = from_rank_zero(identify, rank=rank, world=world, device=device)
            dataset, labels = answer["dataset"], from_json(answer["labels"])
            if dataset is None:
                print("stopped before the first step: the same command continues", file=sys.stderr)
                return INTERRUPTED
            bands = load_bands(config, run_dir)
            factory = partial(make_batches, fingerprint=dataset, labels=labels)
            feed = _feed(config, rank, world, bands, workers, factory, device)
            with feed as next_batch:
                result = train(
                    config,
                    next_batch,
                    run_dir,
                    rank=rank,
                    world=world,
                    device=device,
                    dataset_fingerprint=dataset,
                    bands_digest=bands_digest(bands),
                    labels=labels,
                    on_metrics=show if rank == 0 else None,
                    should_stop=lambda: stop.is_set,
                )
    except ReportedError:
        return UserError.exit_code
    except UserError as error:
        return _mistake(error)
    except NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if rank == 0:
        _tell(result.step, result.finished, result.was_complete, run_dir)
    return 0 if result.finished else INTERRUPTED


def _feed(
    config: TrainConfig,
    rank: int,
    world: int,
    bands: Any,
    workers: int | None,
    factory: Callable[..., Any],
    device: "torch.device",
) -> Any:
    """The source of batches of a rank, as a context: from processes, or from this one (workers=0)."""
    from trainer.compute import host_arrays, step_clock
    from trainer.feeding import Ahead, Pace, most_makers, own_cpus
    from trainer.workers import BatchWorkers

    if workers == 0:
        return nullcontext(factory(config, rank, world, bands))

    def say(text: str) -> None:
        if rank == 0:
            print(f"workers of rank 0: {text}", file=sys.stderr, flush=True)

    processes = BatchWorkers(
        config,
        rank,
        world,
        bands,
        workers=workers or 1,
        stop=config.max_steps,
        factory=factory,
        allocate=host_arrays(device),
        say=say,
    )
    most = most_makers(own_cpus(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    pace = None if workers is not None else Pace(most, say, step_clock(device))
    return Ahead(processes, config.max_steps, pace)


class StoppedError(Exception):
    """A signal came before the first step: there is nothing to save."""


class StopFlag:
    is_set = False

    def look(self, done: int, total: int) -> None:
        """For the fit of the band statistics, which is the long part of the start. Raises StoppedError."""
        if self.is_set:
            raise StoppedError


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Set by SIGTERM or Ctrl-C. More of them change nothing: after Ctrl-C torchrun sends its ranks one more,
    and a checkpoint must not die of it (SIGQUIT ends the process at once)."""
    flag = StopFlag()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, _: object) -> None:
        flag.is_set = True

    for number in signals:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_line(metrics: dict[str, float], max_steps: int) -> str:
    """One line a logged step, with the time that is left at the speed of the last steps."""
    step, seconds = int(metrics["step"]) + 1, metrics["step_seconds"]
    left = round((max_steps - step) * seconds)
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    names = {"loss_minus_ln_k": "minus ln K", "loss_minus_chance": "minus chance"}
    below = "".join(f"{text} {metrics[name]:+.4f}  " for name, text in names.items() if name in metrics)
    return (
        f"step {step}/{max_steps}  loss {metrics['loss']:.4f}  {below}"
        f"{seconds:.3f} s/step ({metrics['wait_seconds']:.3f} s waiting)  {clock} left"
    )


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no GPU can be used here: leave --device away, or use --device cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _tell(step: int, finished: bool, was_complete: bool, run_dir: Path) -> None:
    encoder = run_dir / "encoder.safetensors"
    if was_complete:
        print(f"nothing to do: the run was complete at step {step}; the encoder is {encoder}")
    elif finished:
        print(f"finished {step} steps; the encoder is {encoder}")
    else:
        print(f"stopped at step {step}, checkpoint saved: the same command continues")


def _mistake(error: UserError, *, first_only: bool = False) -> int:
    if not first_only or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer", description="Multi-modality SwAV pretraining.")
    parser.add_argument("--preset", required=True, help="a preset's name or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="change a setting")
    parser.add_argument("--run-dir", help="folder of checkpoints, metrics and the encoder")
    parser.add_argument("--workers", default="auto", help="batch processes of each rank; 0: none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--explain", action="store_true", help="only print what follows from the settings")
    parser.add_argument("--json", action="store_true", help="with --explain: as JSON")
    parser.add_argument("--ranks", type=int, help="with --explain: as if on so many ranks")
    options = parser.parse_args(arguments)
    if options.ranks is not None and options.ranks < 1:
        parser.error("--ranks must be 1 or more")
    if not options.explain and (options.json or options.ranks is not None):
        parser.error("--json and --ranks go with --explain")
    if not options.explain and options.run_dir is None:
        parser.error("--run-dir is needed")
    try:
        options.workers = parse_count(options.workers, "--workers", at_least=0)
    except UserError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
