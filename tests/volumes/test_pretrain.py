"""Pretraining on volumes: batches as a function of the step, the losses after a kill, every feed."""

import numpy as np
import pytest

from orchestration import feed
from shards.errors import UserError
from shards.tar import ShardReader
from tests.volumes import make
from trainer.batches import BatchMaker, dataset_fingerprint
from trainer.loop import train
from trainer.workers import BatchWorkers


def same(a, b) -> bool:
    return a.keys == b.keys and all(np.array_equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def test_a_batch_holds_all_slices_and_depends_on_the_step_alone(root, bands):
    config = make.config(root)
    maker = BatchMaker(config, 0, 1, bands)
    batch = maker(5)
    assert [c.shape for c in batch.crops] == [(1, 4, 8, 24, 20), (2, 4, 8, 16, 12)]
    assert len(set(zip(batch.keys, batch.passes, strict=True))) == 4 and batch.reads["requests"] >= 1
    assert all((crops.reshape(*crops.shape[:2], -1).std(axis=2) > 0).all() for crops in batch.crops)
    maker(2)
    uncached = make.config(root, data__cache_bytes=0, data__read_threads=2)
    assert same(maker(5), batch) and same(BatchMaker(uncached, 0, 1, bands)(5), batch)
    ranks = [BatchMaker(config, rank, 2, bands)(5) for rank in range(2)]
    assert ranks[0].keys + ranks[1].keys == batch.keys
    whole = [np.concatenate(parts, axis=1) for parts in zip(*(r.crops for r in ranks), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(whole, batch.crops, strict=True))


def test_processes_and_ray_actors_make_the_same_batches(root, bands):
    config = make.config(root)
    here = BatchMaker(config, 0, 1, bands)
    with BatchWorkers(config, 0, 1, bands, workers=1, stop=2) as there:
        assert all(same(there(step), here(step)) for step in range(2))
    actor = feed.make_batches(config.model_dump_json(), 0, 1, bands)  # what an Augmenter calls
    assert same(actor(3), here(3))
    assert feed.batch_bytes(config, 1) == sum(c.nbytes for c in here(3).crops)


def test_a_run_that_was_stopped_goes_on_with_equal_losses(root, bands, tmp_path):
    config = make.config(root)
    fingerprint = dataset_fingerprint(root)

    def run(folder, stop_at=None):
        made = []

        def batches(step):
            if step == stop_at:
                raise InterruptedError
            made.append(step)
            return BatchMaker(config, 0, 1, bands, fingerprint)(step)

        return train(config, batches, folder, dataset_fingerprint=fingerprint)

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", stop_at=5)
    rest = run(tmp_path / "cut")
    assert rest.started_at == 3 and rest.losses == whole.losses[3:] and whole.finished
    assert all(np.isfinite(whole.losses))
    cut, uncut = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("cut", "whole"))
    assert cut == uncut


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imagecodecs
def test_a_flipped_bit_is_one_line_and_never_a_wrong_voxel(root, bands, monkeypatch):
    read = ShardReader.read

    def damaged(self, *where):
        data = bytearray(read(self, *where))
        data[len(data) // 2] ^= 1
        return bytes(data)

    monkeypatch.setattr(ShardReader, "read", damaged)
    with pytest.raises(UserError, match=r"holds other bytes.*ingest repair"):
        BatchMaker(make.config(root), 0, 1, bands)(0)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"data__modalities": ["ct_volumes", "xr"]}, "mixes volumes .ct_volumes. and images .xr."),
        ({"views__volume": None}, "give one number, or set views.volume"),
        ({"views__volume": None, "views__crops": [{"count": 2, "size": 8}]}, "set views.volume=.., or"),
        ({"data__modalities": ["ct"]}, "set data.modalities to volumes like ct_volumes"),
        ({"model__backbone": "resnet-tiny"}, "takes images, .* set it to densenet3d"),
    ],
)
def test_images_and_volumes_in_one_run_are_refused_with_the_fix(changes, fix):
    with pytest.raises(ValueError, match=fix):
        make.config("data", **changes)
    make.config("data", model__backbone="mine:net")  # the user's own network may take volumes


def test_the_head_crop_of_other_volumes_than_ct_needs_a_threshold_in_their_units():
    with pytest.raises(ValueError, match=r"head_crop finds heads by HU, and mr_volumes has none"):
        make.config("data", data__modalities=["mr_volumes"])


def test_a_dataset_without_volumes_says_how_to_get_them(root):
    config = make.config(
        root,
        data__modalities=["mr_volumes"],
        views__energy_probability=0,
        views__volume={"box": [8, 32, 28], "head_crop": False},
    )
    with pytest.raises(
        UserError, match=r"no mr_volumes volumes in split train .modalities there: ct_volumes"
    ):
        BatchMaker(config, 0, 1, None)(0)
