"""How many images of each modality a batch holds (method.md 3-E): a pure function of the step, no state.

`equal` is the method: B/M of each. With `proportional` and `temperature` the long-run shares are those of the
modalities' sizes, or of their T-th roots; single batches differ from them by a few images.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from shards.errors import UserError
from trainer.config_data import DataConfig

_RESOLUTION = 1_000_000  # of the shares of `temperature`: no last bit of a power decides what is sampled


def sampling_weights(data: DataConfig, counts: Mapping[str, int]) -> tuple[int, ...]:
    """Integers whose ratios are the long-run shares of data.modalities; counts: images of each.

    Raises UserError where a batch could be without a modality, which then would have no codes.
    """
    if data.sampling == "equal":
        return (1,) * len(data.modalities)
    sizes = [counts[name] for name in data.modalities]
    if data.sampling == "temperature":
        assert data.sampling_temperature is not None
        roots = [size ** (1 / data.sampling_temperature) for size in sizes]
        sizes = [max(1, round(_RESOLUTION * root / sum(roots))) for root in roots]
    rarest = min(range(len(sizes)), key=sizes.__getitem__)
    least, total = len(sizes) + 1, sum(sizes)
    if data.batch_size * sizes[rarest] < least * total:
        raise UserError(
            f"data.sampling={data.sampling} puts {data.batch_size * sizes[rarest] / total:.1f} images of "
            f"{data.modalities[rarest]} in a batch of {data.batch_size}, and at least {least} are needed to "
            f"have some in every batch: set data.batch_size to {-(-least * total // sizes[rarest])} or more, "
            "raise data.sampling_temperature (with sampling=temperature), or leave the modality out"
        )
    return tuple(sizes)


def draws_taken(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """How many of the first `total` draws are of each modality; they sum to `total`.

    Each modality in turn takes its rounded share of what those before it left. So every number only grows
    with `total`, and stays within len(weights)/2 of its exact share total * w / sum(weights) for ever.
    """
    taken, left, weight_left = [], total, sum(weights)
    for weight in weights:
        own = (2 * left * weight + weight_left) // (2 * weight_left)
        taken.append(own)
        left, weight_left = left - own, weight_left - weight
    return tuple(taken)


def rank_parts(
    step: int, batch_size: int, weights: Sequence[int], rank: int, world: int
) -> list[tuple[int, int, int]]:
    """(first draw, end, stride) of each modality for a rank's part of a step.

    The batch is the draws of all modalities, one modality after the other; of these a rank holds every
    world-th, so ranks hold batch_size / world images each and modalities equally to within one image.
    """
    before = draws_taken(step * batch_size, weights)
    after = draws_taken((step + 1) * batch_size, weights)
    sizes = [b - a for a, b in zip(before, after, strict=True)]
    starts = accumulate(sizes[:-1], initial=0)
    return [
        (first + (rank - start) % world, end, world)
        for first, end, start in zip(before, after, starts, strict=True)
    ]
