"""The order of samples is a permutation of every pass, fresh each pass, computed place by place."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import permute, sample_at

SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), key=SEEDS)
def test_every_key_gives_a_permutation(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [2**k + d for k in range(1, 17, 3) for d in (-1, 0, 1)])
def test_a_permutation_around_powers_of_two(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, 7)), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 500), seed=SEEDS, first=st.integers(0, 2000))
def test_any_window_of_draws_agrees_with_single_draws(n, seed, first):
    draws = np.arange(first, first + 7)
    index, passes = sample_at(draws, n, seed, "ct")
    assert [sample_at(int(d), n, seed, "ct") for d in draws] == list(zip(index, passes, strict=True))
    assert np.array_equal(passes, draws // n)


def test_each_pass_holds_every_sample_once_and_is_fresh():
    n = 101
    index, passes = sample_at(np.arange(20 * n), n, 3, "mr")
    orders = index.reshape(20, n)
    assert all(np.array_equal(np.sort(order), np.arange(n)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 20
    assert np.array_equal(passes.reshape(20, n)[:, 0], np.arange(20))


def test_seed_and_modality_change_the_order():
    draws = np.arange(50)
    orders = {sample_at(draws, 50, seed, m)[0].tobytes() for seed in (0, 1, -1) for m in ("ct", "mr")}
    assert len(orders) == 6


def test_golden_values_hold_over_versions():
    assert permute(np.arange(12), 12, 0).tolist() == [0, 3, 1, 7, 11, 5, 4, 6, 2, 9, 10, 8]
    assert sample_at(np.arange(10), 5, 0, "ct")[0].tolist() == [0, 3, 1, 2, 4, 4, 1, 3, 0, 2]
    assert sample_at(10**12 + 7, 105_006_320, 42, "xr") == (79850389, 9523)


def test_memory_does_not_grow_with_n():
    tracemalloc.start()
    sample_at(np.arange(1000), 10**15, 0, "ct")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_places_are_spread_evenly():
    n, passes = 50, 4000
    index, _ = sample_at(np.arange(n * passes), n, 1, "ct")
    # Where sample 0 comes within a pass: chi-square of 50 cells with 80 expected (mean 49, sd 9.9).
    places = np.argwhere(index.reshape(passes, n) == 0)[:, 1]
    statistic = ((np.bincount(places, minlength=n) - 80) ** 2 / 80).sum()
    assert statistic < 100
    # A sample's successor is as good as any: no fixed pairs survive from pass to pass.
    assert len(set(index.reshape(passes, n)[:, 1])) == n


@pytest.mark.parametrize(("position", "n"), [(5, 5), (-1, 5), (0, 0)])
def test_positions_outside_are_refused(position, n):
    with pytest.raises(ValueError, match="must be"):
        permute(position, n, 0)
    with pytest.raises(ValueError):
        sample_at(-1, 5, 0, "ct")
