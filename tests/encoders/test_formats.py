"""Exported encoders, loaded as the card says by the libraries they are for: strict, with equal features."""

import json
import math
import re
from pathlib import Path

import onnx
import pytest
import torch

from shards.errors import UserError
from tests.encoders.conftest import config, trained
from trainer import checkpoint
from trainer.card import loader, model_card
from trainer.export import encoder_info, load_encoder
from trainer.formats import with_channels, write
from trainer.models.encoders import build_encoder, libraries
from trainer.source import Source, open_source


def encoder(dataset, backbone, in_channels=1, **options) -> Source:
    """A network with running statistics of its own, described as that of a run."""
    torch.manual_seed(0)
    settings = config(dataset, model__backbone=backbone, model__in_channels=in_channels)
    network = build_encoder(backbone, in_channels, options).eval()
    with torch.no_grad():
        for name, value in network.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    return Source(network, encoder_info(settings, 5, "madeup"))


def run_loader(text: str, folder, monkeypatch, **names) -> dict:
    """Execute a card's Python where the file lies."""
    monkeypatch.chdir(folder)
    space = dict(names)
    exec(text, space)
    return space


def same(found, source: Source, grey) -> bool:
    channels = source.info.in_channels
    with torch.inference_mode():
        expected = source.network(grey.expand(-1, channels, -1, -1))
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("backbone", ["resnet18", "torchvision:mobilenet_v3_small"])
def test_torchvision_loads_the_file_strictly_in_three_lines(dataset, tmp_path, monkeypatch, backbone):
    libraries.torchvision()  # the CPU build of torch needs it before a plain import
    source = encoder(dataset, backbone)
    written = write(source.network, source.info, "torchvision", tmp_path / "e.safetensors")
    assert written.in_channels == 3
    text = loader(source.info, written, getattr(source.network, "classifier_name", "fc"))
    loaded = run_loader(text, tmp_path, monkeypatch)["encoder"]
    grey = torch.rand(2, 1, 64, 80)
    assert same(loaded(grey.expand(-1, 3, -1, -1)), source, grey)


@pytest.mark.parametrize("backbone", ["resnet18", "timm:resnet10t"])
def test_timm_loads_the_file_strictly_in_three_lines(dataset, tmp_path, monkeypatch, backbone):
    libraries.timm()
    source = encoder(dataset, backbone)
    written = write(source.network, source.info, "timm", tmp_path / "e.safetensors")
    loaded = run_loader(loader(source.info, written), tmp_path, monkeypatch)["encoder"]
    grey = torch.rand(2, 1, 64, 80)
    assert written.in_channels == 1 and same(loaded(grey), source, grey)


@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
def test_a_graph_gives_the_features_of_the_network_at_any_size(dataset, tmp_path, monkeypatch, kind):
    source = encoder(dataset, "resnet-tiny")
    path = tmp_path / ("e.pt2" if kind == "torch-export" else "e.onnx")
    written = write(source.network, source.info, kind, path)
    assert written.free == ("batch", "height", "width") and written.error < 1e-5
    text = loader(source.info, written)
    for shape in ((1, 1, 40, 56), (5, 1, 33, 24)):
        grey = torch.rand(shape)
        images = grey if kind == "torch-export" else grey.numpy()
        found = run_loader(text, tmp_path, monkeypatch, images=images)["features"]
        assert same(torch.as_tensor(found), source, grey)
    if kind == "onnx":
        about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert json.loads(about["medswav_encoder"])["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_network_of_one_size_is_exported_for_that_size(dataset, tmp_path):
    small = {"depth": 1, "img_size": 32, "patch_size": 16}
    source = encoder(dataset, "timm:vit_tiny_patch16_224", **small)
    with pytest.raises(UserError, match=r"on images of 26 px \(.*\): give --size"):
        write(source.network, source.info, "torch-export", tmp_path / "e.pt2")
    written = write(source.network, source.info, "torch-export", tmp_path / "e.pt2", size=32)
    assert written.free == ("batch",) and written.error < 1e-5


@pytest.mark.parametrize(("was", "now"), [(1, 3), (3, 1)])
def test_other_input_channels_give_the_same_features_on_grey_images(dataset, was, now):
    source = encoder(dataset, "resnet-tiny", was)
    changed, info = with_channels(source.network, source.info, now)
    grey = torch.rand(2, 1, 40, 40)
    with torch.inference_mode():
        assert info.in_channels == now and same(changed(grey.expand(-1, now, -1, -1)), source, grey)
    assert source.network.conv1.in_channels == was
    with pytest.raises(UserError, match="which cannot become 2"):
        with_channels(source.network, source.info, 2)


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [("resnet50w2", "torchvision"), ("resnet-tiny", "timm"), ("torchvision:resnet18", "timm")],
)
def test_a_library_without_such_a_network_is_named(dataset, tmp_path, backbone, kind):
    info = encoder_info(config(dataset, model__backbone=backbone), 5, "madeup")
    with pytest.raises(UserError, match=f"{kind} has no network like {backbone}: use --format encoder"):
        write(torch.nn.Identity(), info, kind, tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_gives_its_newest_checkpoint_that_verifies(dataset, tmp_path):
    run = trained(config(dataset), tmp_path / "run", stop=True)
    assert checkpoint.list_steps(run) == [3, 6] and not (run / "encoder.safetensors").exists()
    newest = open_source(run)
    assert newest.info.step == 6 and not newest.finished
    broken = checkpoint.path_of(run, 6) / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    older = open_source(run)
    assert older.info.step == 3
    write(older.network, older.info, "encoder", tmp_path / "e.safetensors")
    loaded, info = load_encoder(tmp_path / "e.safetensors")
    image = torch.rand(1, 1, 26, 26)
    assert info.step == 3 and torch.equal(loaded(image), older.network(image))
    assert open_source(tmp_path / "e.safetensors").finished
    with pytest.raises(UserError, match="is no run folder"):
        open_source(tmp_path)


def test_the_card_says_what_the_file_was_made_of_and_tells_no_path(dataset, run, tmp_path):
    source = open_source(run)
    written = write(source.network, source.info, "encoder", tmp_path / "e.safetensors")
    card = model_card(source, written)
    for words in (
        "**Not a medical device.**",
        "6 of 9 (unfinished)",
        "| CT | centre 40, width 400, to [0, 1] |",
        "| CT | train 11, val 0, test 2 images |",
        "| X-ray | train 9, val 0, test 2 images |",
        source.info.dataset_fingerprint,
        "### Metrics of step 4",
        "multi-modality SwAV after Ghesu et al.",
        "TO BE FILLED IN: the licence",
        "prototypes: 8",
    ):
        assert words in card
    for private in (dataset, str(tmp_path), str(run)):
        assert private not in card
    shown = card.split("| loss minus ln k | ")[1].split(" |")[0]
    assert math.isfinite(float(shown))
    alone = model_card(open_source(tmp_path / "e.safetensors"), written)
    assert "not at hand when this card was written" in alone and "## Settings" not in alone


def test_every_loader_of_the_documentation_gives_the_features(dataset, tmp_path, monkeypatch):
    libraries.timm()
    source = encoder(dataset, "resnet50")
    for name, kind in (("encoder", "encoder"), ("resnet50", "torchvision"), ("resnet50-timm", "timm")):
        write(source.network, source.info, kind, tmp_path / f"{name}.safetensors")
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    grey = torch.rand(1, 1, 64, 80)
    for block in blocks:
        loaded = run_loader(block, tmp_path, monkeypatch)["encoder"]
        channels = loaded.conv1.in_channels
        assert same(loaded(grey.expand(-1, channels, -1, -1)), source, grey)
