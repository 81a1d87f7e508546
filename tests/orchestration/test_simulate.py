"""The simulator holds the plan to its promises, and sees each way in which a plan can break one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestration.cli import main
from orchestration.simulate import Plan, render, simulate, split_samples
from trainer.batches import plan_batch, plan_steps
from trainer.config_data import DataConfig, OrderConfig

COUNTS = split_samples(1_000, {"ct": 0.72, "mr": 0.25, "us": 0.02, "xr": 0.01})
DATA = DataConfig(modalities=tuple(COUNTS), batch_size=64)
RANKS = 4
REPOSITORY = Path(__file__).parents[2]


def small(plan: Plan = plan_batch, data: DataConfig = DATA, **options):
    return simulate(
        COUNTS,
        data,
        RANKS,
        plan=plan,
        plan_many=None if plan is not plan_batch else plan_steps,
        again=4,
        **options,
    )


@pytest.fixture(scope="module")
def sound():
    return small()


def test_the_plan_of_today_holds_every_promise(sound):
    assert sound.held, render(sound)
    assert all(check.looked for check in sound.checks.values())
    assert all(n >= 1 for n in sound.passes.values()) and sound.passes["xr"] >= 70
    assert sound.draws == sound.steps * 64
    assert sound.worlds == (8, 4, 2)


def test_other_kinds_of_sampling_hold_theirs():
    counts = {"ct": 1_000, "mr": 600, "us": 300}
    data = DataConfig(modalities=tuple(counts), batch_size=64, sampling="temperature", sampling_temperature=2)
    found = simulate(counts, data, 8, again=4, window=4)
    assert found.held, render(found)


def test_samples_are_shared_out_to_the_last_one():
    counts = split_samples(105_006_320, {"ct": 0.72, "mr": 0.25, "us": 0.02, "xr": 0.01})
    assert sum(counts.values()) == 105_006_320 and counts["ct"] == 75_604_550


def changed(modality: str, change) -> Plan:
    """plan_batch with a mistake in one modality: change(step, rank, world, index, passes)."""

    def plan(step, counts, data, seed, rank, world):
        part = plan_batch(step, counts, data, seed, rank, world)
        return part | {modality: change(step, rank, world, *part[modality])}

    return plan


def unequal(step, counts, data, seed, rank, world):
    part = plan_batch(step, counts, data, seed, rank, world)
    return part | {"ct": tuple(np.append(a, a[:1]) for a in part["ct"])} | {"us": part["us"]}


WRONG = {
    "one more CT than US": (unequal, "equal"),
    "a modality left out": (
        lambda *a: {m: part for m, part in plan_batch(*a).items() if m != "xr"},
        "equal",
    ),
    "each batch twice": (lambda step, *a: plan_batch(step // 2, *a), "pass"),
    "a sample never drawn": (
        changed("us", lambda step, rank, world, i, p: (np.where(i == 7, 8, i), p)),
        "pass",
    ),
    "a sample that is not there": (
        changed("mr", lambda step, rank, world, i, p: (i + (i == 3) * 10**6, p)),
        "pass",
    ),
    "two passes mixed up": (
        changed("mr", lambda step, rank, world, i, p: (i, p + 2 * (step % 5 == 4))),
        "pass",
    ),
    "drawn with replacement": (
        changed(
            "ct",
            lambda step, rank, world, i, p: (np.random.default_rng(step).permutation(COUNTS["ct"])[i], p),
        ),
        "pass",
    ),
    "all ranks the same": (
        lambda step, counts, data, seed, rank, world: plan_batch(step, counts, data, seed, 0, world),
        "overlap",
    ),
    "a seed for each world": (
        lambda step, counts, data, seed, rank, world: plan_batch(
            step, counts, data, seed + world, rank, world
        ),
        "world",
    ),
    "a step that depends on the world": (
        lambda step, counts, data, seed, rank, world: plan_batch(
            step + (world == 2), counts, data, seed, rank, world
        ),
        "elastic",
    ),
}


def test_an_order_whose_reads_are_scattered_is_seen():
    order = OrderConfig(block_samples=8, group_blocks=4)
    counts, data = {"ct": 20_000}, DataConfig(modalities=("ct",), batch_size=8, order=order)
    keys = data.model_copy(update={"order": OrderConfig(layout="keys")})

    def scattered(step, counts, data, seed, rank, world):
        return plan_batch(step, counts, keys, seed, rank, world)

    assert simulate(counts, data, 8, steps=9, again=2).checks["blocks"].broken == 0
    found = simulate(counts, data, 8, steps=9, plan=scattered, plan_many=None, again=2)
    assert [name for name, check in found.checks.items() if check.broken] == ["blocks"]


def test_steps_planned_together_are_the_batches_of_each():
    found = simulate(COUNTS, DATA, RANKS, plan=lambda step, *a: plan_batch(step + 1, *a), again=4)
    assert found.checks["world"].broken


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_plan_is_seen(mistake):
    plan, promise = WRONG[mistake]
    found = small(plan)
    assert not found.held and found.checks[promise].broken, render(found)
    assert found.checks[promise].first and "BROKEN" in render(found)


def test_the_command_prints_what_it_took_and_ends_with_1_when_a_promise_is_broken(capsys, monkeypatch):
    command = [
        "simulate",
        "--samples",
        "60",
        "--share",
        "ct=2",
        "--share",
        "us=1",
        "--ranks",
        "2",
        "--batch-per-rank",
        "4",
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held"] and found["steps"] == 10 and found["peak_bytes"] > 0 and found["cpu_seconds"] > 0
    monkeypatch.setattr(
        "orchestration.simulate.simulate.__defaults__",
        (None, 0, WRONG["each batch twice"][0], None, 4, 4, print),
    )
    assert main([*command]) == 1
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--samples", "nan"], "--samples nan"),
        (["--samples", "3"], "none for us"),
        (["--share", "ct"], "ct=.72"),
        (["--share", "ct=1", "--share", "ct=2"], "once"),
        (["--ranks", "3", "--batch-per-rank", "7"], "multiple of the 4 modalities"),
        (
            ["--ranks", "3", "--batch-per-rank", "4", "--share", "ct=1", "--set", "data.split=nowhere"],
            "split",
        ),
        (["--set", "max_steps=3"], "data.*"),
        (["--set", "data.modalities=[ct]"], "--share"),
    ],
)
def test_impossible_input_is_one_line(arguments, text, capsys):
    assert main(["simulate", *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and text in err


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_105_million_samples_on_256_ranks_hold_under_1_gb_and_5_minutes_of_a_core():
    """In a process of its own: its peak of memory is looked at."""
    command = [sys.executable, "-m", "orchestration.cli", "simulate", "--samples", "105e6", "--ranks", "256"]
    done = subprocess.run([*command, "--json"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["held"], found["checks"]
    assert found["counts"]["ct"] == 75_600_000 and all(n >= 1 for n in found["passes"].values())
    assert found["cpu_seconds"] < 300
    assert found["peak_bytes"] < 1e9
