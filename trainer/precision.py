"""The arithmetic of a step: autocast, the loss scale of fp16, and whether gradients are finite.

Everything stays on the device: a flag is a tensor that is read where metrics are settled, so a step waits for
nothing (method.md section 8). fp16 needs a loss scale, which comes out of the gradients before anything
looks at them (trap 11); bf16 has the exponents of float32 and needs none.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from trainer.config import Arithmetic

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


@dataclass(frozen=True)
class Precision:
    """`dtype`: of the forward under autocast; None: float32. `scaler`: of the loss, for fp16 only.

    One backward for each part of a batch, then one `check`, then one `update`.
    """

    dtype: torch.dtype | None = None
    scaler: GradScaler | None = None

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        scaled: Any = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()

    def check(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Take the loss scale out of the gradients and look at them: flags, as scalars on the device.

        bad_gradient: a gradient is not finite, which ends the run. fp16 also has loss_scale, of this step,
        and skipped_update: the scale was too large, the update leaves everything as it is, and the scale is
        halved; that is bad only where there is nothing left to halve.
        """
        if self.scaler is None:
            return {"bad_gradient": ~all_finite(optimizer)}
        scale: Any = self.scaler.scale(torch.ones((), device=_device(optimizer)))
        self.scaler.unscale_(optimizer)
        skipped = ~all_finite(optimizer)
        return {"bad_gradient": skipped & (scale <= 1), "loss_scale": scale, "skipped_update": skipped}

    def update(self, optimizer: Optimizer) -> None:
        """optimizer.step(); with a scaler only where the gradients were finite, decided on the device."""
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs of the loss scale; empty without one."""
        if self.scaler is None:
            return {}
        state = self.scaler.state_dict()
        return {
            "scale": torch.tensor(state["scale"], dtype=torch.float64),
            "growth_tracker": torch.tensor(state["_growth_tracker"], dtype=torch.int64),
        }

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Of `state`. A run that began without a loss scale, on another device, takes the first one."""
        if self.scaler is None or not saved:
            return
        found = {"scale": float(saved["scale"]), "_growth_tracker": int(saved["growth_tracker"])}
        self.scaler.load_state_dict({**self.scaler.state_dict(), **found})


FLOAT32 = Precision()


def kind_on(setting: Arithmetic, device: torch.device) -> str:
    """fp32 | bf16 | fp16."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return arithmetic(setting, device.type, bf16=native)


def build_precision(setting: Arithmetic, device: torch.device) -> Precision:
    kind = kind_on(setting, device)
    return Precision(_AUTOCAST[kind], GradScaler(device.type) if kind == "fp16" else None)


def arithmetic(setting: Arithmetic, device: str, *, bf16: bool) -> str:
    """What `auto` is: fp32 on a CPU, bf16 on a GPU that computes it (Ampere or newer), fp16 on others."""
    if setting != "auto":
        return setting
    if device == "cpu":
        return "fp32"
    return "bf16" if bf16 else "fp16"


@torch.no_grad()
def all_finite(optimizer: Optimizer) -> Tensor:
    """bool scalar on the device: whether every gradient of the optimizer's parameters is finite."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return torch.ones((), dtype=torch.bool, device=_device(optimizer))
    return torch.stack(torch._foreach_norm(grads, torch.inf)).isfinite().all()


def _device(optimizer: Optimizer) -> torch.device:
    device: torch.device = optimizer.param_groups[0]["params"][0].device
    return device
