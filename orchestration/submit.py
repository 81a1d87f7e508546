"""`medswav submit -- pretrain ...`: a command of ours as a job on a running cluster, with its true exit code.

`ray job submit` answers 1 to any failure; the code of the command itself is `driver_exit_code`. Ray does not
retry jobs: `retries` submits the same command again, which resumes from its run folder. A run has a name; its
jobs are NAME-1, NAME-2 ..., and one of them at a time is at work.
"""

import asyncio
import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from orchestration.cluster import JobFailedError, StopFlag, prepare_environment, use_named_token
from shards.errors import UserError

STOP_WAIT_SECONDS = 300  # Ray's own default of 3 s is too short to save a checkpoint
POLL_SECONDS = 1.0
START_SECONDS = 60.0
LOG_SECONDS = 10.0  # for the last lines after the end
SILENCE_SECONDS = 120.0  # of the job server, before we give up following a job
RUN_KEY = "medswav_run"  # in the metadata of a job
INTERRUPTED, CONFIGURATION = 130, 2


def submit(
    command: Sequence[str],
    address: str | None = None,
    run_id: str | None = None,
    retries: int = 0,
    program: str = "medswav",
    stream: TextIO | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> int:
    """Run `medswav <command>` as a Ray job, copy its output to `stream`, return the command's exit code.

    address: the dashboard (http://host:8265), default RAY_API_SERVER_ADDRESS or RAY_ADDRESS. run_id: name of
    the run, by default made of the time; refused while a job of that run is at work. A failed job is
    submitted again up to `retries` times, but never after exit code 2 (configuration), 3 (failure budget) or
    130 (stopped). Ctrl-C and SIGTERM stop the job, which saves a checkpoint first.
    """
    if not command:
        raise UserError(
            "nothing to submit: write the command after --, as in `medswav submit -- pretrain ...`"
        )
    client = connect(address)
    stream = stream or sys.stdout
    name = run_id or f"medswav-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    entrypoint = shlex.join([program, *command])
    check_name(client, name)
    with StopFlag() as stop:
        for attempt in range(retries + 1):
            job = _start(client, entrypoint, name, attempt, stop)
            print(f"job {job}: {entrypoint}", file=stream, flush=True)
            code = _follow(client, job, stream, stop, poll_seconds)
            if code in (0, CONFIGURATION, 3, INTERRUPTED) or stop:
                break
            if attempt < retries:
                print(f"job {job} failed with {code}: submitting it again", file=stream, flush=True)
    return code


def connect(address: str | None) -> Any:
    """A client of the cluster's job server. Raises UserError."""
    use_named_token()
    prepare_environment()
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    chosen = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not chosen:
        raise UserError("no cluster named: give --address http://HEAD:8265 (or set RAY_API_SERVER_ADDRESS)")
    try:
        return JobSubmissionClient(chosen)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        text = str(error)
        if "401" in text or "nauthorized" in text or "oken" in text:
            raise UserError(
                f"the cluster at {chosen} wants its token: set RAY_AUTH_TOKEN_PATH to its token file"
            ) from None
        raise UserError(
            f"no Ray job server answers at {chosen}: give the dashboard's address, http://HEAD:8265"
        ) from None


def _start(client: Any, entrypoint: str, name: str, attempt: int, stop: StopFlag) -> str:
    """Submit once. A cluster that has just started refuses for some seconds, a busy one loses an answer: try
    again until the deadline. The id of the job is chosen before, so that it is never submitted twice. Raises
    UserError, JobFailedError."""
    deadline = time.monotonic() + START_SECONDS
    job = _free_id(_ask(client.list_jobs), name)
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}},
                metadata={RUN_KEY: name, "attempt": str(attempt)},
            )
        except (RuntimeError, OSError) as error:
            if job in {one.submission_id for one in _ask(client.list_jobs)}:
                return job  # it was taken, and the answer was lost
            lost = isinstance(error, OSError) or "No available agent" in str(error)
            if not lost or time.monotonic() > deadline or stop:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(f"the cluster does not take the job: {reason}") from None
            time.sleep(POLL_SECONDS)


def _ask(question: Callable[..., Any], *given: str) -> Any:
    """An answer of the job server; a busy one is asked again for some time. Raises JobFailedError."""
    deadline = time.monotonic() + SILENCE_SECONDS
    while True:
        try:
            return question(*given)
        except (RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                about = f"; job {given[0]} may go on: see `medswav jobs ls`" if given else ""
                raise JobFailedError(
                    f"the job server has not answered for {SILENCE_SECONDS:.0f} s "
                    f"({type(error).__name__}){about}"
                ) from None
            time.sleep(POLL_SECONDS)


def run_of(job: Any) -> str | None:
    """The run that a job belongs to; None for a job that `medswav submit` has not submitted."""
    name: str | None = (job.metadata or {}).get(RUN_KEY)
    return name


def check_name(client: Any, name: str) -> None:
    """Raises UserError: the run is at work, or the name cannot be one of a job."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--run-id {name!r} is no name: use letters, digits and . _ -")
    for job in _ask(client.list_jobs):
        if run_of(job) == name and not job.status.is_terminal():
            raise UserError(
                f"run {name} is at work, as job {job.submission_id}: follow it with `medswav jobs logs "
                f"{name} --follow`, end it with `medswav jobs stop {name}`, or choose another --run-id"
            )


def _free_id(jobs: Sequence[Any], name: str) -> str:
    taken = {job.submission_id for job in jobs}
    candidates = (f"{name}-{n}" for n in range(1, len(taken) + 2))
    return next(c for c in candidates if c not in taken)


def _follow(client: Any, job: str, stream: TextIO, stop: StopFlag, poll_seconds: float) -> int:
    """Copy the log until the job ends. Its exit code; 130 when it was stopped, 1 when it never had one."""
    tail = threading.Thread(target=copy_log, args=(client, job, stream), daemon=True)
    tail.start()
    stopping = False
    info = _ask(client.get_job_info, job)
    while not info.status.is_terminal():
        if stop and not stopping:
            stopping = True
            print(f"stopping job {job}; it saves a checkpoint first", file=stream, flush=True)
            _ask(client.stop_job, job)
        time.sleep(poll_seconds)
        info = _ask(client.get_job_info, job)
    tail.join(LOG_SECONDS)
    if info.status.value == "STOPPED":
        return INTERRUPTED
    if info.driver_exit_code is None:
        print(info.message or "the job failed before its command began", file=stream, flush=True)
        return 0 if info.status.value == "SUCCEEDED" else 1
    return int(info.driver_exit_code)


def copy_log(client: Any, job: str, stream: TextIO) -> None:
    """Follow the job's output over one web socket until the job ends."""

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            stream.write(lines)
            stream.flush()

    try:
        asyncio.run(follow())
    except (RuntimeError, OSError) as error:
        print(f"the log of {job} is lost ({type(error).__name__}); the job goes on", file=stream, flush=True)
