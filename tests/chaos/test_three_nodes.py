"""Three machines with a real `ray start` each: one loses power in the middle of every job, all end right.

Run `make chaos`, or `pytest -m chaos tests/chaos/test_three_nodes.py`. With MEDSWAV_CLUSTER_LOG=FILE what was
typed and printed is written there: docs/cluster.md holds such a log.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ingest.synthetic.build import build
from shards.ids import create_key
from shards.store import Store
from shards.verify import verify
from tests.chaos.machines import Machine, Machines, machines
from tests.chaos.transcript import Transcript, note
from tests.orchestration import jobs
from tests.orchestration.jobs import committed, contents
from trainer import checkpoint, journal
from trainer.batches import BatchMaker
from trainer.config import TrainConfig
from trainer.prepare import prepare

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(3600)]
DEADLINE_SECONDS = 1200.0  # the machine may be busy
STEPS, EVERY, BATCH = 150, 10, 18  # six images of each of three modalities: worlds of 1, 2, 3 and 6


@dataclass
class Site:
    """The cluster, the disk that all of its machines see, and what is written down of it."""

    cluster: Machines
    disk: Path
    transcript: Transcript

    @contextmanager
    def job(self, log: Path, *command: str) -> Iterator[subprocess.Popen]:
        """A command that is typed on the head."""
        head = self.cluster.head
        with jobs.child([*head.prefix(), *command], log, self.cluster.env) as process:
            yield process
        self.transcript.block(head.name, command, log)

    def run(self, log: Path, *command: str) -> None:
        with self.job(log, *command) as process:
            assert process.wait(timeout=DEADLINE_SECONDS) == 0, log.read_text()

    def power_off(self, machine: Machine, log: Path) -> None:
        note(log, f"{machine.name} loses power")
        self.cluster.power_off(machine)

    def with_worker(self, title: str, log: Path, process: subprocess.Popen) -> Machine:
        """A machine, not the head, on which such a Ray worker runs now."""

        def look() -> Machine | None:
            return next((one for one in self.cluster.workers if one.workers(title)), None)

        found: Machine = jobs.poll(f"{title} on a machine", look, process)
        return found

    def repair(self) -> None:
        """Power for every machine again."""
        for machine in self.cluster.workers:
            if machine.process is None or machine.process.poll() is not None:
                self.cluster.start(machine)


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "DEADLINE_SECONDS", DEADLINE_SECONDS)
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    disk = tmp_path_factory.mktemp("disk")
    build(disk / "archive", patients=4, workers=2)
    create_key(disk / "site.key")
    with machines(["head", "one", "two"]) as cluster:
        names = {str(disk): "/shared", str(cluster.folder): "/tmp/ray", str(jobs.BIN): "/venv/bin"}
        transcript = Transcript(names)
        transcript.section("The cluster")
        for machine in [cluster.head, *cluster.workers]:
            log = disk / f"{machine.name}.log"
            log.write_text("")
            transcript.block(machine.name, cluster.command(machine), log)
        yield Site(cluster, disk, transcript)
        if "MEDSWAV_CLUSTER_LOG" in os.environ:
            transcript.write(Path(os.environ["MEDSWAV_CLUSTER_LOG"]))


def ingest(site: Site, out: str) -> list[str]:
    settings = ["--key", str(site.disk / "site.key"), "--set", "unit_files=4"]
    return ["ingest", "run", str(site.disk / "archive"), str(site.disk / out), *settings]


@pytest.fixture(scope="module")
def dataset(site: Site) -> Path:
    """What an ingest gives that nothing happens to."""
    site.transcript.section("Ingest, undisturbed")
    log = site.disk / "ingest.log"
    submit = ["medswav", "submit", "--address", site.cluster.url, "--run-id", "north"]
    site.run(log, *submit, "--", *ingest(site, "north"))
    return site.disk / "north"


def test_an_ingest_that_loses_a_machine_writes_the_same_bytes(site: Site, dataset: Path) -> None:
    out, log = site.disk / "north-again", site.disk / "ingest-again.log"
    site.transcript.section("Ingest, and a machine loses power")
    submit = ["ray", "job", "submit", "--address", site.cluster.url]
    with site.job(log, *submit, "--", *ingest(site, out.name)) as process:
        jobs.poll("first commits", lambda: committed(out) >= 2, process)
        site.power_off(site.with_worker("ray::_convert", log, process), log)
        assert committed(out) < committed(dataset), "it was killed in the middle"
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, log.read_text()
    site.run(site.disk / "verify.log", "ingest", "verify", str(out), "--deep")
    assert verify(Store(out), deep=True).clean
    assert contents(out) == contents(dataset)
    site.repair()


def pretrain(site: Site, dataset: Path, name: str, *ranks: str) -> list[str]:
    settings = [
        "data.modalities=[ct,us,xr]",
        f"data.batch_size={BATCH}",
        f"max_steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        "log_every_steps=1",
        "model.sync_batchnorm=global",
        "optim.final_learning_rate=0.002",  # constant: the losses do not depend on max_steps
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    where = ["--dataset", str(dataset), "--run-dir", str(site.disk / name)]
    return ["medswav", "pretrain", *where, "--feeders", "1", "--ranks", *ranks, *flags]


def rows(run_dir: Path) -> list[dict[str, float]]:
    return journal.read(journal.journal_path(run_dir))


def losses(run_dir: Path) -> list[float]:
    """Of each step, none of them missing or done twice; of an unfinished run those of the first STEPS."""
    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(len(found))) and len(found) >= STEPS
    return [row["loss"] for row in found[:STEPS]]


def saved(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: max(checkpoint.list_steps(run_dir), default=0) >= step


@pytest.fixture(scope="module")
def undisturbed(site: Site, dataset: Path) -> list[float]:
    """The losses of two ranks that nothing happens to."""
    site.transcript.section("Pretraining on two ranks, undisturbed")
    submit = ["medswav", "submit", "--address", site.cluster.url, "--run-id", "swav"]
    command = pretrain(site, dataset, "swav", "2")[1:]
    site.run(site.disk / "swav.log", *submit, "--", *command)
    return losses(site.disk / "swav")


def test_a_pretraining_that_loses_a_machine_has_the_same_losses(site, dataset, undisturbed) -> None:
    run_dir, log = site.disk / "swav-again", site.disk / "swav-again.log"
    site.transcript.section("Pretraining on two ranks, and a machine loses power")
    submit = ["ray", "job", "submit", "--address", site.cluster.url]
    with site.job(log, *submit, "--", *pretrain(site, dataset, run_dir.name, "2")) as process:
        jobs.poll("a checkpoint", saved(run_dir, EVERY), process)
        site.power_off(site.with_worker("ray::RayTrainWorker", log, process), log)
        assert len(rows(run_dir)) < STEPS, "it was killed in the middle"
        assert process.wait(timeout=DEADLINE_SECONDS) == 0, log.read_text()
    assert "a rank failed" in log.read_text()
    assert losses(run_dir) == undisturbed
    site.repair()


def test_elastic_ranks_come_and_go_with_the_machines(site, dataset, undisturbed) -> None:
    """Three; a machine loses power: two; it comes back: three; it is drained: two; the job is stopped."""
    run_dir, log = site.disk / "elastic", site.disk / "elastic.log"
    site.transcript.section("Elastic pretraining: a machine loses power, comes back, and is drained")
    submit = ["medswav", "submit", "--address", site.cluster.url, "--run-id", "elastic"]
    command = pretrain(site, dataset, run_dir.name, "1:3", "--resize-seconds", "5")[1:]
    command += ["--set", "max_steps=1000000"]
    with site.job(log, *submit, "--", *command) as process:
        jobs.poll("a checkpoint", saved(run_dir, EVERY), process)
        victim = site.with_worker("ray::RayTrainWorker", log, process)
        site.power_off(victim, log)
        jobs.poll("two ranks", lambda: "2 ranks go on" in log.read_text(), process)
        note(log, f"{victim.name} is started again")
        site.repair()
        jobs.poll("three ranks", lambda: "3 ranks go on" in log.read_text(), process)
        drain(site, victim, log)
        jobs.poll("two again", lambda: log.read_text().count("2 ranks go on") == 2, process)
        site.power_off(victim, log)
        jobs.poll("enough steps", lambda: len(rows(run_dir)) >= STEPS, process)
        site.run(site.disk / "stop.log", "medswav", "jobs", "stop", "elastic", "--address", site.cluster.url)
        assert process.wait(timeout=DEADLINE_SECONDS) == 130, log.read_text()
    text = log.read_text()
    ways, goes = (
        re.findall(r"saved step (\d+) and make way", text),
        re.findall(r"go on from step (\d+)", text),
    )
    assert len(ways) == 2 and ways == goes[1:], "only the machine that lost power cost steps"
    assert text.count("a rank failed") == 1
    assert max(checkpoint.list_steps(run_dir)) == len(rows(run_dir))
    assert global_batches_are_the_same(run_dir)
    # The same samples: the first loss is that of two ranks but for the order of sums, which grows by AdamW.
    found = losses(run_dir)
    print("largest difference of a loss:", max(abs(a - b) for a, b in zip(found, undisturbed, strict=True)))
    assert found[0] == pytest.approx(undisturbed[0], abs=1e-5)
    assert found == pytest.approx(undisturbed, abs=0.3)
    site.run(site.disk / "jobs.log", "medswav", "jobs", "ls", "--address", site.cluster.url)
    site.repair()


def drain(site: Site, machine: Machine, log: Path) -> None:
    """As an autoscaler announces that a machine will be taken away."""
    node = next(node for name, node in site.cluster.alive() if name == machine.name)
    note(log, f"{machine.name} is drained")
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "maintenance"]
    where = ["--address", site.cluster.address, "--node-id", node]
    site.run(
        site.disk / "drain.log", "ray", "drain-node", *where, *why, "--deadline-remaining-seconds", "600"
    )


def global_batches_are_the_same(run_dir: Path) -> bool:
    """Whatever the number of ranks: the samples of a step, as this very run draws them."""
    newest = checkpoint.newest(run_dir)
    assert newest is not None
    config = TrainConfig.model_validate(newest.state["config"])
    prepared = prepare(config, run_dir)
    for step in (0, STEPS // 2, STEPS - 1):
        drawn = set()
        for world in (1, 2, 3):
            makers = [BatchMaker(config, rank, world, prepared.bands) for rank in range(world)]
            drawn.add(tuple(sorted(key for maker in makers for key in maker(step).keys)))
        if len(drawn) != 1:
            return False
    return True
