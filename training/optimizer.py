"""The released optimizer and its schedule."""

import torch
from torch import nn


def poly(step: int, total: int, power: float = 0.9) -> float:
    """Return the factor of the base learning rate at schedule step `step` of `total`: (1 - t/T)^0.9, 0 past the end."""
    return max(0.0, 1 - step / total) ** power


def build_optimizer(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return Adam with the base learning rate `lr`, of the parameters of `network` that learn."""
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr, weight_decay=5e-4)


def build_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of a run of so many `steps`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: poly(t, steps))
