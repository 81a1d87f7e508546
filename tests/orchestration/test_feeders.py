"""How many augmentation actors a rank may have; without Ray."""

import pytest

from orchestration.feed import Feeders, choose_feeders
from orchestration.pretrain_job import pretrain
from shards.errors import UserError
from tests.trainer.fake import tiny

MIB = 2**20


def test_a_users_number_is_obeyed_and_auto_stays_within_cpus_and_object_store():
    large = 10_000 * MIB
    assert choose_feeders(7, 0, ranks=2, nbytes=MIB, cpus=2, store=large) == Feeders(7, 7, 0)
    assert choose_feeders(None, 0, ranks=2, nbytes=MIB, cpus=16, store=large) == Feeders(1, 7, 0)
    assert choose_feeders(None, 5, ranks=8, nbytes=MIB, cpus=8, store=large) == Feeders(1, 1, 5)
    # 200 MiB: half for 2 ranks, 50 batches each, of which 3 are beyond the actors' own.
    assert choose_feeders(None, 40, ranks=2, nbytes=MIB, cpus=64, store=200 * MIB) == Feeders(1, 7, 40)


def test_numbers_whose_batches_would_spill_are_refused_with_the_fix():
    with pytest.raises(UserError, match=r"has 200 MiB, .* 2 ranks of 48 feeders each need 205: .*memory, or"):
        choose_feeders(48, 0, ranks=2, nbytes=MIB, cpus=64, store=200 * MIB)
    with pytest.raises(UserError, match="--object-store-memory"):
        choose_feeders(None, 0, ranks=1, nbytes=30 * MIB, cpus=64, store=200 * MIB)


def test_overflow_without_a_cluster_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="--overflow-feeders are for the other nodes of a cluster"):
        pretrain(tiny(), tmp_path / "run", overflow=2)
    assert not (tmp_path / "run").exists()
