"""Elastic ranks without a cluster: which numbers are allowed, and what ranks are told that end early."""

import asyncio
from types import SimpleNamespace

import pytest

from orchestration import elastic
from orchestration.elastic import Ranks, count_ranks, parse_ranks, possible_ranks
from orchestration.pretrain_rank import Control
from shards.errors import UserError
from trainer.config import load_config

SETTINGS = ["data.dataset=x", "data.modalities=[ct,us,xr]", "data.batch_size=18"]  # 6 images of each


def test_only_numbers_of_ranks_that_share_a_batch_equally_are_taken():
    config = load_config("demo", SETTINGS)
    assert possible_ranks(config, 1, 8) == Ranks((1, 2, 3, 6))
    assert possible_ranks(config, 2, 2) == Ranks((2,))
    assert possible_ranks(config, 1, 8).text() == "1, 2, 3 or 6"
    virtual = load_config("demo", [*SETTINGS, "data.virtual_ranks=2"])
    assert possible_ranks(virtual, 1, 8) == Ranks((1, 2))
    for fewest, most in ((4, 4), (4, 5), (7, 9)):
        with pytest.raises(UserError, match="ranks"):
            possible_ranks(config, fewest, most)


def test_two_bounds_are_read_and_a_wrong_text_is_refused():
    assert parse_ranks("8") == (8, 8) and parse_ranks("2:8") == (2, 8)
    for text in ("0", "8:2", "two", "2:", ":8", "1:2:3"):
        with pytest.raises(UserError, match="--ranks"):
            parse_ranks(text)


def test_as_many_ranks_as_find_a_place_on_nodes_that_stay(monkeypatch):
    from ray.train.v2.api.config import ScalingConfig

    assert [count_ranks(n, (2, 4)) for n in range(6)] == [0, 0, 2, 2, 4, 4]
    scaling = ScalingConfig(num_workers=(1, 6), resources_per_worker={"CPU": 2})
    policy = elastic.whole_batches(scaling, (1, 2, 3, 6), control=None)
    nodes = {name: {"CPU": 4.0} for name in ("head", "one", "two")}
    lost: set[str] = set()
    monkeypatch.setattr(elastic, "lost_nodes", lambda: lost)
    assert policy._count_possible_workers(nodes) == 6
    lost.add("one")
    assert policy._count_possible_workers(nodes) == 3  # four would find a place and cannot share a batch
    lost.update(nodes)
    assert policy._count_possible_workers(nodes) == 0


def test_ranks_that_are_to_become_more_save_first(monkeypatch):
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ResizeDecision
    from ray.train.v2.api.config import ScalingConfig

    box = Control()

    def call(method):
        return SimpleNamespace(remote=lambda *given: asyncio.run(method(*given)))

    control = SimpleNamespace(
        request_pause=call(box.request_pause), is_paused=call(box.is_paused), resume=call(box.resume)
    )
    monkeypatch.setattr("ray.get", lambda value, timeout=None: value)
    resize = ResizeDecision(num_workers=3, resources_per_worker={"CPU": 2})
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: resize)
    policy = elastic.whole_batches(ScalingConfig(num_workers=(1, 3)), (1, 2, 3), control)
    assert policy.make_decision_for_running_worker_group(None, None) is not resize
    assert policy.make_decision_for_running_worker_group(None, None) is not resize, "they are still at work"
    asyncio.run(box.tell("result", {"step": 7, "finished": False}))
    assert asyncio.run(box.outcome()) == "wait"
    assert policy.make_decision_for_running_worker_group(None, None) is resize
    state = asyncio.run(box.drain())
    assert "saved step 7" in state.notes[0] and state.result is None


def told(*calls: tuple[str, ...]) -> tuple[str, Control]:
    """The outcome of ranks that end unfinished at step 7 after such calls."""

    async def play(control: Control) -> str:
        for name, *given in calls:
            await getattr(control, name)(*given)
        await control.tell("result", {"step": 7, "finished": False})
        return await control.outcome()

    box = Control()
    return asyncio.run(play(box)), box


def test_a_stop_ends_the_job_and_a_leaving_node_does_not():
    outcome, box = told(("request_stop",))
    assert outcome == "end" and asyncio.run(box.drain()).result == {"step": 7, "finished": False}
    outcome, box = told()  # nobody asked: a node is about to go
    assert outcome == "leave"
    asyncio.run(box.tell("failure", "LeavingError"))
    state = asyncio.run(box.drain())
    assert state.failures == 0 and state.result is None and "saved step 7" in state.notes[0]
    asyncio.run(box.tell("start", (7, 2)))
    asyncio.run(box.tell("failure", "OSError"))
    assert asyncio.run(box.drain()).failures == 1


def test_a_stop_while_the_ranks_wait_for_others_ends_the_job():
    outcome, box = told(("request_pause",))
    assert outcome == "wait"
    asyncio.run(box.request_stop())
    assert asyncio.run(box.outcome()) == "end"
    assert asyncio.run(box.drain()).result == {"step": 7, "finished": False}
