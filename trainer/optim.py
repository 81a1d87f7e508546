"""Optimisers and the learning rate of a step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config import OptimConfig, TrainConfig


class Larc(Optimizer):
    """SGD with momentum under layer-wise adaptive rate control, without clipping.

    `g <- r (g + wd p)`, `r = trust |p| / (|g| + wd |p| + eps)`, `buf <- momentum buf + g`, `p <- p - lr
    buf`. A parameter of zero norm or zero gradient keeps its gradient as it is: no r and no weight decay.
    No host sync. `found_inf`, which torch.amp.GradScaler sets during a step: a scalar on the device, and
    nothing changes where it is not 0.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves the skip to us, and does not wait for the device

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Larc takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        decay, momentum, lr = group["weight_decay"], group["momentum"], group["lr"]
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            good = found_inf == 0
            grads = [torch.where(good, g, 0.0) for g in grads]  # not finite: times 0 would be nan
            momentum, lr = torch.where(good, momentum, 1.0), torch.where(good, lr, 0.0)
        p_norm = torch.stack(torch._foreach_norm(params))
        g_norm = torch.stack(torch._foreach_norm(grads))
        rate = group["trust"] * p_norm / (g_norm + decay * p_norm + group["eps"])
        active = (p_norm > 0) & (g_norm > 0)
        scaled = _times(grads, torch.where(active, rate, 1.0))
        if decay:
            torch._foreach_add_(scaled, _times(params, torch.where(active, rate * decay, 0.0)))
        buffers = [self._buffer(p) for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, scaled)
        if found_inf is None:
            torch._foreach_add_(params, buffers, alpha=-lr)
        else:
            torch._foreach_sub_(params, torch._foreach_mul(buffers, lr))

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _times(tensors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Each tensor times its own entry of `factors`, which stays on the device."""
    scalars: Any = list(factors.unbind())
    return list(torch._foreach_mul(tensors, scalars))


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """One parameter group; weight decay on all parameters (Table I)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
    return Larc(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        trust=config.larc_trust,
        eps=config.larc_eps,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of 0-based `step`: linear warm-up, then a cosine that reaches the final value at step max_steps,
    pure. Both values times the factor of lr_scaling.
    """
    optim = config.optim
    factor = learning_rate_factor(config)
    base, final, warmup = (
        optim.learning_rate * factor,
        optim.final_learning_rate * factor,
        optim.warmup_steps,
    )
    if step < warmup:
        return base * (step + 1) / warmup
    share = min((step - warmup) / max(config.max_steps - warmup, 1), 1.0)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * share))


def learning_rate_factor(config: TrainConfig) -> float:
    """What optim.lr_scaling multiplies the learning rates by (method.md 3-D)."""
    if config.optim.lr_scaling == "none":
        return 1.0
    return config.data.batch_size / config.optim.reference_global_batch


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
