"""Batches from a dataset: which samples make a step's batch, and the batch itself. No torch.

A batch is a pure function of (configuration, dataset, band statistics, step, rank, world): any process can
make any batch, and its bytes depend on neither the process, nor the order of calls, nor the cache.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shards import exclusions, reads
from shards.codec import MAXIMUM_REDUCE
from shards.commit import committed_units
from shards.dataset import read_info
from shards.errors import UserError
from shards.ids import digest
from shards.objects import open_store
from shards.order import Blocks, lane_draws, lane_steps, sample_at
from trainer.augment import crops, views
from trainer.augment.bands import BandStatistics, Pyramid, VolumePyramid, fit_statistics
from trainer.augment.intensity import to_unit
from trainer.augment.views import Prepared
from trainer.augment.volume_views import PreparedVolume, prepare_volume, volume_views_of
from trainer.config import (
    DataConfig,
    Range,
    TrainConfig,
    ViewConfig,
    check_world,
)
from trainer.labels import LabelSet, SampleLabels, label_sets, sample_labels
from trainer.reading import BatchReads, Key, ReadAhead, open_reader, place_of
from trainer.rows import NEEDED_COLUMNS as NEEDED_COLUMNS
from trainer.rows import Modality as Modality
from trainer.rows import Plan, Rows, in_order, open_modalities
from trainer.rows import open_modality as open_modality
from trainer.rows import rows_of as rows_of
from trainer.sampling import rank_parts, sampling_weights
from trainer.volumes import box_of, decode_slices, slices_in
from trainer.whole import decode
from trainer.whole import eval_images as eval_images
from trainer.whole import whole_image as whole_image

_FIT_BATCH = 64  # images read together for the band statistics
REFERENCE_IMAGES = 1000  # R of the paper: images that the band statistics are fitted to


@dataclass(frozen=True)
class Batch:
    """The part of one step's batch that one rank holds.

    crops: a uint8 array [count, n, size, size] (of volumes [count, n, slices, rows, columns]) for each group
    of crops; n = M * b images, modality-major: the first b belong to modalities[0]. keys, passes: [n].
    seconds: spent in read, decode, augment. sizes: images of each modality, where data.sampling makes them
    unequal; None: n / M of each. labels: of each set of supervision.labels, see
    trainer.labels.SampleLabels.of. reads: shards.reads.Counts of what was read, and cache_bytes, the decoded
    images that its maker keeps.
    """

    step: int
    crops: tuple[NDArray[np.uint8], ...]
    modalities: tuple[str, ...]
    keys: tuple[str, ...]
    passes: tuple[int, ...]
    seconds: dict[str, float]
    sizes: tuple[int, ...] | None = None
    labels: dict[str, NDArray[Any]] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)


def plan_batch(
    step: int, counts: Mapping[str, int], data: DataConfig, seed: int, rank: int, world: int
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """{modality: (catalogue indices, pass numbers)}, each int64[B / (M * world)], of a rank's part of a step.

    Step t takes draws [t * B/M, (t + 1) * B/M) of every modality, whatever the world size, each virtual rank
    a contiguous part of them from a lane of its own (shards.order.lane_draws); rank r holds the r-th
    contiguous part, which is whole virtual ranks. With data.sampling other than equal the numbers of draws
    are those of trainer.sampling instead, so are the ranks' parts, and there are no lanes. counts: samples of
    each modality. An index is a row of the table that `in_order` gives. Raises ValueError for a world size
    that does not divide B/M or B (check_world tells the user).
    """
    if data.sampling != "equal":
        return _plan_unequal(step, counts, data, seed, rank, world)
    many = plan_steps(range(step, step + 1), counts, data, seed, rank, world)
    return {m: (index[0], passes[0]) for m, (index, passes) in many.items()}


def plan_steps(
    steps: range, counts: Mapping[str, int], data: DataConfig, seed: int, rank: int, world: int
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """`plan_batch` with data.sampling=equal, of several steps at once: int64[steps, B / (M * world)]."""
    share, rest = divmod(data.per_modality, world)
    if rest or not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} cannot hold an equal part of {data.per_modality} images")
    first = np.array(steps, np.int64)[:, None] * data.per_modality + rank * share
    draws = first + np.arange(share, dtype=np.int64)
    blocks = blocks_of(data)
    found = {}
    for m in data.modalities:
        n = counts[m]
        run = lane_steps(n, data.per_modality, data.lanes, blocks) if blocks else 1
        own = lane_draws(draws, data.per_modality, data.lanes, run)
        found[m] = sample_at(own, n, seed, m, blocks)
    return found


def blocks_of(data: DataConfig) -> Blocks | None:
    """How samples are shuffled; None: one by one."""
    order = data.order
    return Blocks(order.block_samples, order.group_blocks) if order.layout == "blocks" else None


def _plan_unequal(
    step: int, counts: Mapping[str, int], data: DataConfig, seed: int, rank: int, world: int
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    if data.batch_size % world or not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} cannot hold an equal part of {data.batch_size} images")
    weights = sampling_weights(data, counts)
    parts = rank_parts(step, data.batch_size, weights, rank, world)
    return {
        m: sample_at(np.arange(*part, dtype=np.int64), counts[m], seed, m, blocks_of(data))
        for m, part in zip(data.modalities, parts, strict=True)
    }


def choose_reduce(shape: tuple[int, int], config: ViewConfig, size_range: Range) -> int:
    """How many resolution levels (halvings) decoding may leave out: as many as still give the pixels that
    the finest view of an image of `shape` needs."""
    scale, reduce = crops.finest_scale(shape, config, size_range), 0
    while reduce < MAXIMUM_REDUCE and 0.5 ** (reduce + 1) >= scale:
        reduce += 1
    return reduce


class BatchMaker:
    """step -> Batch for one rank; the dataset is opened at the first batch, so that making one is cheap.

    bands: {modality: BandStatistics}, needed unless views.energy_probability is 0. data.cache_bytes of
    decoded images with their bands are kept: the first ones that come, none is ever evicted, because under
    a fresh permutation each pass that hits more often than dropping the least recently used. The reads of a
    batch are joined where they are near each other and made ahead of decoding (trainer.reading).
    fingerprint, labels: of the dataset and the label tables that the run began with (labels: None reads them
    now). A worker that starts later must not make other batches from what was added since.
    Raises UserError: a world size that cannot be served, no samples of a modality, missing statistics,
    another fingerprint, labels that cannot be used or have changed.
    """

    def __init__(
        self,
        config: TrainConfig,
        rank: int,
        world: int,
        bands: Mapping[str, BandStatistics] | None,
        fingerprint: str | None = None,
        labels: Sequence[LabelSet] | None = None,
    ) -> None:
        check_world(config, world)
        self._config, self._rank, self._world, self._fingerprint = config, rank, world, fingerprint
        self._bands = _checked_bands(config, bands)
        self._label_sets, self._labels = labels, dict[str, dict[str, SampleLabels]]()
        self._opened: dict[str, Rows] | None = None
        self._ahead: ReadAhead | None = None
        self._cache: dict[tuple[str, int], Prepared | PreparedVolume] = {}
        self._cached_bytes = 0

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each modality in the configured split."""
        return {name: len(m) for name, m in self._modalities().items()}

    def __call__(self, step: int) -> Batch:
        modalities, config = self._modalities(), self._config
        assert self._ahead is not None
        of_batch = self._ahead.batch(step)
        plan = of_batch.plan
        seconds = {"read": 0.0, "decode": 0.0, "augment": 0.0}
        n = sum(len(index) for index, _ in plan.values())
        stacks = tuple(np.empty(shape, np.uint8) for shape in config.views.stack_shapes(n))
        keys: list[str] = []
        passes: list[int] = []
        for name in config.data.modalities:
            modality, bands, size_range = modalities[name], self._bands.get(name), _size_range(config, name)
            for index, number in zip(plan[name][0].tolist(), plan[name][1].tolist(), strict=True):
                prepared = self._prepared(modality, index, of_batch, seconds)
                began = time.perf_counter()
                key = modality.key(index)
                random_key = (config.seed, _number(key), number)
                groups = _views_of(prepared, config, bands, random_key, size_range)
                for stack, group in zip(stacks, groups, strict=True):
                    stack[:, len(keys)] = group
                keys.append(key)
                passes.append(number)
                seconds["augment"] += time.perf_counter() - began
        equal = config.data.sampling == "equal"
        sizes = None if equal else tuple(len(index) for index, _ in plan.values())
        of = _by_modality(keys, plan, config.data.modalities)
        labels = {
            name: np.concatenate([by_modality[m].of(of[m]) for m in config.data.modalities])
            for name, by_modality in self._labels.items()
        }
        cost = of_batch.finish() | {"cache_bytes": self._cached_bytes}
        names = config.data.modalities
        return Batch(step, stacks, names, tuple(keys), tuple(passes), seconds, sizes, labels, cost)

    def _needs(self, step: int) -> tuple[Plan, list[tuple[Key, reads.Place]]]:
        """The plan of a step, and where what it needs lies that is not in the cache of decoded images."""
        modalities, data = self._modalities(), self._config.data
        plan = plan_batch(step, self.counts, data, self._config.seed, self._rank, self._world)
        keys = [(name, index) for name, (indices, _) in plan.items() for index in indices.tolist()]
        return plan, [(k, place_of(modalities[k[0]], k[1], data)) for k in keys if k not in self._cache]

    def _modalities(self) -> dict[str, Rows]:
        if self._opened is None:
            cv2.setNumThreads(1)  # a batch is made by one thread; the cores belong to other workers
            data = self._config.data
            opened = {m: in_order(rows, data) for m, rows in open_modalities(data).items()}
            sampling_weights(data, {name: len(m) for name, m in opened.items()})  # can they be sampled so?
            if self._fingerprint is not None:  # after the rows are read: a dataset only ever grows
                _check_fingerprint(data.dataset, self._fingerprint)
            sets = label_sets(self._config) if self._label_sets is None else self._label_sets
            self._labels = sample_labels(self._config, sets)
            self._opened = opened
            self._ahead = ReadAhead(open_reader(data), self._needs)
        return self._opened

    def _prepared(
        self, modality: Rows, index: int, of_batch: BatchReads, seconds: dict[str, float]
    ) -> Prepared | PreparedVolume:
        cached = self._cache.get((modality.name, index))
        if cached is not None:
            return cached
        began = time.perf_counter()
        data = of_batch.take((modality.name, index))
        seconds["read"] += time.perf_counter() - began
        prepared = _prepare(self._config, modality, index, data, seconds)
        if self._cached_bytes + prepared.nbytes <= self._config.data.cache_bytes:
            self._cache[modality.name, index] = prepared
            self._cached_bytes += prepared.nbytes
        return prepared


def _by_modality(keys: Sequence[str], plan: Plan, modalities: Sequence[str]) -> dict[str, Sequence[str]]:
    """The keys of a batch, which are modality-major."""
    ends = np.cumsum([len(plan[m][0]) for m in modalities]).tolist()
    return {m: keys[start:end] for m, start, end in zip(modalities, [0, *ends], ends, strict=False)}


def dataset_fingerprint(root: str) -> str:
    """Changes when units are added to a dataset, when other samples are left out of it (shards.exclusions) or
    another dataset takes its place. Raises UserError."""
    store = open_store(root)
    info = read_info(store)
    left_out = exclusions.read(store).keys().to_pylist()
    also = [digest("left out", *left_out)] if left_out else []
    return digest(info.fingerprint, info.key_id, *sorted(committed_units(store)), *also)


def fit_bands(
    config: TrainConfig, limit: int = REFERENCE_IMAGES, progress: Callable[[int, int], None] | None = None
) -> dict[str, BandStatistics]:
    """Band statistics of every modality from `limit` images spread over the split, or all there are.

    The images are brought to the same working resolution as in training (views.prepare).
    progress(done, total) is called after each image, and may raise to stop. Raises UserError.
    """
    cv2.setNumThreads(1)
    reader = open_reader(config.data)
    opened = list(open_modalities(config.data).values())
    done, total = 0, sum(min(limit, len(modality)) for modality in opened)

    def told(pyramids: Iterator[Pyramid | VolumePyramid]) -> Iterator[Pyramid | VolumePyramid]:
        nonlocal done
        for pyramid in pyramids:
            yield pyramid
            done += 1
            if progress is not None:
                progress(done, total)

    statistics = {}
    for modality in opened:
        n = min(limit, len(modality))
        # Keys are keyed hashes: evenly spaced rows of the sorted catalogue are a random sample.
        chosen = [i * len(modality) // n for i in range(n)]
        pyramids = told(_pyramids(config, modality, chosen, reader))
        statistics[modality.name] = fit_statistics(pyramids, config.views.sigmas)
    return statistics


def _pyramids(
    config: TrainConfig, modality: Rows, indices: list[int], reader: reads.BatchReader
) -> Iterator[Pyramid | VolumePyramid]:
    seconds = {"read": 0.0, "decode": 0.0, "augment": 0.0}
    for first in range(0, len(indices), _FIT_BATCH):
        batch = indices[first : first + _FIT_BATCH]
        under_way = reader.start([reads.Place(modality.name, **modality.location(i)) for i in batch])
        for number, index in enumerate(batch):
            data = under_way.take(number)
            yield _prepare(config, modality, index, data, seconds, with_bands=True).pyramid


def _prepare(
    config: TrainConfig,
    modality: Rows,
    index: int,
    data: bytes,
    seconds: dict[str, float],
    with_bands: bool | None = None,
) -> Prepared | PreparedVolume:
    """One sample decoded no further than its views need, and split into bands."""
    row = modality.row(index)
    if with_bands is None:
        with_bands = config.views.energy_probability > 0
    intensity = config.data.intensity_of(modality.name)
    began = time.perf_counter()
    if config.views.volume is not None:
        volume = decode_slices(slices_in(data, row), row)
        decoded = time.perf_counter()
        box = box_of(volume, row, config.views.volume, intensity)
        boxed = prepare_volume(box, config.views, with_bands)
        seconds["decode"] += decoded - began
        seconds["augment"] += time.perf_counter() - decoded
        return boxed
    size_range = _size_range(config, modality.name)
    pixels = decode(data, row, choose_reduce((row["rows"], row["columns"]), config.views, size_range))
    decoded = time.perf_counter()
    prepared = views.prepare(to_unit(pixels, row, intensity), config.views, with_bands, size_range)
    seconds["decode"] += decoded - began
    seconds["augment"] += time.perf_counter() - decoded
    return prepared


def _views_of(
    prepared: Prepared | PreparedVolume,
    config: TrainConfig,
    bands: BandStatistics | None,
    key: tuple[int, ...],
    size_range: Range,
) -> list[NDArray[np.uint8]]:
    if isinstance(prepared, PreparedVolume):
        return volume_views_of(prepared, config.views, bands, key)
    return views.views_of(prepared, config.views, bands, key, size_range)


def _size_range(config: TrainConfig, modality: str) -> Range:
    return config.views.size_range.get(modality, config.views.default_size_range)


def _number(key: str) -> int:
    """64 bits of a sample key: the sample's own random numbers, whatever else the dataset holds."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _check_fingerprint(root: str, expected: str) -> None:
    if dataset_fingerprint(root) != expected:
        raise UserError(
            "the dataset changed while the run goes on (units were added or removed), which would change its "
            "batches: ingest into another folder, or start another run folder to train on the data there are"
        )


def _checked_bands(
    config: TrainConfig, bands: Mapping[str, BandStatistics] | None
) -> dict[str, BandStatistics]:
    if config.views.energy_probability == 0:
        return {}
    for name in config.data.modalities:
        if bands is None or name not in bands:
            raise UserError(
                f"the energy augmentation needs band statistics of {name}: write them with "
                "medswav fit-energy, or set views.energy_probability=0"
            )
        if bands[name].sigmas != config.views.sigmas:
            raise UserError(
                f"the band statistics of {name} were fitted with sigmas {list(bands[name].sigmas)}, "
                f"views.sigmas is {list(config.views.sigmas)}: run medswav fit-energy again"
            )
    assert bands is not None
    return {name: bands[name] for name in config.data.modalities}
