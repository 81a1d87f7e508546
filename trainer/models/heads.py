"""Heads on top of a backbone."""

import torch
from torch import Tensor, nn


def projection_head(in_dim: int, hidden_dim: int, feature_dim: int) -> nn.Sequential:
    """Linear-BatchNorm-ReLU-Linear, [n, in_dim] to [n, feature_dim]; not yet of unit norm."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, feature_dim),
    )


def label_head(in_dim: int, feature_dim: int, classes: int, reads: str) -> nn.Linear:
    """g of the hybrid loss. in_dim, feature_dim: of the pooled and of the projected features."""
    return nn.Linear(
        {"pooled": in_dim, "projected": feature_dim, "both": in_dim + feature_dim}[reads], classes
    )


def head_input(pooled: Tensor, projected: Tensor, reads: str) -> Tensor:
    """What g reads of pooled features [..., D] and projected ones [..., F], of unit norm: [..., D], [..., F]
    or [..., D + F]."""
    if reads == "both":
        return torch.cat([pooled, projected.to(pooled.dtype)], dim=-1)
    return pooled if reads == "pooled" else projected
