"""How a run is computed changes no number: layout, recomputed activations, compiled stages, the collector."""

import gc
import shutil

import pytest
import torch
from torch import Tensor, nn

from shards.errors import UserError
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import checkpoint
from trainer.build import build_model
from trainer.compute import prepare_network, scheduled_collection
from trainer.config import TrainConfig, check_device, load_config
from trainer.export import load_encoder
from trainer.loop import train
from trainer.models.encoders import build_encoder
from trainer.models.initial import check_model
from trainer.models.recompute import find_blocks
from trainer.optim import build_optimizer
from trainer.step import train_step

CPU = torch.device("cpu")


class Small(nn.Module):
    """A backbone that a C++ compiler is done with in seconds."""

    feature_dim = 4

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


def small(in_channels: int) -> nn.Module:
    return Small(in_channels)


def steps(config: TrainConfig, n: int) -> tuple[list[float], nn.Module, int]:
    """Losses, the network with the gradients of the last step, and the bytes that its forward keeps."""
    torch.manual_seed(0)
    network, kept, losses = build_model(config), 0, []
    prepare_network(network, config.model, CPU, 1)
    optimizer = build_optimizer(network, config.optim)

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    for step in range(n):
        crops, kept = [torch.from_numpy(c) for c in FakeBatches(config)(step).crops], 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            losses.append(float(train_step(network, optimizer, None, crops, step, config)["loss"]))
    return losses, network, kept


@pytest.mark.parametrize("backbone", ["resnet-tiny", "torchvision:resnet18"])
def test_recomputed_activations_change_no_loss_gradient_or_running_statistic(backbone):
    plain, recomputed = (
        tiny(model__backbone=backbone, model__activation_checkpointing=on) for on in (False, True)
    )
    (losses, network, kept), (again, other, less) = steps(plain, 2), steps(recomputed, 2)
    assert again == losses
    assert less < 0.7 * kept
    assert list(other.state_dict()) == list(network.state_dict())
    for (name, a), b in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name  # running statistics and num_batches_tracked among them
    gradients = [[p.grad for p in n.backbone.parameters()] for n in (network, other)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("backbone", "n"),
    [("resnet50", 16), ("torchvision:resnet18", 8), ("torchvision:convnext_tiny", 8), ("timm:resnet18", 8)],
)
def test_blocks_are_found_in_networks_of_every_library(backbone, n):
    assert len(find_blocks(build_encoder(backbone))) == n


def test_a_network_that_cannot_be_arranged_is_refused_before_a_run_with_the_fix():
    name = f"{__name__}:small"
    with pytest.raises(UserError, match=r"finds no blocks in Small .*set it to false"):
        check_model(tiny(model__backbone=name, model__activation_checkpointing=True))
    other = tiny(model__backbone="timm:mobilenetv3_small_050", model__sync_batchnorm="global")
    with pytest.raises(UserError, match=r"sync_batchnorm cannot take bn1, a BatchNormAct2d.*set it to off"):
        check_model(other)


def test_settings_that_exclude_each_other_are_refused_and_off_is_read_as_yaml_reads_it():
    config = load_config("demo", ["model.sync_batchnorm=off", "model.compile=off"])
    assert (config.model.sync_batchnorm, config.model.compile) == ("off", "off")
    assert load_config("demo", ["model.sync_batchnorm=node"]).model.sync_batchnorm == "node"
    for more, text in (
        ("model.sync_batchnorm=global", "cut to pieces by sync_batchnorm"),
        ("model.activation_checkpointing=true", "decides itself what is computed once more"),
    ):
        with pytest.raises(UserError, match=text):
            load_config("demo", ["model.compile=stages", more])
    with pytest.raises(UserError, match="'off', 'node' or 'global'"):
        load_config("demo", ["model.sync_batchnorm=true"])


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        check_device(tiny(model__compile="stages"), "cpu")
    check_device(tiny(), "cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: this machine has no g++")
def test_a_compiled_run_has_the_losses_of_an_eager_one_and_plain_names_in_its_files(tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(inductor.cpp, "simdlen", 1)  # quick to compile, not to run
    name, found = f"{__name__}:small", {}
    for how in ("off", "stages"):
        crops = [{"count": 3, "size": 8}]
        config = tiny(model__compile=how, model__backbone=name, views__crops=crops, max_steps=4)
        result = train(config, FakeBatches(config), tmp_path / how, dataset_fingerprint=FINGERPRINT)
        encoder, _ = load_encoder(result.encoder, name)
        names = sorted(checkpoint.load(tmp_path / how, 4).tensors)
        found[how] = result.losses, names, list(encoder.state_dict())
    assert found["stages"][0] == pytest.approx(found["off"][0], abs=1e-5)
    assert found["stages"][1:] == found["off"][1:]
    assert not any("_orig_mod" in name for name in found["stages"][1])


def test_each_stage_is_compiled_once_and_keeps_its_name(monkeypatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    network = build_model(tiny(model__compile="stages"))
    names = list(network.state_dict())
    prepare_network(network, tiny(model__compile="stages").model, CPU, 1)
    assert compiled == [getattr(network.backbone, f"layer{i}") for i in (1, 2, 3, 4)]
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("backbone", ["resnet-tiny", "resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("channels", [1, 3])
def test_activations_are_channels_last_from_the_first_convolution_on(backbone, channels):
    """An image of one channel is both layouts at once, and convolutions would take the wrong one."""
    network = build_model(tiny(model__backbone=backbone, model__in_channels=channels))
    layouts: list[bool] = []
    for module in network.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    network([torch.rand(2, 2, channels, 64, 64)])
    assert layouts and all(layouts)


def collector() -> tuple[bool, int]:
    return gc.isenabled(), gc.get_freeze_count()


def test_garbage_is_collected_on_schedule_only_and_the_collector_is_put_back(tmp_path):
    before, seen = collector(), []
    config = tiny(max_steps=6, gc_every_steps=2)
    batches, collected = FakeBatches(config), []

    def note(phase: str, info: dict) -> None:
        collected.append((len(seen), info["generation"])) if phase == "start" else None

    def next_batch(step: int):
        seen.append(collector())
        if step == 5:
            raise InterruptedError  # whatever ends a run
        return batches(step)

    gc.callbacks.append(note)
    try:
        with pytest.raises(InterruptedError):
            train(config, next_batch, tmp_path, dataset_fingerprint=FINGERPRINT)
    finally:
        gc.callbacks.remove(note)
    assert all(not enabled and frozen > 0 for enabled, frozen in seen)
    assert [at for at, generation in collected if at > 0] == [2, 4]
    assert collector() == before


def test_a_collector_that_was_off_or_frozen_by_others_is_left_so():
    gc.disable()
    gc.freeze()
    try:
        enabled, frozen = collector()
        with scheduled_collection(1):
            pass
        # What others froze stays frozen, but for objects that went meanwhile: an unfreeze would leave none.
        assert collector()[0] == enabled and collector()[1] > 0.9 * frozen > 0
    finally:
        gc.unfreeze()
        gc.enable()


def test_how_a_run_is_computed_may_change_on_resume(tmp_path):
    config, asked = tiny(max_steps=4, checkpoint__every_steps=2), iter([False, True])
    options = {"dataset_fingerprint": FINGERPRINT, "should_stop": lambda: next(asked)}
    train(config, FakeBatches(config), tmp_path, **options)
    other = tiny(max_steps=4, gc_every_steps=7, model__activation_checkpointing=True)
    result = train(other, FakeBatches(other), tmp_path, dataset_fingerprint=FINGERPRINT)
    assert (result.started_at, result.finished) == (2, True)
