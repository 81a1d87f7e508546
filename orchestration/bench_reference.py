"""The training step of SwAV as it is commonly written, restated from the paper: the baseline of `bench step`.

Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (2020), for several
modalities: activations in the framework's own layout (NCHW), one forward for each crop size, a Sinkhorn of
its own for each assigned crop and modality with four collectives (the total, then one an iteration), LARC
parameter by parameter with its norms read on the host. The losses are those of trainer.step.train_step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from trainer.config import TrainConfig
from trainer.optim import learning_rate
from trainer.swav.model import MultiModalSwav


class ReferenceStep:
    """One rank's step; with `ranks` the gradients are averaged by DistributedDataParallel around `model`."""

    def __init__(self, core: MultiModalSwav, config: TrainConfig, ranks: bool = False) -> None:
        self._core, self._config, self._ranks = core, config, ranks
        net: nn.Module = _Forward(core)
        self._net = nn.parallel.DistributedDataParallel(net) if ranks else net
        optim = config.optim
        self._sgd = torch.optim.SGD(
            net.parameters(), lr=optim.learning_rate, momentum=optim.momentum, foreach=False
        )

    def __call__(self, crops: Sequence[Tensor], step: int) -> Tensor:
        """crops: uint8 [count, n, S, S] of each size, images modality by modality. The loss of this rank."""
        swav = self._config.swav
        for group in self._sgd.param_groups:
            group["lr"] = learning_rate(step, self._config)
        self._sgd.zero_grad(set_to_none=True)
        scores = self._net(crops)  # of each modality [V, b, K]
        loss = torch.stack([self._loss(of_modality) for of_modality in scores]).mean()
        loss.backward()
        if step < swav.freeze_prototypes_steps:
            for parameter in self._core.prototypes.parameters():
                parameter.grad = None
        self._adapt()
        self._sgd.step()
        return loss.detach()

    def _loss(self, scores: Tensor) -> Tensor:
        """Swapped prediction of one modality, crop pair by crop pair."""
        swav = self._config.swav
        total = scores.new_zeros(())
        for assigned in swav.assign:
            code = self._sinkhorn(scores[assigned].detach())
            others = [v for v in range(len(scores)) if v != assigned]
            part = scores.new_zeros(())
            for v in others:
                part -= (code * log_softmax(scores[v] / swav.temperature, dim=1)).sum(dim=1).mean()
            total = total + part / len(others)
        return total / len(swav.assign)

    @torch.no_grad()
    def _sinkhorn(self, scores: Tensor) -> Tensor:
        """[b, K]: every normalisation done on the matrix itself, over the images of all ranks."""
        code = torch.exp(scores / self._config.swav.epsilon).t()  # [K, b]
        prototypes, images = code.shape[0], code.shape[1] * (dist.get_world_size() if self._ranks else 1)
        code /= self._summed(code.sum())
        for _ in range(self._config.swav.sinkhorn_iterations):
            code /= self._summed(code.sum(dim=1, keepdim=True)) * prototypes
            code /= code.sum(dim=0, keepdim=True) * images
        return (code * images).t()

    def _summed(self, value: Tensor) -> Tensor:
        if self._ranks:
            dist.all_reduce(value)
        return value

    def _adapt(self) -> None:
        """LARC without clipping: the gradient takes the weight decay and the rate of its parameter."""
        optim = self._config.optim
        for group in self._sgd.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                weight, gradient = parameter.data.norm().item(), parameter.grad.norm().item()
                if weight and gradient:
                    decay = optim.weight_decay
                    rate = optim.larc_trust * weight / (gradient + decay * weight + optim.larc_eps)
                    parameter.grad.add_(parameter.data, alpha=decay).mul_(rate)


class _Forward(nn.Module):
    """Scores of each modality, by one forward for each crop size and one of the head."""

    def __init__(self, core: MultiModalSwav) -> None:
        super().__init__()
        self.core = core

    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        core: Any = self.core
        with torch.no_grad():
            for layer in core.prototypes.values():
                layer.weight.copy_(normalize(layer.weight, dim=1))
        pooled = [self._pooled(group.flatten(0, 1)[:, None].float() / 255) for group in crops]
        features = normalize(core.projection_head(torch.cat(pooled)), dim=1)
        by_crop = features.unflatten(0, (-1, crops[0].shape[1]))  # [V, n, F]
        parts = by_crop.chunk(len(core.prototypes), dim=1)
        return [layer(part) for layer, part in zip(core.prototypes.values(), parts, strict=True)]

    def _pooled(self, x: Tensor) -> Tensor:
        net: Any = self.core.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for name in net.stages:
            x = getattr(net, name)(x)
        return x.mean(dim=(2, 3))
