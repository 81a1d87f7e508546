"""`medswav submit -- pretrain ...`: a command of ours as a job on a running cluster, with its true exit code.

`ray job submit` answers 1 to any failure; the code of the command itself is `driver_exit_code`. Ray does not
retry jobs: `retries` submits the same command again, which resumes from its run folder.
"""

import asyncio
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

from orchestration.cluster import StopFlag, prepare_environment, use_named_token
from shards.errors import UserError

STOP_WAIT_SECONDS = 300  # Ray's own default of 3 s is too short to save a checkpoint
POLL_SECONDS = 1.0
START_SECONDS = 60.0
LOG_SECONDS = 10.0  # for the last lines after the end
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

    address: the dashboard (http://host:8265), default RAY_API_SERVER_ADDRESS or RAY_ADDRESS. run_id: prefix
    of the job's submission id. A failed job is submitted again up to `retries` times, but never after exit
    code 2 (configuration), 3 (failure budget) or 130 (stopped). Ctrl-C and SIGTERM stop the job, which saves
    a checkpoint first.
    """
    if not command:
        raise UserError(
            "nothing to submit: write the command after --, as in `medswav submit -- pretrain ...`"
        )
    client = _client(address)
    stream = stream or sys.stdout
    name = run_id or f"medswav-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    entrypoint = shlex.join([program, *command])
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


def _client(address: str | None) -> Any:
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
    """Submit once. A cluster that has just started refuses for some seconds: try again until the deadline."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                submission_id=_free_id(client, name),
                runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}},
                metadata={"medswav_run": name, "attempt": str(attempt)},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline or stop:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"the cluster does not take the job: {reason}") from None
            time.sleep(1)


def _free_id(client: Any, name: str) -> str:
    taken = {job.submission_id for job in client.list_jobs()}
    candidates = (name if n == 0 else f"{name}-{n}" for n in range(len(taken) + 1))
    return next(c for c in candidates if c not in taken)


def _follow(client: Any, job: str, stream: TextIO, stop: StopFlag, poll_seconds: float) -> int:
    """Copy the log until the job ends. Its exit code; 130 when it was stopped, 1 when it never had one."""
    tail = threading.Thread(target=_copy_log, args=(client, job, stream), daemon=True)
    tail.start()
    stopping = False
    info = client.get_job_info(job)
    while not info.status.is_terminal():
        if stop and not stopping:
            stopping = True
            print(f"stopping job {job}; it saves a checkpoint first", file=stream, flush=True)
            client.stop_job(job)
        time.sleep(poll_seconds)
        info = client.get_job_info(job)
    tail.join(LOG_SECONDS)
    if info.status.value == "STOPPED":
        return INTERRUPTED
    if info.driver_exit_code is None:
        print(info.message or "the job failed before its command began", file=stream, flush=True)
        return 0 if info.status.value == "SUCCEEDED" else 1
    return int(info.driver_exit_code)


def _copy_log(client: Any, job: str, stream: TextIO) -> None:
    """Follow the job's output over one web socket until the job ends."""

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            stream.write(lines)
            stream.flush()

    try:
        asyncio.run(follow())
    except (RuntimeError, OSError) as error:
        print(f"the log of {job} is lost ({type(error).__name__}); the job goes on", file=stream, flush=True)
