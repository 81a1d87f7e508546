"""Runs and their jobs, against a job server that is a list."""

import io
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from orchestration import job_list, submit
from orchestration.cluster import JobFailedError, StopFlag
from shards.errors import UserError


@dataclass
class Job:
    submission_id: str
    state: str = "RUNNING"
    run: str | None = None
    driver_exit_code: int | None = None
    start_time: int = 1_764_000_000_000
    end_time: int | None = None
    entrypoint: str = "medswav pretrain"
    message: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        return {} if self.run is None else {submit.RUN_KEY: self.run}

    @property
    def status(self) -> SimpleNamespace:
        ended = self.state in ("SUCCEEDED", "FAILED", "STOPPED")
        return SimpleNamespace(value=self.state, is_terminal=lambda: ended)


@dataclass
class Server:
    """`codes`: what the jobs that are submitted end with, one after the other."""

    jobs: list[Job] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    silent: int = 0  # requests that are not answered
    forgetful: int = 0  # jobs that are taken without an answer

    def list_jobs(self) -> list[Job]:
        return self.jobs

    def submit_job(self, entrypoint, submission_id, runtime_env, metadata) -> str:
        code = self.codes.pop(0)
        state = "FAILED" if code else "SUCCEEDED"
        self.jobs.append(Job(submission_id, state, metadata[submit.RUN_KEY], code, entrypoint=entrypoint))
        if self.forgetful:
            self.forgetful -= 1
            raise ConnectionResetError("no answer")
        return submission_id

    def get_job_info(self, job: str) -> Job:
        if self.silent:
            self.silent -= 1
            raise RuntimeError("503")
        return next(one for one in self.jobs if one.submission_id == job)

    def get_job_logs(self, job: str) -> str:
        return f"output of {job}\n"

    def stop_job(self, job: str) -> None:
        self.get_job_info(job).state = "STOPPED"

    async def tail_job_logs(self, job: str):
        yield f"output of {job}\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(submit, "connect", lambda address: made)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    return made


def test_a_run_is_submitted_again_under_its_name_until_it_is_done(server):
    server.codes = [1, 137, 0, 0]
    out = io.StringIO()
    given = {"run_id": "north", "retries": 5, "stream": out, "poll_seconds": 0.01}
    assert submit.submit(["pretrain", "--ranks", "1:3"], **given) == 0
    assert [job.submission_id for job in server.jobs] == ["north-1", "north-2", "north-3"]
    assert {job.run for job in server.jobs} == {"north"}
    assert "job north-2 failed with 137: submitting it again" in out.getvalue()
    assert submit.submit(["pretrain"], **given) == 0  # of the same run, later
    assert server.jobs[-1].submission_id == "north-4"


@pytest.mark.parametrize("code", [2, 3, 130])
def test_what_another_try_cannot_mend_is_not_submitted_again(server, code):
    server.codes = [code]
    assert submit.submit(["x"], run_id="north", retries=5, stream=io.StringIO(), poll_seconds=0.01) == code


def test_a_run_has_one_job_at_a_time(server):
    server.jobs = [Job("north-4", run="north"), Job("other", "FAILED", "south")]
    with pytest.raises(UserError, match=r"run north is at work, as job north-4.*jobs stop north"):
        submit.submit(["x"], run_id="north")
    for name in ("no rth", "", "-x", "a/b"):
        with pytest.raises(UserError, match="no name"):
            submit.check_name(server, name)
    submit.check_name(server, "south")


def test_a_silent_job_server_is_asked_again_and_then_named(server, monkeypatch):
    server.jobs, server.silent = [Job("north", "SUCCEEDED", "north", 0)], 3
    with StopFlag() as stop:
        assert submit._follow(server, "north", io.StringIO(), stop, 0.01) == 0
        server.silent = 10**9
        monkeypatch.setattr(submit, "SILENCE_SECONDS", 0.05)
        with pytest.raises(JobFailedError, match="job north may go on"):
            submit._follow(server, "north", io.StringIO(), stop, 0.01)


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(server):
    server.codes, server.forgetful = [0], 1
    assert submit.submit(["x"], run_id="north", stream=io.StringIO(), poll_seconds=0.01) == 0
    assert len(server.jobs) == 1


def test_jobs_are_listed_by_run_shown_and_stopped(server):
    assert job_list.list_jobs(None) == "no jobs"
    server.jobs = [
        Job("north-1", "FAILED", "north", 1, end_time=1_764_000_075_000),
        Job("north-2", "RUNNING", "north", start_time=1_764_000_100_000),
        Job("raysubmit_x", "SUCCEEDED", None, 0, start_time=1_763_000_000_000),
    ]
    lines = job_list.list_jobs(None).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["-", "raysubmit_x", "succeeded"],
        ["north", "north-1", "failed"],
        ["north", "north-2", "running"],
    ]
    assert " 1:15 " in lines[1]
    assert [row["exit_code"] for row in json.loads(job_list.list_jobs(None, as_json=True))] == [0, 1, None]
    out = io.StringIO()
    job_list.show_log(None, "north", follow=False, stream=out)  # the newest one of the run
    job_list.show_log(None, "raysubmit_x", follow=True, stream=out)
    assert out.getvalue() == "output of north-2\noutput of raysubmit_x\n"
    job_list.stop(None, "north", stream=out)
    assert out.getvalue().endswith("job north-2: stopped\n")
    with pytest.raises(UserError, match="has ended"):
        job_list.stop(None, "north-1")
    with pytest.raises(UserError, match="no job and no run"):
        job_list.show_log(None, "nosuch", follow=False)
