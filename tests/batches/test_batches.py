"""Batches from a small dataset: content, determinism, errors."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestration import feed
from shards import catalog
from shards.commit import commit_unit
from shards.errors import UserError
from shards.ids import digest
from shards.store import Store
from tests.batches import make
from trainer import workers
from trainer.augment import bands as band
from trainer.batches import BatchMaker, dataset_fingerprint, eval_images, fit_bands
from trainer.config import IntensityConfig

REPOSITORY = Path(__file__).parents[2]


def same(a, b):
    return (
        a.keys == b.keys
        and a.passes == b.passes
        and all(np.array_equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
    )


def test_a_batch_holds_its_crops_modality_major(root, bands):
    config = make.config(root)
    batch = BatchMaker(config, 0, 1, bands)(3)
    assert [c.shape for c in batch.crops] == [(2, 12, 40, 40), (3, 12, 24, 24)]
    assert all(c.dtype == np.uint8 for c in batch.crops)
    assert batch.step == 3 and batch.modalities == make.MODALITIES and len(batch.passes) == 12
    assert set(batch.seconds) == {"read", "decode", "augment"} and all(s > 0 for s in batch.seconds.values())
    for i, modality in enumerate(make.MODALITIES):
        there = set(catalog.load(root, modality, ["key"], "train")["key"].to_pylist())
        part = batch.keys[4 * i : 4 * i + 4]
        assert set(part) <= there
        assert len(set(zip(part, batch.passes[4 * i :], strict=False))) == 4
    for crops in batch.crops:  # every image, every crop has content
        assert (crops.reshape(*crops.shape[:2], -1).std(axis=2) > 0).all()


def test_counts_are_those_of_the_split(root, bands):
    assert BatchMaker(make.config(root), 0, 1, bands).counts == make.COUNTS


def test_the_ranks_parts_make_up_the_same_global_batch(root, bands):
    config = make.config(root)
    one = BatchMaker(config, 0, 1, bands)(5)
    for world in (2, 4):
        parts = [BatchMaker(config, rank, world, bands)(5) for rank in range(world)]
        b = 4 // world
        for i in range(3):
            keys = [k for part in parts for k in part.keys[i * b : (i + 1) * b]]
            assert keys == list(one.keys[4 * i : 4 * i + 4])
            for group, whole in enumerate(one.crops):
                pieces = [part.crops[group][:, i * b : (i + 1) * b] for part in parts]
                assert np.array_equal(np.concatenate(pieces, axis=1), whole[:, 4 * i : 4 * i + 4])


def test_batches_do_not_depend_on_the_order_of_calls(root, bands):
    config = make.config(root)
    forward, backward = BatchMaker(config, 0, 1, bands), BatchMaker(config, 0, 1, bands)
    first = {step: forward(step) for step in range(4)}
    assert all(same(backward(step), first[step]) for step in reversed(range(4)))


@pytest.mark.parametrize("cache_bytes", [1, 120_000, 1 << 30])
def test_batches_do_not_depend_on_the_cache(root, bands, cache_bytes):
    plain = BatchMaker(make.config(root), 0, 1, bands)
    cached = BatchMaker(make.config(root, cache_bytes=cache_bytes), 0, 1, bands)
    for step in range(8):  # more than one pass
        assert same(plain(step), cached(step))
    assert cached._cached_bytes <= cache_bytes
    assert (len(cached._cache) == sum(make.COUNTS.values())) == (cache_bytes == 1 << 30)


def test_a_fresh_process_makes_the_same_bytes_and_imports_no_torch(root, bands, tmp_path):
    config = make.config(root)
    band.save_statistics(tmp_path / "bands.json", bands)
    code = (
        "import sys, hashlib\n"
        "from trainer.augment.bands import load_statistics\n"
        "from trainer.batches import BatchMaker\n"
        "from trainer.config import TrainConfig\n"
        "config = TrainConfig.model_validate_json(sys.argv[1])\n"
        "batch = BatchMaker(config, 1, 2, load_statistics(sys.argv[2]))(6)\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
        "print(hashlib.sha256(b''.join(c.tobytes() for c in batch.crops)).hexdigest(), *batch.keys)\n"
    )
    command = [sys.executable, "-c", code, config.model_dump_json(), str(tmp_path / "bands.json")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
    here = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
    batch = BatchMaker(config, 1, 2, bands)(6)
    assert (
        out == here == [hashlib.sha256(b"".join(c.tobytes() for c in batch.crops)).hexdigest(), *batch.keys]
    )


def test_the_same_sample_is_augmented_anew_in_each_pass(root, bands):
    maker = BatchMaker(make.config(root), 0, 1, bands)
    seen: dict[str, list[tuple[int, bytes]]] = {}
    for step in range(6):
        batch = maker(step)
        for i, key in enumerate(batch.keys):
            crops = batch.crops[1][:, i]
            seen.setdefault(key, []).append((batch.passes[i], crops.tobytes()))
            assert len({c.tobytes() for c in crops}) == 3
    for draws in seen.values():
        assert len({p for p, _ in draws}) == len({b for _, b in draws}) == len(draws)


@pytest.mark.parametrize("codec", ["png16", "htj2k"])
def test_large_images_are_decoded_at_reduced_resolution(tmp_path, codec, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(make, "image", lambda m, n: (make.phantom(400, 420, seed=n) * 4095).astype(np.uint16))
    root = make.dataset(tmp_path / "data", tmp_path / "scratch", codec)
    config = make.config(root, cache_bytes=1 << 30)
    statistics = fit_bands(config, limit=2)
    maker = BatchMaker(config, 0, 1, statistics)
    maker(0)
    for prepared in maker._cache.values():
        assert prepared.shape == (200, 210)  # the finest view needs 134 px of an image: half is enough
        assert max(prepared.pyramid.shape) <= 140
    assert all(s.count == 2 for s in statistics.values())


def test_statistics_are_fitted_to_all_images_there_are(root, bands):
    assert {m: s.count for m, s in bands.items()} == make.COUNTS
    assert all(min(s.mean) > 0 and len(s.mean) == 6 for s in bands.values())
    assert fit_bands(make.config(root)) == bands


def test_missing_or_foreign_statistics_are_refused(root, bands):
    with pytest.raises(UserError, match="medswav fit-energy"):
        BatchMaker(make.config(root), 0, 1, None)
    with pytest.raises(UserError, match="statistics of us"):
        BatchMaker(make.config(root), 0, 1, {"ct": bands["ct"]})
    with pytest.raises(UserError, match="fitted with sigmas"):
        BatchMaker(make.config(root, sigmas=(1.0, 2.0)), 0, 1, bands)
    assert BatchMaker(make.config(root, energy_probability=0.0), 0, 1, None)(0).step == 0


def test_a_world_that_cannot_share_equally_is_refused(root, bands):
    with pytest.raises(UserError, match="multiple of 9"):
        BatchMaker(make.config(root), 0, 3, bands)


def test_a_modality_without_images_is_one_clear_line(root):
    config = make.config(root, energy_probability=0.0)
    data = config.data.model_copy(update={"modalities": ("ct", "mr", "us")})
    with pytest.raises(UserError, match="no mr images in split train"):
        BatchMaker(config.model_copy(update={"data": data}), 0, 1, None)(0)


def test_no_dataset_is_one_clear_line(tmp_path):
    config = make.config(str(tmp_path / "none"), energy_probability=0.0)
    with pytest.raises(UserError):
        BatchMaker(config, 0, 1, None)(0)


def test_probes_see_whole_images_with_their_aspect(root):
    keys, images, table = eval_images(root, "xr", 32, IntensityConfig())
    assert images.shape == (make.COUNTS["xr"] + 2, 1, 32, 32) and images.dtype == np.float32
    assert list(keys) == sorted(keys) == table["key"].to_pylist()
    assert images.min() >= 0 and images.max() <= 1
    for image, row in zip(images[:, 0], table.to_pylist(), strict=True):
        height, width = (round(row[s] * 32 / max(row["rows"], row["columns"])) for s in ("rows", "columns"))
        y, x = (32 - height) // 2, (32 - width) // 2
        inside = image[y : y + height, x : x + width]
        assert image.sum() == pytest.approx(inside.sum()) and inside.std() > 0.05
    train, _, _ = eval_images(root, "xr", 32, {"ct": IntensityConfig(mode="recorded")}, split="train")
    assert len(train) == make.COUNTS["xr"] and set(train) < set(keys)


def test_configuration_survives_json(root):
    config = make.config(root)
    assert type(config).model_validate(json.loads(config.model_dump_json())) == config


def test_a_dataset_that_grew_since_the_run_began_is_refused(tmp_path, bands):
    root = make.dataset(tmp_path / "data", tmp_path / "scratch")
    config, began_with = make.config(root), dataset_fingerprint(root)
    maker = BatchMaker(config, 0, 1, bands, began_with)
    before = maker(5).keys
    unit = digest("unit", "ct2")
    added = [make.sample(unit, "ct", n, make.image("ct", n), "train", "htj2k") for n in range(40, 43)]
    commit_unit(Store(root), unit, added, [], tmp_path / "scratch", 3)
    assert maker(5).keys == before  # what is open stays as it was
    with pytest.raises(UserError, match="the dataset changed while the run goes on"):
        BatchMaker(config, 0, 1, bands, began_with)(5)
    with pytest.raises(UserError, match="the dataset changed"):
        workers.make_batches(config, 0, 1, bands, began_with)(5)
    with pytest.raises(UserError, match="the dataset changed"):
        feed.make_batches(config.model_dump_json(), 0, 1, bands, began_with)(5)
