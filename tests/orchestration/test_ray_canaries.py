"""Identity planted in the sources reaches no byte that a run leaves: streams, pages, metrics, Ray's logs."""

import json
import os
import stat
import urllib.request
import zipfile
from pathlib import Path

import pytest

from orchestration.cli import ingest_main
from orchestration.metrics_endpoint import TARGETS_FILE
from shards.ids import create_key
from tests.orchestration import jobs
from tests.phi.test_canaries import CANARY, SECRETS, found_in, plant_all, planted

pytestmark = pytest.mark.ray
INGEST = str(jobs.BIN / "ingest")
FILES = 12  # more than two workers have begun when the first unit is committed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("canaries")
    source = root / "source"  # what the user types is the user's: the canaries begin below
    plant_all(source / f"{CANARY}_ward")
    for number in range(FILES):
        planted(source / f"{CANARY}_ward" / f"study{number}" / f"{CANARY}{number}")
    scan = planted(root / "packed")
    with zipfile.ZipFile(source / f"{CANARY}.zip", "w") as file:
        file.writestr(f"{CANARY}^Jane/scan", scan.read_bytes())
        file.comment = CANARY.encode()
    scan.unlink()
    create_key(root / "key")
    return root


def everything(folder: Path) -> dict[str, bytes]:
    """Name and bytes of each regular file; the names of all else too."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                regular = stat.S_ISREG(path.lstat().st_mode)
                found[str(path.relative_to(folder))] = path.read_bytes() if regular else b""
            except OSError:  # Ray turns its logs over
                continue
    return found


def secrets_in(folder: Path) -> list[str]:
    return [
        f"{secret} in {name if not found_in(name.encode()) else 'a file name'}"
        for name, content in everything(folder).items()
        for secret in found_in(content) + found_in(name.encode())
    ]


def scraped(out: Path) -> bytes:
    try:
        (entry,) = json.loads((out / TARGETS_FILE).read_text())
        with urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=10) as response:
            return response.read()
    except OSError:  # not yet, or no more
        return b""


def test_a_run_with_killed_workers_and_vanished_files_leaves_no_identity(
    root, ray_cluster, tmp_path, capfdbinary
):
    source, out, log = root / "source", tmp_path / "out", tmp_path / "log"
    given = [INGEST, "run", str(source), str(out), "--key", str(root / "key"), "--workers", "1", "--verbose"]
    given += ["--set", "unit_files=1", "--address", ray_cluster.address]
    pages: list[bytes] = []

    def committed() -> int:
        pages.append(scraped(out))
        return len(list(out.glob("commits/*.json")))

    with jobs.child(given, log, ray_cluster.env) as process:
        jobs.poll("the first commit", committed, process)
        for victim in jobs.workers(ray_cluster.root, "ray::_convert"):
            jobs.kill(victim)
        for path in source.glob(f"{CANARY}_ward/study*/*"):  # those not read yet are gone now
            path.unlink()
        jobs.poll("the end", lambda: committed() and process.poll() is not None)
    assert process.returncode in (0, 3), log.read_text()  # 3: what vanished is counted
    assert any(b"medswav_ingest_" in page for page in pages)
    streams = [log.read_bytes(), *pages]
    for command in (
        ["status", str(out)],
        ["status", str(out), "--json"],
        ["verify", str(out), "--deep"],
        ["quarantine", "ls", str(out)],
        ["plan", str(source)],
        ["report", str(out), "--out", str(tmp_path / "page.html")],
    ):
        code = ingest_main(command)
        told = capfdbinary.readouterr()
        assert code == 0, (command, told)
        streams += told
    streams.append((tmp_path / "page.html").read_bytes())
    for stream in streams:
        assert not found_in(stream), stream.decode(errors="replace")[:2000]
    assert not secrets_in(out)


def test_logs_and_files_of_ray_hold_no_identity_of_those_runs(root, ray_cluster):
    folder = Path(ray_cluster.env["TMPDIR"])
    assert any(name.endswith(".log") for name in everything(folder)), "Ray logs here"
    assert not secrets_in(folder)


def test_the_search_looks_into_files_and_names(tmp_path):
    (tmp_path / "a.log").write_text(f"failed: {SECRETS[0]}")
    (tmp_path / CANARY).touch()
    assert len(secrets_in(tmp_path)) == 2
