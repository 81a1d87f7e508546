"""The order of samples: a pure function of (seed, modality, pass, position), in O(1) memory.

A permutation of [0, n) is a keyed Feistel network on the smallest power of two that holds n, walked along its
cycles until it lands inside (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
Bijective for every key by construction, fresh for every pass, and any worker can compute any place of it.

With Blocks, samples are numbered as they lie (shard after shard). Blocks of neighbours are permuted, and
the samples of a group of blocks are shuffled with each other: draws near each other lie in few places.
`lane_draws` gives each of several lanes (virtual ranks) a run of draws of its own: a lane reads one group at
a time, while a batch takes its samples from as many groups as there are lanes.
"""

import hashlib
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MINIMUM_BITS = 4  # of the network: narrower ones reach too few permutations
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits to 64 well-mixed bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: NDArray[np.uint64], bits: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed bijection on [0, 2**bits): halves take turns to be xored with a function of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = x & low_mask, x >> low_bits
    for number in range(_ROUNDS):
        round_key = key + np.uint64((number + 1) * _GOLDEN & _MASK)
        if number % 2:
            high = high ^ (_mix(_mix(low + round_key) ^ key) & high_mask)
        else:
            low = low ^ (_mix(_mix(high + round_key) ^ key) & low_mask)
    return (high << low_bits) | low


@overload
def permute(position: int, n: int, key: int) -> int: ...
@overload
def permute(position: NDArray, n: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]: ...
def permute(position: int | NDArray, n: int, key: int | NDArray[np.uint64]) -> int | NDArray[np.int64]:
    """Where a keyed bijection on [0, n) sends a position.

    position: int or integer array of any shape; key: 64 bits, or an array of them of the same shape.
    Returns an int, or int64 of the shape of position. Raises ValueError outside [0, n).
    """
    places = np.asarray(position)
    if n < 1 or n > 1 << 62:
        raise ValueError(f"n must be 1 to 2**62, not {n}")
    if places.size and (places.min() < 0 or places.max() >= n):
        raise ValueError(f"positions must be in [0, {n})")
    flat = places.astype(np.uint64).ravel()
    if isinstance(key, int):
        keys = np.full(flat.shape, key & _MASK, np.uint64)
    else:
        keys = np.broadcast_to(np.asarray(key, np.uint64), places.shape).ravel()
    bits = max(_MINIMUM_BITS, (n - 1).bit_length())
    out = _feistel(flat, bits, keys)
    outside = np.flatnonzero(out >= np.uint64(n))
    while outside.size:
        out[outside] = _feistel(out[outside], bits, keys[outside])
        outside = outside[out[outside] >= np.uint64(n)]
    result = out.astype(np.int64).reshape(places.shape)
    return int(result) if isinstance(position, int) else result


@dataclass(frozen=True)
class Blocks:
    """`samples` neighbours are a block, `per_group` blocks of a pass are shuffled with each other."""

    samples: int
    per_group: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.per_group < 1:
            raise ValueError("a block has at least one sample and a group at least one block")

    @property
    def window(self) -> int:
        """Samples of a group."""
        return self.samples * self.per_group

    def shuffle_all(self, n: int) -> bool:
        """Whether one group holds all n samples: then the order is a permutation of single samples."""
        return self.window >= n


def permute_blocks(position: NDArray, n: int, key: NDArray[np.uint64], blocks: Blocks) -> NDArray[np.int64]:
    """As `permute`, by blocks: positions of one group of blocks.window have their images in its blocks.

    position, key: 1-D, int64 and uint64. The last block may be ragged: the permutation is one of all whole
    blocks, and the fewer than blocks.samples positions that fall behind n walk on along their cycles, away
    from their group. The last group may have fewer blocks.
    """
    if blocks.shuffle_all(n):
        return permute(position, n, key)
    if position.size and (position.min() < 0 or position.max() >= n):
        raise ValueError(f"positions must be in [0, {n})")
    count = -(-n // blocks.samples)
    out = _by_blocks(position, count, key, blocks)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _by_blocks(out[outside], count, key[outside], blocks)
        outside = outside[out[outside] >= n]
    return out


def _by_blocks(position: NDArray, count: int, key: NDArray[np.uint64], blocks: Blocks) -> NDArray[np.int64]:
    """The keyed bijection on [0, count * blocks.samples): within groups, then of the blocks."""
    group, inside = np.divmod(position, blocks.window)
    keys = _mix(key ^ _mix((group.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)))
    rest = count % blocks.per_group
    last = group == count // blocks.per_group if rest else np.zeros(len(group), bool)
    shuffled = np.empty(len(position), np.int64)
    for which, size in ((~last, blocks.window), (last, rest * blocks.samples)):
        if which.any():
            shuffled[which] = permute(inside[which], size, keys[which])
    block, offset = np.divmod(shuffled, blocks.samples)
    return permute(group * blocks.per_group + block, count, key) * blocks.samples + offset


def lane_draws(draw: NDArray, per_step: int, lanes: int, steps: int) -> NDArray[np.int64]:
    """The draws that steps take, where each lane has runs of consecutive ones.

    Step t takes the draws [t * per_step, (t + 1) * per_step), lane v the v-th of `lanes` equal parts of them.
    Of the draws of `steps` steps lane v is given the v-th part, in order: a bijection on every such window,
    and the identity for one step or one lane. Raises ValueError where lanes do not divide per_step.
    """
    if per_step % lanes or steps < 1:
        raise ValueError(f"{lanes} lanes cannot share {per_step} draws equally")
    part = per_step // lanes
    window, inside = np.divmod(np.asarray(draw, np.int64), per_step * steps)
    step, inside = np.divmod(inside, per_step)
    lane, place = np.divmod(inside, part)
    return window * (per_step * steps) + lane * (part * steps) + step * part + place


def lane_steps(n: int, per_step: int, lanes: int, blocks: Blocks) -> int:
    """Steps in which a lane reads a whole group, but no more than a pass over n samples has.

    1, which leaves all draws where they are, where a group holds everything: then no place is near another.
    """
    if blocks.shuffle_all(n):
        return 1
    return max(1, min(blocks.window * lanes // per_step, n // per_step))


def pass_keys(seed: int, modality: str, pass_number: NDArray) -> NDArray[np.uint64]:
    """The permutation key of each pass: uint64 of the shape of pass_number."""
    text = f"order\0{seed}\0{modality}".encode()
    stream = np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    passes = np.asarray(pass_number)
    flat = passes.astype(np.uint64).ravel() + np.uint64(1)  # 1-D: numpy warns of a scalar that wraps
    return _mix(stream + flat * np.uint64(_GOLDEN)).reshape(passes.shape)


@overload
def sample_at(
    draw: int, n: int, seed: int, modality: str, blocks: Blocks | None = None
) -> tuple[int, int]: ...
@overload
def sample_at(
    draw: NDArray, n: int, seed: int, modality: str, blocks: Blocks | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def sample_at(
    draw: int | NDArray, n: int, seed: int, modality: str, blocks: Blocks | None = None
) -> tuple[int, int] | tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(index, pass number) of the draw-th sample taken from a modality of n samples.

    draw: running number of draws of that modality, int or integer array, >= 0; pass = draw // n. Each pass
    is its own permutation of all n samples, without `blocks` one of single samples. Raises ValueError for a
    negative draw or n < 1.
    """
    draws = np.asarray(draw)
    if n < 1 or (draws.size and draws.min() < 0):
        raise ValueError("a draw is >= 0, of at least one sample")
    passes = (draws // n).astype(np.int64)
    keys = pass_keys(seed, modality, passes).reshape(-1)
    places = (draws % n).reshape(-1)
    index = permute(places, n, keys) if blocks is None else permute_blocks(places, n, keys, blocks)
    if isinstance(draw, int):
        return int(index[0]), int(passes)
    return index.reshape(draws.shape), passes
