"""Golden test G9: parameter counts, torchvision's state-dict keys and shapes, feature sizes."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, max_pool2d

from trainer.models import libraries
from trainer.models.resnet import ResNet, build_backbone

# torchvision's published totals less its classifier (1000 classes)
TORCHVISION = {
    "resnet18": 11_689_512 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
}


def _on_meta(name: str, in_channels: int = 3) -> ResNet:
    with torch.device("meta"):
        return build_backbone(name, in_channels)


def _count(model: ResNet) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions", "features"),
    [
        ("resnet50", 23.5, 2048),
        ("resnet152", 58.1, 2048),
        ("resnet50w2", 93.9, 4096),
        ("resnet50w4", 375.4, 8192),
    ],
)
def test_g9_parameter_counts_and_features_are_the_papers(name, millions, features):
    model = _on_meta(name)
    assert round(_count(model) / 1e6, 1) == millions
    assert model.feature_dim == features
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, features)


@pytest.mark.parametrize("name", TORCHVISION)
def test_g9_parameter_counts_are_torchvisions(name):
    assert _count(_on_meta(name)) == TORCHVISION[name]


def _torchvision_keys(depths: tuple[int, ...], convs: int) -> set[str]:
    """The naming scheme of torchvision.models.resnet, without fc."""

    def norm(prefix: str) -> set[str]:
        return {
            f"{prefix}.{leaf}"
            for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }

    keys = {"conv1.weight"} | norm("bn1")
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            for i in range(1, convs + 1):
                keys |= {f"{prefix}.conv{i}.weight"} | norm(f"{prefix}.bn{i}")
            if block == 0 and (convs == 3 or stage > 1):
                keys |= {f"{prefix}.downsample.0.weight"} | norm(f"{prefix}.downsample.1")
    return keys


@pytest.mark.parametrize(
    ("name", "depths", "convs"),
    [("resnet18", (2, 2, 2, 2), 2), ("resnet50", (3, 4, 6, 3), 3), ("resnet152", (3, 8, 36, 3), 3)],
)
def test_g9_state_dict_keys_are_torchvisions(name, depths, convs):
    assert set(_on_meta(name).state_dict()) == _torchvision_keys(depths, convs)


def _functional_resnet50(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """ResNet-50 (v1.5: stride in the 3x3) written from its definition, in evaluation mode."""

    def norm(y: Tensor, name: str) -> Tensor:
        values = (state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return batch_norm(y, *values)

    x = norm(conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1").relu()
    x = max_pool2d(x, 3, stride=2, padding=1)
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            prefix, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(conv2d(x, state[f"{prefix}.conv1.weight"]), f"{prefix}.bn1").relu()
            y = norm(
                conv2d(y, state[f"{prefix}.conv2.weight"], stride=stride, padding=1), f"{prefix}.bn2"
            ).relu()
            y = norm(conv2d(y, state[f"{prefix}.conv3.weight"]), f"{prefix}.bn3")
            if block == 0:
                x = norm(
                    conv2d(x, state[f"{prefix}.downsample.0.weight"], stride=stride), f"{prefix}.downsample.1"
                )
            x = (x + y).relu()
    return x.mean((2, 3))


def test_g9_forward_equals_the_definition():
    torch.manual_seed(0)
    model = build_backbone("resnet50", 3).eval()
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value.copy_(torch.rand_like(value) * 0.5 + 0.5)
        found, expected = model(x), _functional_resnet50(model.state_dict(), x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", TORCHVISION)
def test_g9_keys_and_forward_equal_torchvisions(name):
    torch.manual_seed(0)
    with torch.device("meta"):  # initial weights of their own would cost seconds
        reference = getattr(libraries.torchvision().models, name)(weights=None).eval()
        reference.fc = torch.nn.Identity()
        ours = build_backbone(name, 3).eval()
    reference.to_empty(device="cpu")
    with torch.no_grad():
        state = reference.state_dict()
        for leaf, value in state.items():
            if value.ndim == 4:
                bound = (6 / value[0].numel()) ** 0.5  # He
                value.uniform_(-bound, bound)
            elif leaf.endswith(("running_mean", "bias")):
                value.uniform_(-0.1, 0.1)
            elif leaf.endswith(("running_var", "weight")):
                value.uniform_(0.5, 1.5)
        assert list(ours.state_dict()) == list(state)
        ours.load_state_dict(state, assign=True)
        x = torch.rand(2, 3, 96, 80)
        found, expected = ours(x), reference(x)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_tiny_resnet_keeps_resolution_on_small_crops():
    model = build_backbone("resnet-tiny")
    assert model(torch.rand(3, 1, 24, 24)).shape == (3, model.feature_dim)
    assert model(torch.rand(3, 1, 40, 40)).shape == (3, model.feature_dim)
