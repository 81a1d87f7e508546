"""`--bytes-per-second` and `--open-files` hold over a whole job, and change no byte of the dataset."""

import json
from pathlib import Path

import psutil
import pytest

from orchestration.cli import ingest_main
from shards.ids import create_key
from tests.ingest.files import grey, write
from tests.orchestration import jobs
from tests.orchestration.jobs import INGEST, contents

pytestmark = pytest.mark.ray
FILES, RATE = 12, 1_000_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("limited")
    for number in range(FILES):
        pixels = grey(seed=number, size=(240, 240))
        write(
            root / "files" / f"p{number}" / "f",
            pixels,
            number=number,
            patient=f"P{number}",
            SeriesInstanceUID=f"1.9.{number}",
        )
    create_key(root / "key")
    return root


def opened(root: int, below: str) -> list[tuple[int, str]]:
    """(pid, title) for each file below a folder that a process of the job, or the driver, has open now."""
    found = []
    for process in [psutil.Process(root), *jobs.descendants(root)]:
        try:
            title = " ".join(process.cmdline())
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                if str(link.readlink()).startswith(below):
                    found.append((process.pid, title))
        except (OSError, psutil.Error):
            continue
    return found


def test_a_job_under_limits_keeps_them_and_writes_the_same_dataset(sources, ray_cluster, tmp_path):
    given = [INGEST, "run", str(sources / "files")]
    more = ["--key", str(sources / "key"), "--set", "unit_files=1", "--workers", "4", "--json"]
    more += ["--address", ray_cluster.address]  # which has 8 CPUs
    env, log = ray_cluster.env, tmp_path / "log"
    limits = ["--bytes-per-second", f"{RATE}", "--open-files", "2"]
    most = 0
    with jobs.child([*given, str(tmp_path / "out"), *more, *limits], log, env) as process:

        def ended() -> bool:
            nonlocal most
            roots = (process.pid, ray_cluster.root)
            found = [item for root in roots for item in opened(root, str(sources / "files"))]
            most = max(most, len(found))
            assert not [title for _, title in found if "sandbox_child" in title], "a decoder reads a source"
            return process.poll() is not None

        jobs.poll("end", ended)
        assert process.returncode == 0, log.read_text()
    assert 1 <= most <= 2
    text = log.read_text()
    summary = json.loads(text[text.index("{") :])
    size = sum(path.stat().st_size for path in (sources / "files").rglob("f"))
    assert summary["committed"] == FILES and summary["bytes_in"] == size
    assert size <= summary["leased_bytes"] <= size * 1.2
    # Never more than the rate: the ledger is that of the one bucket which grants all leases.
    assert summary["leased_bytes"] <= RATE * summary["leased_seconds"] * (1 + 1e-9)
    assert summary["seconds"] >= summary["leased_seconds"] - 1  # they were waited for
    assert "(limit 1.00)" in text
    assert jobs.run([*given, str(tmp_path / "plain"), *more], tmp_path / "second", env) == 0
    assert contents(tmp_path / "plain") == contents(tmp_path / "out")


def test_a_wrong_limit_is_one_clear_line(sources, tmp_path, capsys):
    for option in (["--bytes-per-second", "fast"], ["--open-files", "0"]):
        given = ["run", str(sources / "files"), str(tmp_path / "out"), "--key", str(sources / "key"), *option]
        assert ingest_main(given) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
