"""An actor on another node, without GPU, helps; its loss, or that of the node, changes no batch."""

from pathlib import Path

import pytest

from tests.orchestration import jobs

pytestmark = [pytest.mark.ray, pytest.mark.chaos]  # test_feed_logic.py holds the same without Ray


@pytest.mark.parametrize("victim", ["actor", "node"])
def test_what_is_lost_on_another_node_is_made_here(victim: str, ray_cluster, tmp_path: Path) -> None:
    command = [str(jobs.BIN / "python"), "-m", "tests.orchestration.overflow", ray_cluster.address, victim]
    log = tmp_path / "log"
    assert jobs.run([*command, str(tmp_path)], log, ray_cluster.env) == 0, log.read_text()
    # Ray's own lines about the dead node may follow
    assert any(line.endswith("batches were right") for line in log.read_text().splitlines())
