"""Weights to begin with: strict, in part only when asked, and never code from a file."""

import json
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch

from shards.errors import UserError
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer.config import ModelConfig, load_config
from trainer.loop import train
from trainer.models import libraries
from trainer.models.encoders import build_encoder
from trainer.models.initial import check_model, load_initial
from trainer.models.resnet import build_backbone


def model(weights: Path | str, backbone: str = "resnet-tiny", **settings) -> ModelConfig:
    return ModelConfig(backbone=backbone, init_weights=str(weights), **settings)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder in which torchvision looks before it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvisions_weights_come_through_its_cache_without_their_classifier(cache):
    backbone = "resnet18"
    reference = libraries.torchvision().models.resnet18(weights=None).eval()
    torch.save(reference.state_dict(), cache / "resnet18-f37072fd.pth")
    encoder = build_encoder(backbone, 1).eval()
    found = load_initial(encoder, model("torchvision:ResNet18_Weights.IMAGENET1K_V1", backbone))
    assert found.classifier == ("fc.bias", "fc.weight") and found.summed == ("conv1.weight",)
    assert len(found.loaded) == len(encoder.state_dict())
    image = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        expected = reference(image.expand(-1, 3, -1, -1))
        assert torch.allclose(reference.fc(encoder(image)), expected, rtol=1e-4, atol=1e-5)


def test_without_a_network_the_place_for_the_file_is_named(cache, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        UserError, match=f"resnet18-f37072fd.pth cannot be downloaded .*put the file into {cache}"
    ):
        load_initial(
            build_backbone("resnet18"), model("torchvision:ResNet18_Weights.IMAGENET1K_V1", "resnet18")
        )
    with pytest.raises(UserError, match="torchvision has no weights 'ResNet18'"):
        load_initial(build_backbone("resnet18"), model("torchvision:ResNet18", "resnet18"))


def changed(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file that lacks one tensor of resnet-tiny, has one of another shape and one too many."""
    state = {
        name: torch.full_like(value, 3) for name, value in build_backbone("resnet-tiny").state_dict().items()
    }
    del state["bn1.bias"]
    state |= {"bn1.weight": torch.ones(5), "fc.weight": torch.ones(4, 128)}
    safetensors.torch.save_file(state, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors", state


def test_what_does_not_fit_is_refused_by_name_and_nothing_is_loaded(tmp_path):
    path, _ = changed(tmp_path)
    encoder = build_backbone("resnet-tiny")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as refused:
        load_initial(encoder, model(path))
    for words in (
        "not in the encoder: fc.weight",
        "not in the source: bn1.bias",
        "another shape",
        "init_partial=true",
    ):
        assert words in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_partial_load_is_asked_for_and_says_which_and_why(tmp_path):
    path, state = changed(tmp_path)
    encoder = build_backbone("resnet-tiny")
    found = load_initial(encoder, model(path, init_partial=True))
    assert (found.not_in_encoder, found.not_in_file, found.other_shape) == (
        ("fc.weight",),
        ("bn1.bias",),
        ("bn1.weight",),
    )
    assert torch.equal(encoder.conv1.weight, state["conv1.weight"]) and encoder.bn1.weight.shape == (16,)
    assert "of another shape: bn1.weight" in found.lines()
    assert "what is not loaded stays at its random start" in found.lines()
    safetensors.torch.save_file({"nothing": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"no tensor of some.safetensors fits"):
        load_initial(encoder, model(path, init_partial=True))


def test_entry_and_prefix_of_a_pth_file_are_told_not_guessed(tmp_path):
    path = tmp_path / "moco.pth"
    source = build_backbone("resnet-tiny")
    names = {f"module.encoder_q.{name}": value for name, value in source.state_dict().items()}
    torch.save({"epoch": 7, "state_dict": names, "optimizer": {"lr": 1}}, path)
    encoder = build_backbone("resnet-tiny")
    with pytest.raises(UserError, match=r"entries \(optimizer, state_dict\): set model.init_entry"):
        load_initial(encoder, model(path))
    with pytest.raises(UserError, match=r"in the source, not in the encoder: module.encoder_q.bn1.bias"):
        load_initial(encoder, model(path, init_entry="state_dict"))
    with pytest.raises(
        UserError, match=r"begins with model.init_prefix='backbone.': they begin with module."
    ):
        load_initial(encoder, model(path, init_entry="state_dict", init_prefix="backbone."))
    load_initial(encoder, model(path, init_entry="state_dict", init_prefix="module.encoder_q."))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in encoder.state_dict().items())


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_pth_file_is_run(tmp_path):
    torch.save({"conv1.weight": torch.ones(1), "more": Harm(tmp_path / "harmed")}, tmp_path / "bad.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:100])
    for name in ("bad.pth", "cut.pth"):
        with pytest.raises(UserError, match=f"{name} is damaged or holds more than tensors"):
            load_initial(build_backbone("resnet-tiny"), model(tmp_path / name))
    assert not (tmp_path / "harmed").exists()


def test_a_run_begins_with_the_weights_and_a_resume_does_not_need_them(tmp_path):
    path, source = tmp_path / "first.safetensors", build_backbone("resnet-tiny")
    safetensors.torch.save_file(source.state_dict(), path)
    config = tiny(model__init_weights=str(path), max_steps=6)
    assert check_model(config) == [
        f"initial weights: {len(source.state_dict())} tensors from first.safetensors"
    ]
    stops = iter([True])
    first = train(
        config,
        FakeBatches(config),
        tmp_path / "run",
        dataset_fingerprint=FINGERPRINT,
        should_stop=lambda: next(stops, False),
    )
    without = train(
        tiny(max_steps=6), FakeBatches(config), tmp_path / "other", dataset_fingerprint=FINGERPRINT
    )
    assert first.losses[0] != without.losses[0]
    assert json.loads((tmp_path / "run" / "initial_weights.json").read_text())["loaded"]
    path.unlink()
    assert not first.finished
    assert train(config, FakeBatches(config), tmp_path / "run", dataset_fingerprint=FINGERPRINT).finished


def test_options_without_weights_are_refused():
    with pytest.raises(UserError, match="go with init_weights, which is not set"):
        load_config("demo", ["model.init_partial=true"])
