"""What becomes of a run on volumes: its encoder file, embeddings, prototypes, graph, card, evaluation."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchestration import run_pictures
from orchestration.run_data import gather
from shards import catalog
from shards.errors import UserError
from shards.store import Store
from tests.volumes import make
from trainer import card, embed, formats, online
from trainer.assign import assign, pictures
from trainer.batches import BatchMaker, dataset_fingerprint
from trainer.downstream.probe import evaluate
from trainer.embed import open_parts
from trainer.export import info_text, load_encoder
from trainer.labels import label_sets
from trainer.loop import train
from trainer.prepare import _warn_of_small_cache
from trainer.source import open_source
from trainer.volumes import affine_of, read_volume, to_box


@pytest.fixture(scope="module")
def labelled(root) -> str:
    keys = catalog.load(root, "ct_volumes", ["key", "split"]).to_pylist()
    rows = [(row["key"], str(n % 2)) for n, row in enumerate(keys)]
    table = pa.table({"key": [k for k, _ in rows], "label": [v for _, v in rows]})
    catalog.write_labels(Store(root), "kind", table)
    return root


@pytest.fixture(scope="module")
def run(labelled, bands, tmp_path_factory):
    config = make.config(labelled, max_steps=2, supervision__labels=[{"name": "kind"}])
    folder = tmp_path_factory.mktemp("run")
    sets = label_sets(config)
    maker = BatchMaker(config, 0, 1, bands)
    fingerprint = dataset_fingerprint(labelled)
    train(config, maker, folder, dataset_fingerprint=fingerprint, labels=sets)
    return folder


def test_the_encoder_file_says_which_box_it_takes(run):
    network, info = load_encoder(run / "encoder.safetensors")
    assert info.size == (8, 32, 28) and info.size_text == "8 x 32 x 28 voxels"
    assert info.volume is not None and info.volume.head_crop and info.volume.box == info.size
    assert info.intensity["ct_volumes"].center == 55  # also where the settings do not name it
    assert json.loads(info_text(info))["format"] == 3
    with torch.inference_mode():
        assert network(torch.rand(2, 1, *info.size)).shape == (2, 1024)
    of_images = json.loads(info_text(replace(info, volume=None, size=64)))
    assert "volume" not in of_images and of_images["format"] == 2  # as earlier versions read it


def test_embeddings_are_those_of_the_boxes_by_the_key_of_the_volume(run, root, tmp_path):
    source = open_source(run)
    info = source.info
    parts = open_parts(root, info.intensity, info.modalities, volume=info.volume)
    out = tmp_path / "features.parquet"
    assert embed.embed(root, source.network, info, out, parts, batch_size=3, threads=1, device="cpu") == 1024
    table = pq.read_table(out)
    rows = catalog.load(root, "ct_volumes").to_pylist()
    assert table["key"].to_pylist() == [row["key"] for row in rows] and len(rows) == 8
    box = to_box(read_volume(root, rows[3]), affine_of(rows[3]), info.size)
    with torch.inference_mode():
        expected = source.network(torch.from_numpy(box)[None, None])[0].numpy()
    assert np.allclose(table["features"][3].as_py(), expected, atol=1e-4)
    with pytest.raises(UserError, match="leave it away"):
        embed.embed(root, source.network, info, out, parts, size=32)
    with pytest.raises(UserError, match="takes volumes: name ct_volumes"):
        open_parts(root, info.intensity, info.modalities, chosen=["ct"], volume=info.volume)
    with pytest.raises(UserError, match="name their slices"):
        open_parts(root, info.intensity, info.modalities, chosen=["ct_volumes"])


def test_prototypes_have_volumes_and_a_contact_sheet_their_middle_slices(run, root, tmp_path):
    source = open_source(run)
    parts = open_parts(root, source.info.intensity, source.info.modalities, volume=source.info.volume)
    (found,) = assign(root, source, tmp_path / "out.parquet", parts, batch_size=4, threads=1, device="cpu")
    assert found.counts.sum() == 8 and found.modality == "ct_volumes"
    (picture,) = pictures(root, parts[0], np.array([2]), 40)
    assert picture.shape == (40, 40) and picture.std() > 20


def test_a_graph_takes_the_box_and_the_card_says_so(run, tmp_path):
    source = open_source(run)
    written = formats.write(source.network, source.info, "torch-export", tmp_path / "encoder.pt2")
    assert written.free == ("batch",) and written.error is not None
    features = torch.export.load(tmp_path / "encoder.pt2").module()(torch.rand(3, 1, 8, 32, 28))
    assert features.shape == (3, 1024)
    text = card.model_card(source, written)
    assert "box of 8 x 32 x 28 voxels" in text and "1 of 24x20 px" in text and "8 volumes" not in text
    assert "train 6" in text and "centre 55, width 200" in text


def test_labels_of_volumes_are_trained_on_and_evaluated_online(run, labelled):
    assert "kind.weight" in (run / "heads.safetensors").read_bytes().decode("latin1")
    config = make.config(labelled, online__labels=["kind"], online__every_steps=4)
    data = online.load_labelled(config)["ct_volumes"]
    assert data.fit_x.shape == (6, 1, 8, 32, 28) and data.val_x.shape == (2, 1, 8, 32, 28)
    row = catalog.load(labelled, "ct_volumes", split="train").to_pylist()[0]
    box = to_box(read_volume(labelled, row), affine_of(row), (8, 32, 28))
    assert np.array_equal(data.fit_x[0, 0], np.rint(255 * box))
    network, _ = load_encoder(run / "encoder.safetensors")
    found = online.Online(config, {"ct_volumes": data}, torch.device("cpu")).evaluate(network)
    assert 0 <= found["online/ct_volumes/linear_auc"] <= 1


def test_probes_of_images_refuse_an_encoder_of_volumes(run, labelled):
    with pytest.raises(UserError, match="takes volumes"):
        evaluate(labelled, catalog.labels(labelled, "kind"), [load_encoder(run / "encoder.safetensors")])


def test_the_page_of_a_run_on_volumes_says_that_pictures_are_of_images(run):
    assert "this run reads volumes" in " ".join(run_pictures.make(run, gather(run), None, 8).why)


def test_a_node_cache_too_small_for_the_volumes_is_told(root, tmp_path, caplog):
    own = make.config(root)
    data = own.data.model_copy(update={"node_cache": str(tmp_path / "cache"), "node_cache_bytes": 1000})
    _warn_of_small_cache(own.model_copy(update={"data": data}))
    assert "mixed at a time" in caplog.text
