"""Frozen features: what the probes are given."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Features = NDArray[np.float32]


def extract(
    backbone: nn.Module, images: Features, *, device: torch.device | str = "cpu", batch_size: int = 64
) -> Features:
    """Pooled features of a backbone in eval mode.

    images f32 [n, 1, S, S] in [0, 1] (repeated where the backbone takes more channels); result f32 [n, F].
    The backbone's mode and device are as before afterwards.
    """
    was_training = backbone.training
    first = next(backbone.parameters())
    home, channels = first.device, first.shape[1]
    backbone.eval().to(device)
    try:
        with torch.inference_mode():
            parts = [
                backbone(_to_channels(torch.from_numpy(images[i : i + batch_size]), channels).to(device))
                .float()
                .cpu()
                .numpy()
                for i in range(0, len(images), batch_size)
            ]
    finally:
        backbone.train(was_training).to(home)
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def pixels(images: Features, side: int = 32) -> Features:
    """The baseline without a network: the image itself at side x side px; f32 [n, 1, S, S] -> f32 [n,
    side^2]."""
    shrunk = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(images), side)
    return shrunk.flatten(1).numpy()


def _to_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    return images.expand(-1, channels, -1, -1) if images.shape[1] != channels else images
