"""The encoder file: what was saved comes back, anything else is refused in one line."""

import json

import pytest
import safetensors.torch
import torch

from shards.errors import UserError
from tests.trainer.fake import tiny
from trainer.export import encoder_info, load_encoder, save_encoder
from trainer.models.resnet import build_backbone


def saved(tmp_path):
    config = tiny(data__intensity={"ct": {"mode": "fixed", "center": 40, "width": 400}})
    backbone = build_backbone("resnet-tiny", 1).eval()
    path = tmp_path / "encoder.safetensors"
    info = encoder_info(config, 12, "madeup")
    save_encoder(path, backbone, info)
    return path, backbone, info


def test_round_trip_gives_the_same_features_and_info(tmp_path):
    path, backbone, info = saved(tmp_path)
    loaded, found = load_encoder(path)
    image = torch.rand(2, 1, 32, 32)
    assert found == info and found.intensity["ct"].center == 40
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(image), backbone(image))
    assert json.loads((tmp_path / "encoder.json").read_text())["backbone"] == "resnet-tiny"


def test_a_missing_file_a_damaged_one_and_a_strange_one_are_refused(tmp_path):
    path, _, _ = saved(tmp_path)
    with pytest.raises(UserError, match="there is no encoder file none"):
        load_encoder(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_encoder(tmp_path / "cut.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match="no description of an encoder"):
        load_encoder(tmp_path / "strange.safetensors")


def test_names_are_strict(tmp_path):
    path, backbone, info = saved(tmp_path)
    backbone.extra = torch.nn.Linear(1, 1)
    save_encoder(path, backbone, info)
    with pytest.raises(UserError, match=r"2 names differ, first extra\.bias"):
        load_encoder(path)
