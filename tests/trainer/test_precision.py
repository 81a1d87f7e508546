"""What a step computes in, and that it waits for nothing: autocast, loss scale, finite gradients, syncs."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer import checkpoint, journal, precision
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.meter import NotFiniteError
from trainer.optim import build_optimizer
from trainer.precision import FLOAT32, Precision, arithmetic
from trainer.step import train_step
from trainer.swav import codes, loss
from trainer.swav.queue import build_queue


class Stepper:
    """Model, optimizer and queue of a tiny run, one step at a time."""

    def __init__(self, config: TrainConfig, how: Precision = FLOAT32, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.config, self.how, self.device = config, how, device
        self.model = build_model(config).to(device).train()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.queue = build_queue(config, device)

    def crops(self, step: int) -> list[Tensor]:
        return [torch.from_numpy(c).to(self.device) for c in FakeBatches(self.config)(step).crops]

    def __call__(self, step: int, crops: list[Tensor] | None = None) -> dict:
        crops = crops or self.crops(step)
        return train_step(
            self.model, self.optimizer, self.queue, crops, step, self.config, precision=self.how
        )

    def state(self) -> list[Tensor]:
        of_optimizer = [t for s in self.optimizer.state.values() for t in s.values()]
        return [t.clone() for t in [*self.model.parameters(), *of_optimizer]]


def fp16(init_scale: float = 2.0**10) -> Precision:
    return Precision(torch.float16, GradScaler("cpu", init_scale=init_scale))


def test_auto_is_bf16_where_the_gpu_has_it_and_fp16_on_older_ones():
    assert arithmetic("auto", "cpu", bf16=False) == "fp32"
    assert arithmetic("auto", "cuda", bf16=True) == "bf16"
    assert arithmetic("auto", "cuda", bf16=False) == "fp16"
    assert arithmetic("bf16", "cpu", bf16=False) == "bf16"


@pytest.mark.parametrize("epsilon", [0.03, 0.005])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_forwards_give_finite_float32_codes(monkeypatch, dtype, epsilon):
    found: list[Tensor] = []

    def watched(*args, **options):
        found.extend(result := codes.assign_codes(*args, **options))
        return result

    monkeypatch.setattr("trainer.accumulation.assign_codes", watched)
    # 12, not 8: the bf16 kernel of a CPU takes the gradient of a 3x3 convolution of stride 2 over one pixel
    # from memory that nobody wrote to (torch 2.13)
    crops = [{"count": 2, "size": 16}, {"count": 2, "size": 12}]
    config = tiny(swav__epsilon=epsilon, views__crops=crops)
    stepper = Stepper(config, Precision(dtype, fp16().scaler if dtype == torch.float16 else None))
    for step in range(5):  # the last with the queue
        assert stepper(step)["loss"].isfinite()
    assert stepper.queue.full and len(found) == 10
    assert all(q.dtype == torch.float32 and q.isfinite().all() for q in found)
    assert stepper.queue.features.dtype == torch.float32 and stepper.queue.features.isfinite().all()
    assert all(p.dtype == torch.float32 for p in stepper.model.parameters())


@pytest.mark.parametrize("optimizer", ["larc-sgd", "adamw"])
def test_a_scale_that_is_too_large_skips_the_update_and_nothing_else(optimizer):
    stepper = Stepper(tiny(optim__optimizer=optimizer), fp16(2.0**10))
    for step in range(4):  # the optimizer's state exists
        assert not stepper(step)["skipped_update"]
    stepper.model.prototypes.normalize()  # as every forward does
    before, filled = stepper.state(), stepper.queue.filled
    stepper.how.scaler.update(2.0**40)
    metrics = stepper(4)
    assert metrics["skipped_update"] and not metrics["bad_gradient"]
    stepper.model.prototypes.normalize()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(before, stepper.state(), strict=True))
    assert stepper.queue.filled > filled
    assert float(metrics["loss_scale"]) == 2.0**40 and stepper.how.scaler.get_scale() == 2.0**39
    assert metrics["learning_rate"] == Stepper(stepper.config)(4)["learning_rate"]


@pytest.mark.parametrize("optimizer", ["larc-sgd", "adamw"])
def test_the_loss_scale_is_taken_out_before_the_optimizer_looks_at_norms(optimizer):
    """Weight decay in the trust ratio would be another one beside gradients 2**20 times as large."""
    config = tiny(optim__optimizer=optimizer, optim__weight_decay=0.5, optim__learning_rate=0.1)
    scaled = Stepper(config, Precision(None, GradScaler("cpu", init_scale=2.0**20)))
    plain = Stepper(config)
    for step in range(5):  # beyond the frozen prototypes
        scaled(step)
        plain(step)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(scaled.state(), plain.state(), strict=True))


def test_gradients_that_stay_infinite_at_the_smallest_scale_are_bad():
    stepper = Stepper(tiny(), fp16(1.0))
    crops = stepper.crops(0)
    hook = stepper.model.backbone.conv1.weight.register_hook(lambda g: g * torch.inf)
    metrics = stepper(0, crops)
    hook.remove()
    assert metrics["bad_gradient"]
    stepper.how.scaler.update(1.0)
    assert not stepper(1)["bad_gradient"]


def run(run_dir: Path, config: TrainConfig, stop_after: int = 1000):
    asked = iter(range(1, 1000))
    return train(
        config,
        FakeBatches(config),
        run_dir,
        dataset_fingerprint=FINGERPRINT,
        should_stop=lambda: next(asked) >= stop_after,
    )


def test_a_run_in_fp16_goes_on_exactly_with_the_loss_scale_it_had(tmp_path, monkeypatch):
    """Updates are skipped before and after the stop, and the scale grows again in between."""
    huge = partial(GradScaler, init_scale=2.0**14, growth_interval=2)
    monkeypatch.setattr(precision, "GradScaler", huge)
    config = tiny(precision="fp16", max_steps=9, checkpoint__every_steps=100)
    run(tmp_path / "straight", config)
    run(tmp_path / "stopped", config, stop_after=4)
    assert run(tmp_path / "stopped", config).started_at == 4
    straight, stopped = (journal.read(journal.journal_path(tmp_path / n)) for n in ("straight", "stopped"))
    assert stopped == straight
    skipped = [row["skipped_update"] for row in straight]
    assert sum(skipped[:4]) and sum(skipped[4:]) and not all(skipped)
    files = [(tmp_path / n / "encoder.safetensors").read_bytes() for n in ("straight", "stopped")]
    assert files[0] == files[1]


@pytest.mark.parametrize("at", [4, 5])
def test_a_gradient_that_is_not_finite_is_told_by_its_step_and_never_reaches_a_checkpoint(
    tmp_path, monkeypatch, at
):
    calls = iter(range(1000))

    def poisoned(scores: Tensor, *args) -> Tensor:
        if next(calls) == 2 * at:  # two modalities
            scores.register_hook(lambda g: g * torch.nan)
        return loss.swapped_prediction(scores, *args)

    monkeypatch.setattr("trainer.objective.swapped_prediction", poisoned)
    with pytest.raises(NotFiniteError, match=f"a gradient is not finite after step {at}; .* is step 3"):
        run(tmp_path, tiny())
    assert checkpoint.list_steps(tmp_path) == [3]
    assert len(journal.read(journal.journal_path(tmp_path))) == at


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for its device: reading a number, shapes that depend on values, and
    tensors made of numbers, which are copied to the device from memory that is not pinned."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "lift_fresh",
        "index",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITING, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["larc-sgd", "adamw"])
@pytest.mark.parametrize(("how", "parts"), [(FLOAT32, 1), (fp16(), 1), (FLOAT32, 2)])
def test_nothing_in_a_step_reads_from_the_device(optimizer, how, parts):
    changes = {"optim__optimizer": optimizer, "optim__accumulation": parts}
    stepper = Stepper(tiny(swav__freeze_prototypes_steps=2, **changes), how)
    for step in range(5):  # frozen and free prototypes, the queue empty and full, logged and not
        crops = stepper.crops(step)
        with NoWaiting():
            stepper(step, crops)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: this machine has none")
@pytest.mark.parametrize("optimizer", ["larc-sgd", "adamw"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_no_host_sync_in_a_step_on_a_gpu(optimizer, kind):
    """Steps that are not logged: those that are end with a read of the metrics anyway."""
    how = precision.build_precision(kind, torch.device("cuda", 0))
    stepper = Stepper(tiny(optim__optimizer=optimizer, log_every_steps=1000), how, "cuda")
    for step in range(4):
        stepper(step)
    crops = [stepper.crops(step) for step in range(4, 8)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, of_step in enumerate(crops, 4):
            stepper(step, of_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
