"""The 3D DenseNet of method.md section 6: parameters, channels, shapes, operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shards.errors import UserError
from trainer.config import load_config
from trainer.downstream.probe import evaluate
from trainer.export import EncoderInfo, load_encoder, save_encoder
from trainer.models.densenet3d import DenseNet3d, halved
from trainer.models.encoders import build_encoder, check_encoder
from trainer.models.recompute import find_blocks

BOX = (40, 224, 192)


def on_meta() -> DenseNet3d:
    with torch.device("meta"):
        return DenseNet3d()


def small() -> DenseNet3d:
    torch.manual_seed(0)
    return DenseNet3d().eval()


def test_the_network_has_the_parameters_of_the_specification():
    net = on_meta()
    assert sum(p.numel() for p in net.parameters()) == 167_480
    # block 3: its units see 37, 44 and 51 channels; 7 filters of 27 values a channel, each with a norm
    assert sum(p.numel() for p in net.blocks[2].parameters()) == (37 + 44 + 51) * 7 * 27 + 3 * 2 * 7
    assert sum(p.numel() for p in net.head.parameters()) == 100 * 512 + 2 * 512


def test_blocks_have_the_channels_of_the_specification_and_the_first_two_keep_all_slices():
    maps = on_meta().block_maps(torch.empty(1, 1, *BOX, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (23, 40, 224, 192),
        (37, 40, 112, 96),
        (58, 40, 56, 48),
        (79, 20, 28, 24),
        (100, 10, 14, 12),
    ]


@pytest.mark.parametrize(
    ("size", "last"),
    [(BOX, (5, 7, 6)), ((40, 112, 96), (5, 4, 3)), ((13, 45, 70), (2, 2, 3)), ((1, 1, 1), (1, 1, 1))],
)
def test_features_have_one_length_whatever_the_size_of_the_volume(size, last):
    net, x = on_meta().eval(), torch.empty(2, 1, *size, device="meta")
    assert net(x).shape == (2, 1024) and net.feature_dim == 1024
    assert net.feature_map(x).shape == (2, 512, *last)
    assert net.slice_features(x).shape == (2, size[0], 1024)


def test_a_sample_of_one_large_and_four_small_crops_takes_80_gflop():
    net = on_meta()
    with FlopCounterMode(display=False) as counter:
        out = [net(torch.empty(n, 1, 40, *s, device="meta")) for n, s in ((1, (224, 192)), (4, (112, 96)))]
        torch.cat(out).sum().backward()
    assert counter.get_total_flops() / 1e9 == pytest.approx(80, abs=1)


@torch.no_grad()
def test_features_are_the_maximum_and_the_mean_of_the_map_and_a_slice_reads_its_own_part_of_it():
    net, x = small(), torch.rand(2, 1, 12, 32, 32)
    final, features, slices = net.feature_map(x), net(x), net.slice_features(x)
    assert torch.equal(features[:, :512], final.flatten(2).amax(2))
    assert torch.allclose(features[:, 512:], final.flatten(2).mean(2), atol=1e-6)
    assert final.shape[2] == 2
    for z in range(12):
        assert torch.equal(slices[:, z, :512], final[:, :, z // 8].flatten(2).amax(2))


@torch.no_grad()
def test_the_first_two_blocks_see_no_other_slice_and_the_third_does():
    net, x = small(), torch.rand(1, 1, 8, 16, 16)
    changed = x.clone()
    changed[:, :, 3] += 0.5
    pairs = zip(net.block_maps(x), net.block_maps(changed), strict=True)
    moved = [((a - b).abs().amax((0, 1, 3, 4)) > 0).nonzero().flatten().tolist() for a, b in pairs]
    assert moved[:3] == [[3], [3], [0, 1, 2, 3, 4, 5, 6]]  # block 3: three kernels of 3


@torch.no_grad()
def test_the_rounded_up_border_is_the_mean_of_what_there_is():
    x = torch.arange(27.0).reshape(1, 1, 3, 3, 3)
    pooled = halved(x, (2, 2, 2))[0, 0]
    assert pooled[1, 1, 1] == 26 and pooled[0, 0, 1] == (2 + 5 + 11 + 14) / 4
    assert halved(x[:, :, :1], (2, 2, 2)).shape == (1, 1, 1, 2, 2)


def test_all_parameters_learn_and_blocks_can_be_recomputed():
    net = DenseNet3d().train()
    assert len(find_blocks(net)) == 5
    net(torch.rand(2, 1, 8, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def info() -> EncoderInfo:
    return EncoderInfo("densenet3d", 1, 5, ("ct",), "madeup", 224, 0, "train", {})


def test_an_encoder_file_gives_the_same_features(tmp_path):
    net, x = small(), torch.rand(1, 1, 6, 20, 18)
    with torch.no_grad():
        for name, value in net.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    save_encoder(tmp_path / "encoder.safetensors", net, info())
    loaded, found = load_encoder(tmp_path / "encoder.safetensors")
    assert found == info() and isinstance(loaded, DenseNet3d)
    with torch.inference_mode():
        assert torch.equal(loaded(x), net(x))


def test_the_check_of_encoders_knows_volumes():
    net = build_encoder("densenet3d", 2)
    check_encoder(net, "densenet3d", 2, [(8, 32, 40), (5, 33, 17)])
    with pytest.raises(UserError, match=r"images of 64 px \(densenet3d takes volumes \[n, C, Z, Y, X\]"):
        check_encoder(net, "densenet3d", 2, [64])
    with pytest.raises(UserError, match=r"resnet-tiny cannot take volumes of 4x32x32"):
        check_encoder(build_encoder("resnet-tiny"), "resnet-tiny", 1, [(4, 32, 32)])


def test_a_network_for_volumes_is_refused_where_images_are_given():
    with pytest.raises(UserError, match=r"model\.backbone=densenet3d takes volumes"):
        load_config("demo", ["model.backbone=densenet3d"])
    with pytest.raises(UserError, match="densenet3d takes volumes"):
        evaluate("nowhere", None, [(small(), info())])
    with pytest.raises(UserError, match="densenet3d, which has none"):
        load_config("demo", ["model.backbone=densenet3d", "model.backbone_options.growth=3"])
