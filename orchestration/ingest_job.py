"""`ingest run`: one Ray task per unit of work around ingest.convert.run_unit, a bounded window of them.

A unit is a pure function of its inputs and the configuration, and its commit is exactly-once, so a killed
worker, a killed driver or a second run of the same command change nothing. Nothing that names a source
leaves a worker: reason codes, counts and seconds only.
"""

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestration import keys, leases, path_map
from orchestration.cluster import StopFlag, connected, pin_threads, process_folder, runtime_env
from orchestration.dedupe_job import leave_out
from orchestration.ingest_summary import IngestSummary, summary_lines
from orchestration.inventory_job import take_inventory
from orchestration.metrics import Metrics
from orchestration.metrics_endpoint import endpoint, forget_targets
from orchestration.progress import Progress
from shards.errors import UserError
from shards.objects import is_url, location

if TYPE_CHECKING:
    from ingest.config import IngestConfig
    from ingest.convert import UnitResult
    from ingest.plan import Unit
    from ingest.planner import StoredUnits

WINDOW_PER_WORKER = 2  # units in flight: one that runs, one that waits; a killed driver loses no more
RETRIES = 3  # of a unit whose worker died
FAILED_REASONS = ("crashed", "decode_failed", "unreadable")  # what the failure budget counts
SWEEP_AGE_SECONDS = 3600.0  # no commit takes that long: what is older has no writer
POLL_SECONDS = 0.5
CANCEL_SECONDS = 3.0


def run_ingest(
    config: "IngestConfig",
    *,
    workers: int | None = None,
    address: str | None = None,
    metrics_port: int = 0,
    metrics_host: str = "127.0.0.1",
    verbose: bool = False,
    stream: TextIO | None = None,
    planned: "Planned | None" = None,
) -> IngestSummary:
    """Plan, convert what is not yet committed, sum up. Prints progress and the summary to `stream` (stderr).

    workers: units at a time, default one a CPU. planned: what makes the job, by default plan_job. Raises
    UserError, and KeyboardInterrupt for a signal before or behind the units: nothing committed is ever lost.
    """
    say = _printer(stream)
    began = time.monotonic()
    with StopFlag() as stop, _private_folder() as scratch:
        with stop.at_once():  # the sources may take hours; a plan that is killed is made again
            job = (planned or plan_job)(config, stream, scratch, workers)
        units = len(job.units) + len(job.done) + job.waiting
        summary = IngestSummary(units=units, already=len(job.done), waiting=job.waiting, absent=job.absent)
        folder = None if is_url(config.output) else Path(config.output)
        if job.units and not stop:
            count = workers or os.cpu_count() or 1
            metrics, name = Metrics("ingest"), location(config.output)
            with (
                connected(address, cpus=count, verbose=verbose) as cluster,
                endpoint(metrics, folder, "ingest", metrics_port, metrics_host, name) as url,
            ):
                say(f"ingest: {len(job.units)} units on {count} workers; metrics at {url}")
                convert = _Conversion(job, config, cluster.folder, metrics, summary, folder)
                convert.run(count if workers or cluster.local else max(count, cluster.cpus), stop, stream)
        elif not job.units and not job.waiting:
            forget_targets(folder, "ingest", location(config.output))
            say(job.nothing)
        summary.interrupted = bool(stop) and summary.committed + summary.already < summary.units - job.waiting
    with StopFlag() as stop, stop.at_once():  # what follows is made again by the next run
        if not summary.interrupted:
            summary.excluded = leave_out(job.store, stream).reasons()
        _sum_up(summary, job, config)
        if not summary.interrupted and summary.total:
            _join_labels(job, config, say)
    summary.seconds = time.monotonic() - began
    for line in summary_lines(summary, config):
        say(line)
    return summary


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Mode 0700, gone at the end; after a kill, with the next command of ours (process_folder)."""
    from ingest.inventory import forget_parts

    folder = Path(tempfile.mkdtemp(prefix="plan-", dir=process_folder()))
    try:
        yield folder
    finally:
        forget_parts()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Job:
    """A plan: the units to do, the ids of those committed, counts of what cannot be done (ingest.plan)."""

    store: Any
    pseudonymizer: Any
    units: "StoredUnits | list[Unit]"
    done: frozenset[str]
    waiting: int = 0
    absent: int = 0
    nothing: str = "ingest: nothing to do, every input is already in the dataset"


Planned = Callable[["IngestConfig", TextIO | None, Path | None, int | None], Job]


def plan_job(
    config: "IngestConfig",
    stream: TextIO | None = None,
    folder: Path | None = None,
    workers: int | None = None,
) -> Job:
    """Key, dataset.json, inventory, plan; the plan is written before any work. Raises UserError.

    workers: processes of the header scan, default one a CPU.
    folder: private scratch, which holds paths; the units of the job are read from it. None: one that goes
    with this process.
    """
    from ingest.convert import dataset_info
    from ingest.labels import check_table
    from ingest.places import check_output
    from ingest.planner import plan_stored
    from shards import dataset
    from shards.ids import Pseudonymizer
    from shards.objects import open_store
    from shards.snapshot import drop_stale

    check_output(config)
    for label in config.labels:
        check_table(label.path, label.name, label.label_column, label.by, (), label.kind, label.columns)
    if config.path_map is not None:
        path_map.check(config.path_map, config.output, config.sources)
    store = open_store(config.output)
    new_key = keys.must_be_made(config.key_file, config.output)
    if not new_key:
        names = Pseudonymizer(keys.read(config.key_file, config.output), config.site)
        if store.exists(dataset.NAME):
            dataset.open_or_create(store, dataset_info(config, names))  # refused before the sources are read
            drop_stale(store)
    else:
        names = Pseudonymizer(os.urandom(32), config.site)
    folder = folder or Path(tempfile.mkdtemp(prefix="plan-", dir=process_folder()))
    stored = take_inventory(config, names, folder, stream, workers)
    if new_key:  # only now: a wrong source folder leaves nothing behind
        _printer(stream)("ingest: " + keys.make(config.output, names.key))
    dataset.open_or_create(store, dataset_info(config, names))
    if config.path_map is not None:
        path_map.write(config.path_map, stored.entries(), names)
    with Progress("ingest: planning", 0, "units", stream=stream) as progress:
        todo = plan_stored(store, stored, config, names, folder / "plan", progress.update)
    return Job(store, names, todo.units, todo.done, len(todo.waiting), todo.absent)


def _convert(unit: "Unit", common: tuple[str, Any, str, Path | None, Any]) -> Any:
    """The Ray task; common: configuration as JSON, pseudonymizer, output, scratch (None: the worker's own),
    bucket of the limits (orchestration.leases).

    Returns a UnitResult, or (kind, text) of an error that must not stop the other units.
    """
    from ingest.config import IngestConfig
    from ingest.convert import SourceChangedError, run_unit
    from ingest.sources import limited

    pin_threads()
    config_json, names, root, scratch, bucket = common
    config = IngestConfig.model_validate_json(config_json)
    try:
        # Of a local Ray below the command's folder, which goes even when the workers are killed.
        with (
            tempfile.TemporaryDirectory(prefix="unit-", dir=scratch or process_folder()) as folder,
            limited(leases.worker_meter(config, bucket)),
        ):
            return run_unit(unit, config, names, root, Path(folder))
    except UserError as error:
        return ("user", str(error))
    except SourceChangedError:
        return ("error", "source_missing")
    except Exception as error:  # noqa: BLE001 - the boundary: Ray would log the text, which may hold a path
        return ("error", type(error).__name__)


class _Conversion:
    """The driver's loop: a bounded window of tasks, results booked as they come."""

    def __init__(
        self,
        job: Job,
        config: "IngestConfig",
        scratch: Path | None,
        metrics: Metrics,
        summary: IngestSummary,
        folder: Path | None,
    ) -> None:
        import ray

        self._folder = folder  # None: the output is a bucket
        self._job, self._metrics, self._summary = job, metrics, summary
        output = location(config.output)
        # By reference: the key is then in the object store alone, and in no task's description.
        self._bucket = leases.start_bucket(config)
        self._most = config.open_files or sys.maxsize  # units at a time: each has one source file open
        self._common = ray.put((config.model_dump_json(), job.pseudonymizer, output, scratch, self._bucket))
        self._task = ray.remote(_convert).options(
            num_cpus=1, max_retries=RETRIES, retry_exceptions=False, runtime_env=runtime_env()
        )
        self._pending: dict[Any, Unit] = {}
        self._inputs = self._refused = 0

    def run(self, workers: int, stop: StopFlag, stream: TextIO | None) -> None:
        import ray

        waiting = iter(self._job.units)
        total = len(self._job.units)
        done = 0
        self._metrics.set("medswav_ingest_units_remaining", total)
        with Progress("ingest", total, "units", stream=stream) as progress:
            while done < total and not stop:
                self._fill(waiting, min(workers * WINDOW_PER_WORKER, self._most))
                ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=POLL_SECONDS)
                for reference in ready:
                    self._book(reference)
                    done += 1
                self._metrics.set("medswav_ingest_units_remaining", total - done)
                self._metrics.look_at_disk(self._folder)
                progress.update(done, f"{self._inputs} files, {self._refused} refused")
            self._cancel()
        self._summary.leased_bytes, self._summary.leased_seconds = leases.ledger(self._bucket)

    def _fill(self, waiting: "Iterator[Unit]", window: int) -> None:
        while len(self._pending) < window:
            unit = next(waiting, None)
            if unit is None:
                return
            self._pending[self._task.remote(unit, self._common)] = unit

    def _cancel(self) -> None:
        """End what runs: a commit is atomic, and what was not committed is done again by the next run."""
        import ray

        left = list(self._pending)
        for reference in left:
            ray.cancel(reference)  # as Ctrl-C: the worker removes its scratch
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=CANCEL_SECONDS)
        for reference in left:
            ray.cancel(reference, force=True)
        self._pending.clear()

    def _book(self, reference: Any) -> None:
        import ray

        self._pending.pop(reference)
        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:  # the worker died again and again: memory, a broken decoder
            self._fail(type(error).__name__)
            return
        if isinstance(result, tuple):
            kind, text = result
            if kind == "user":  # a full or read-only disk: every other unit would meet it too
                self._cancel()
                raise UserError(text)
            self._fail(text)
            return
        self._count(result)

    def _fail(self, kind: str) -> None:
        self._summary.failed[kind] = self._summary.failed.get(kind, 0) + 1
        self._metrics.add("medswav_ingest_units_total", outcome="failed")

    def _count(self, result: "UnitResult") -> None:
        if result.inputs == 0:  # another driver has released the unit (ingest.plan): nothing was converted
            self._fail("released")
            return
        metrics, summary = self._metrics, self._summary
        summary.committed += 1
        summary.bytes_in += result.bytes_in
        summary.bytes_out += result.bytes_out
        self._inputs += result.inputs
        self._refused += sum(result.reasons.values())
        metrics.add("medswav_ingest_units_total", outcome="committed")
        metrics.add("medswav_ingest_bytes_total", result.bytes_in, direction="read")
        metrics.add("medswav_ingest_bytes_total", result.bytes_out, direction="written")
        for modality, samples in result.samples.items():
            metrics.add("medswav_ingest_shards_total", modality=modality)
            metrics.add("medswav_ingest_files_total", samples, outcome="sample", reason="none")
        for reason, rows in result.reasons.items():
            metrics.add("medswav_ingest_files_total", rows, outcome="refused", reason=reason)
        for stage, seconds in result.seconds.items():
            metrics.observe("medswav_ingest_stage_seconds", seconds, stage=stage)
        metrics.set("medswav_ingest_quarantine_ratio", self._refused / max(1, self._inputs))
        metrics.set("medswav_ingest_commit_timestamp_seconds", time.time())


def _sum_up(summary: IngestSummary, job: Job, config: "IngestConfig") -> None:
    """The dataset's counts from its commits, the failure budget, and a sweep of what killed runs left."""
    from shards import catalog
    from shards.commit import list_commits, sweep
    from shards.retries import input_count

    summary.samples = catalog.counts(job.store)
    refused = catalog.quarantine(job.store)
    summary.quarantined = dict(Counter(refused["reason"].to_pylist()).most_common())
    summary.inputs = input_count(list_commits(job.store))
    pairs = zip(refused["source"].to_pylist(), refused["reason"].to_pylist(), strict=True)
    failed = {source for source, reason in pairs if reason in FAILED_REASONS}
    summary.over_budget = len(failed) > config.failure_budget * max(1, summary.inputs)
    if summary.exit_code != 130:
        sweep(job.store, min_age_seconds=SWEEP_AGE_SECONDS)


def _join_labels(job: Job, config: "IngestConfig", say: Callable[[str], None]) -> None:
    """The label tables of the configuration, joined to what the dataset holds now."""
    from ingest.labels import join_labels

    for given in config.labels:
        table = join_labels(
            config.output,
            given.path,
            job.pseudonymizer,
            given.name,
            given.label_column,
            given.by,
            config.sources,
            given.kind,
            given.columns,
        )
        unmatched = int(table.schema.metadata[b"unmatched"])
        say(f"ingest: labels {given.name}: {table.num_rows} images, {unmatched} rows match none")


def _printer(stream: TextIO | None) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(text, file=stream or sys.stderr, flush=True)

    return say
