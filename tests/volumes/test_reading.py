"""Volumes of a dataset that ingest made: the slices asked for, in one unit, and nothing else is read."""

import numpy as np
import pytest

from shards import catalog
from shards.errors import UserError
from shards.tar import ShardReader
from tests.ingest.files import ingest
from tests.ingest.test_volumes import BOTH, series
from trainer.volumes import VOLUME_COLUMNS, affine_of, decode_slices, places_of, read_places, read_volume


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    pixels = series(folder / "s", [2.5 * n for n in range(8)])
    ingest(folder / "s", folder / "data", **BOTH)
    (row,) = catalog.load(folder / "data", "ct_volumes", list(VOLUME_COLUMNS)).to_pylist()
    return folder / "data", row, np.stack([pixels[z] for z in sorted(pixels)])


def test_a_volume_is_its_slices_in_hounsfield_units(stored):
    root, row, pixels = stored
    volume = read_volume(root, row)
    assert volume.dtype == np.float32 and np.array_equal(volume, pixels)
    assert np.allclose(affine_of(row) @ [1, 2, 3, 1], [-10 + 3 * 0.6, 5.5 + 2 * 0.7, 2.5])


def test_only_the_slices_asked_for_are_read_near_ones_together(stored, monkeypatch):
    root, row, pixels = stored
    sizes, read = [], ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda *a: sizes.append(a[-1]) or read(*a))
    assert np.array_equal(read_volume(root, row, [2, 3, 4]), pixels[2:5])
    assert len(sizes) == 1 and sizes[0] < sum(row["sizes"][2:5]) + 3 * 1024
    monkeypatch.setattr("shards.reads.LOCAL_GAP_BYTES", 0)  # a gap of a header is one too many
    with_reader = read_volume(ShardReader(root), row, [6, 0])
    assert np.array_equal(with_reader, pixels[[6, 0]]) and len(sizes) == 3
    assert read_volume(root, row, [1], reduce=1).shape == (1, pixels.shape[1] // 2, pixels.shape[2] // 2)
    for slices in ([8], [-1], []):
        with pytest.raises(IndexError):
            read_volume(root, row, slices)


def test_slices_that_were_scaled_each_in_its_own_way_come_in_one_unit(stored):
    root, row, pixels = stored
    scaled = row | {"rescale_slopes": [1.0] * 4 + [2.0] * 4, "rescale_intercepts": [0.0] * 4 + [-5.0] * 4}
    assert np.array_equal(read_volume(root, scaled), pixels)  # CT is in HU as it is stored
    bytes_of = read_places(ShardReader(root), places_of(scaled, [3, 4]))
    other = decode_slices(bytes_of, scaled | {"modality": "pt_volumes"}, [3, 4])
    assert np.array_equal(other, np.stack([pixels[3], pixels[4] * 2.0 - 5]))


def test_a_damaged_slice_names_its_shard(stored):
    root, row, _ = stored
    with pytest.raises(UserError, match="missing"):
        read_volume(root, row | {"shard": "gone.tar"})
    moved = row | {"offsets": [offset + 64 for offset in row["offsets"]]}
    with pytest.raises(UserError, match="verify"):
        read_volume(root, moved)
