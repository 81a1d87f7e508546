"""Unequal numbers of images of each modality (method.md 3-E): exact in the long run, equal on any world."""

from collections import Counter

import pytest

from shards.errors import UserError
from tests.batches import make
from trainer.batches import BatchMaker, plan_batch
from trainer.config import DataConfig, TrainConfig, check_world, few_samples_warning
from trainer.sampling import draws_taken, sampling_weights

COUNTS = {"ct": 720, "mr": 250, "us": 17, "xr": 13}
PROPORTIONAL = DataConfig(modalities=tuple(COUNTS), batch_size=480, sampling="proportional")


def of_step(data, step, world=1):
    """Sorted (modality, index, pass) of a step, and the sizes of each rank's part."""
    parts = [plan_batch(step, COUNTS, data, 3, rank, world) for rank in range(world)]
    pairs = [(m, i, p) for part in parts for m in part for i, p in zip(*map(list, part[m]), strict=True)]
    return sorted(pairs), [{m: len(part[m][0]) for m in part} for part in parts]


@pytest.mark.parametrize("weights", [(720, 250, 17, 13), (13, 17, 250, 720), (1, 1, 1), (1, 999_999), (5,)])
def test_every_share_is_exact_in_the_long_run_and_never_shrinks(weights):
    before = draws_taken(0, weights)
    for total in range(1, 3000):
        taken = draws_taken(total, weights)
        assert sum(taken) == total and all(b - a in (0, 1) for a, b in zip(before, taken, strict=True))
        exact = [total * w / sum(weights) for w in weights]
        assert all(abs(a - b) <= len(weights) / 2 for a, b in zip(taken, exact, strict=True))
        before = taken
    far = draws_taken(10**15, weights)  # whole periods: exactly the shares
    assert all(
        abs(t * sum(weights) - 10**15 * w) <= 2 * sum(weights) for t, w in zip(far, weights, strict=True)
    )


@pytest.mark.parametrize("step", [0, 1, 123_457])
def test_a_step_holds_the_same_images_on_every_world_and_ranks_hold_equal_numbers(step):
    whole, _ = of_step(PROPORTIONAL, step)
    for world in (2, 3, 8):
        pairs, sizes = of_step(PROPORTIONAL, step, world)
        assert pairs == whole and {sum(s.values()) for s in sizes} == {480 // world}
        for m in COUNTS:
            assert max(s[m] for s in sizes) - min(s[m] for s in sizes) <= 1


def test_passes_of_all_modalities_go_along_and_no_image_comes_twice_in_one():
    seen = Counter()
    for step in range(25):  # 12,000 images: 12 passes over 1,000
        seen.update(of_step(PROPORTIONAL, step, 1 + step % 2)[0])
    assert set(seen.values()) == {1}
    for m, count in COUNTS.items():
        draws = sum(1 for name, _, _ in seen if name == m)
        assert abs(draws - 12 * count) <= 2
        complete = {(m, i, p) for p in range(draws // count) for i in range(count)}
        assert complete <= set(seen)


def test_temperature_lies_between_proportional_and_equal():
    def shares(temperature):
        data = DataConfig(
            modalities=tuple(COUNTS), batch_size=480, sampling="temperature", sampling_temperature=temperature
        )
        weights = sampling_weights(data, COUNTS)
        return [w / sum(weights) for w in weights]

    assert shares(1) == pytest.approx([0.72, 0.25, 0.017, 0.013], abs=1e-6)
    roots = [n**0.5 for n in COUNTS.values()]
    assert shares(2) == pytest.approx([r / sum(roots) for r in roots], abs=1e-6)
    assert shares(1e9) == pytest.approx([0.25] * 4, abs=1e-6)


def test_what_cannot_work_is_refused_with_the_fix():
    few = PROPORTIONAL.model_copy(update={"batch_size": 48})
    with pytest.raises(UserError, match=r"0\.6 images of xr in a batch of 48.* to 385 or more"):
        sampling_weights(few, COUNTS)
    enough = PROPORTIONAL.model_copy(update={"batch_size": 385})
    assert all(
        part[0].size for step in range(200) for part in plan_batch(step, COUNTS, enough, 0, 0, 1).values()
    )
    with pytest.raises(ValueError, match=r"queue_length=0, data\.sampling=equal"):
        TrainConfig(data=PROPORTIONAL, swav={"queue_length": 480})
    TrainConfig(data=PROPORTIONAL, swav={"queue_length": 480, "groups": "shared"})
    with pytest.raises(ValueError, match="sampling_temperature goes with"):
        DataConfig(sampling="temperature")
    with pytest.raises(ValueError, match="sampling_temperature goes with"):
        DataConfig(sampling_temperature=2)
    config = TrainConfig(data=PROPORTIONAL, swav={"queue_length": 0})
    with pytest.raises(UserError, match=r"7 ranks cannot share .*: use a multiple of 7"):
        check_world(config, 7)
    assert "at most 120 samples per rarest modality" in (few_samples_warning(config) or "")
    enough = config.model_copy(update={"swav": config.swav.model_copy(update={"prototypes": 100})})
    assert few_samples_warning(enough) is None
    assert "6 samples per rarest modality" in (few_samples_warning(enough, rarest=6.24) or "")


def test_batches_of_ranks_are_the_parts_of_one_and_say_their_sizes(root, bands):
    config = make.config(root, batch_size=54)  # 11 ct, 7 us, 9 xr: all of them twice
    data = config.data.model_copy(update={"sampling": "proportional"})
    config = config.model_copy(update={"data": data})
    whole = BatchMaker(config, 0, 1, bands)(0)
    assert whole.sizes == (22, 14, 18) and sorted(Counter(whole.keys).values()) == [2] * 27
    parts = [BatchMaker(config, rank, 2, bands)(0) for rank in range(2)]
    assert [part.sizes for part in parts] == [(11, 7, 9), (11, 7, 9)]
    assert sorted(key for part in parts for key in part.keys) == sorted(whole.keys)
    assert BatchMaker(make.config(root), 0, 1, bands)(0).sizes is None
