"""Heads on top of a backbone."""

from torch import nn


def projection_head(in_dim: int, hidden_dim: int, feature_dim: int) -> nn.Sequential:
    """Linear-BatchNorm-ReLU-Linear, [n, in_dim] to [n, feature_dim]; not yet of unit norm."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, feature_dim),
    )
