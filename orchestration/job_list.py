"""`medswav jobs`: the jobs of a cluster by the run they belong to, their output, and a stop that saves.

A run is what `medswav submit --run-id` names; each time it is submitted is a job of its own.
"""

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

from orchestration import submit
from shards.errors import UserError

POLL_SECONDS = 0.5


def list_jobs(address: str | None, as_json: bool = False) -> str:
    """A line for each job, oldest first: run, job, state, exit code, start (local; JSON: UTC), duration,
    command."""
    jobs = sorted(submit.connect(address).list_jobs(), key=lambda job: job.start_time or 0)
    rows = [_row(job) for job in jobs if job.submission_id]
    if as_json:
        return json.dumps(rows, indent=1)
    if not rows:
        return "no jobs"
    lines = []
    for row in rows:
        code = "" if row["exit_code"] is None else str(row["exit_code"])
        started = local_time(row["started"])
        lines.append(
            f"{row['run'] or '-':20} {row['job']:26} {row['state']:10} {code:>4} {started:16} "
            f"{row['seconds'] // 60:4}:{row['seconds'] % 60:02} {row['command']}"
        )
    return "\n".join(lines)


def show_log(address: str | None, name: str, follow: bool, stream: TextIO | None = None) -> None:
    """The output of a job, or of the newest one of a run; `follow`: until it ends. Raises UserError."""
    client, stream = submit.connect(address), stream or sys.stdout
    job = find(client, name).submission_id
    if follow:
        submit.copy_log(client, job, stream)
    else:
        stream.write(client.get_job_logs(job))


def stop(address: str | None, name: str, stream: TextIO | None = None) -> None:
    """Stop the newest job of a run and wait: its command saves first. Raises UserError."""
    client, stream = submit.connect(address), stream or sys.stdout
    job = find(client, name)
    if job.status.is_terminal():
        raise UserError(f"job {job.submission_id} has ended: {job.status.value.lower()}")
    client.stop_job(job.submission_id)
    print(f"stopping job {job.submission_id}; it saves first", file=stream, flush=True)
    while not (status := client.get_job_info(job.submission_id).status).is_terminal():
        time.sleep(POLL_SECONDS)
    print(f"job {job.submission_id}: {status.value.lower()}", file=stream, flush=True)


def find(client: Any, name: str) -> Any:
    """The job of that id, or the newest of the run of that name. Raises UserError."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    same = [job for job in jobs if job.submission_id == name]
    same = same or [job for job in jobs if submit.run_of(job) == name]
    if not same:
        raise UserError(f"no job and no run is called {name}: `medswav jobs ls` lists them")
    return max(same, key=lambda job: job.start_time or 0)


def local_time(utc: str | None) -> str:
    """`2026-11-25T19:40:05Z` as people of this place read it, to the minute; empty where it is not known."""
    return "" if utc is None else datetime.fromisoformat(utc).astimezone().strftime("%Y-%m-%d %H:%M")


def _row(job: Any) -> dict[str, Any]:
    began, ended = job.start_time, job.end_time  # ms
    seconds = 0 if not began else (ended / 1000 if ended else time.time()) - began / 1000
    return {
        "run": submit.run_of(job),
        "job": job.submission_id,
        "state": job.status.value.lower(),
        "exit_code": job.driver_exit_code,
        "started": datetime.fromtimestamp(began / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if began
        else None,
        "seconds": max(0, round(seconds)),
        "command": job.entrypoint,
    }
