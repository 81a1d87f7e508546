"""Backbones by name: what they give, and what is refused before a training starts."""

import pytest
import torch
from torch import nn

from shards.errors import UserError
from tests.trainer.fake import tiny
from trainer.config import ModelConfig, load_config
from trainer.export import encoder_info, load_encoder, save_encoder
from trainer.models.encoders import build_encoder, check_encoder, libraries
from trainer.swav.model import MultiModalSwav

OWN_MODULE = """
from torch import nn

class Flat(nn.Module):
    def __init__(self, in_channels, width=6):
        super().__init__()
        self.feature_dim = width
        self.conv = nn.Conv2d(in_channels, width, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))

def flat(in_channels, **options):
    return Flat(in_channels, **options)

def silent(in_channels):
    return nn.Conv2d(in_channels, 4, 3)

def wrong(in_channels):
    network = Flat(in_channels)
    network.feature_dim = 7
    return network

def number(in_channels):
    return 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_encoders_of_a_test.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_encoders_of_a_test"


@pytest.mark.parametrize(
    ("name", "features", "channels"),
    [("resnet18", 512, 1), ("mobilenet_v3_small", 1024, 3), ("convnext_tiny", 768, 1)],
)
def test_the_classifier_of_a_torchvision_model_is_cut_off_and_nothing_else(name, features, channels):
    torch.manual_seed(0)
    encoder = build_encoder(f"torchvision:{name}", channels)
    torch.manual_seed(0)
    whole = libraries.torchvision().models.get_model(name, weights=None)
    assert encoder.feature_dim == features
    gone = sorted(whole.state_dict().keys() - encoder.state_dict().keys())
    assert len(gone) == 2 and not encoder.state_dict().keys() - whole.state_dict().keys()
    linear = whole.get_submodule(gone[0].removesuffix(".bias"))
    grey = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        found = linear(encoder.eval()(grey.expand(-1, channels, -1, -1)))
        expected = whole.eval()(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_no_dropout_of_the_classifier_stays_behind():
    encoder = build_encoder("torchvision:mobilenet_v2", 1).train()
    assert not [m for m in encoder.modules() if isinstance(m, nn.Dropout) and m.p > 0]


def test_a_vision_transformer_of_timm_takes_two_sizes_only_with_its_option():
    name, options = (
        "timm:vit_tiny_patch16_224",
        {"dynamic_img_size": True, "dynamic_img_pad": True, "depth": 1},
    )
    with pytest.raises(
        UserError, match=r"model.backbone=timm:vit_tiny_patch16_224 cannot take images of 92 px"
    ):
        check_encoder(build_encoder(name, 1, {"depth": 1}), name, 1, (224, 92))
    encoder = build_encoder(name, 1, options)
    check_encoder(encoder, name, 1, (64, 40))
    assert encoder(torch.rand(2, 1, 64, 40)).shape == (2, encoder.feature_dim) == (2, 192)


def test_a_function_of_the_user_is_a_backbone_with_its_options(own):
    model = ModelConfig(
        backbone=f"{own}:flat", backbone_options={"width": 5}, hidden_dim=8, feature_dim=4, in_channels=2
    )
    swav = MultiModalSwav(model, tiny().swav, ("ct", "xr"))
    check_encoder(swav.backbone, model.backbone, 2, (16, 8))
    features = swav([torch.rand(2, 4, 2, 16, 16), torch.rand(2, 4, 2, 8, 8)]).features
    assert features.shape == (4, 4, 4) and swav.backbone.feature_dim == 5


def test_what_does_not_keep_the_protocol_is_refused(own):
    with pytest.raises(UserError, match="Conv2d has no feature_dim"):
        build_encoder(f"{own}:silent")
    with pytest.raises(UserError, match=r"gave a int, no nn\.Module"):
        build_encoder(f"{own}:number")
    with pytest.raises(UserError, match=r"images of 16 px \(it gave \[2, 6\], not \[2, 7\]\)"):
        check_encoder(build_encoder(f"{own}:wrong"), f"{own}:wrong", 1, (16,))
    with pytest.raises(UserError, match="has no function nothing"):
        build_encoder(f"{own}:nothing")
    with pytest.raises(UserError, match=r"no_such_module.*cannot be imported.*PYTHONPATH"):
        build_encoder("no_such_module:function")
    with pytest.raises(UserError, match="no classification model 'convnext_huge'"):
        build_encoder("torchvision:convnext_huge")
    with pytest.raises(UserError, match="does not end in a linear classifier"):
        build_encoder("torchvision:squeezenet1_1")
    with pytest.raises(UserError, match=r"images of 3 channels: set model\.in_channels to 1"):
        build_encoder("torchvision:resnet18", 5)
    with pytest.raises(UserError, match="timm has no model 'resnet_of_nobody'"):
        build_encoder("timm:resnet_of_nobody")
    with pytest.raises(UserError, match=r"cannot be built: .*depht.*backbone_options"):
        build_encoder("timm:vit_tiny_patch16_224", 1, {"depht": 2})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.backbone=resnet51"], "backbone='resnet51' is none of resnet-tiny, resnet18"),
        (["model.backbone=os.path:join x"], "none of"),
        (["model.backbone=timm:hf-hub:owner/name"], "none of"),
        (["model.backbone=resnet18", "model.backbone_options.width=3"], "resnet18, which has none"),
        (["model.backbone=timm:resnet18", "model.backbone_options.pretrained=true"], "model.init_weights"),
    ],
)
def test_names_and_options_are_checked_before_anything_is_imported(settings, said):
    with pytest.raises(UserError, match=said):
        load_config("demo", settings)


def test_a_file_does_not_choose_the_users_code(own, tmp_path):
    name = f"{own}:flat"
    config = tiny(model__backbone=name, model__backbone_options={"width": 5})
    encoder, path = build_encoder(name, 1, {"width": 5}).eval(), tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, encoder_info(config, 12, "madeup"))
    with pytest.raises(UserError, match=f"no code of this package: if you trust it.*--backbone {name}"):
        load_encoder(path)
    with pytest.raises(UserError, match=f"was made with the backbone {name}, not os:system"):
        load_encoder(path, backbone="os:system")
    loaded, info = load_encoder(path, backbone=name)
    image = torch.rand(1, 1, 9, 9)
    assert info.backbone_options == {"width": 5} and torch.equal(loaded(image), encoder(image))


def test_torchvision_for_another_torch_is_refused_with_the_pair_to_install(monkeypatch):
    monkeypatch.setattr(libraries.importlib.metadata, "requires", lambda name: ["numpy", "torch (==1.0.0)"])
    with pytest.raises(
        UserError, match=r"built for torch 1\.0\.0, and torch .* is installed: install the pair"
    ):
        libraries.torchvision()
