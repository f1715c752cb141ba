"""The optimizer and its schedule, as the options of training set them."""

import argparse
from collections.abc import Callable

import torch
from torch import nn

from utils.errors import InputError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
"""By `--optimizer`."""

ENCODERS = ("backbone", "encoder")
"""The names of encoders within networks: GLNet's, and those of segmentation_models_pytorch."""


def poly(step: int, total: int, power: float = 0.9) -> float:
    """Return the factor of the base learning rate at schedule step `step` of `total`: (1 - t/T)^0.9, 0 past the end."""
    return max(0.0, 1 - step / total) ** power


def rate_factor(step: int, total: int, warmup: int = 0) -> float:
    """Return the factor of the base learning rate at schedule step `step` of `total`.

    It grows linearly over the first `warmup` steps, to 1 in the last of them; `poly` spans the others.
    """
    return (step + 1) / warmup if step < warmup else poly(step - warmup, total - warmup)


def build_optimizer(options: argparse.Namespace, network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters of `network` that learn.

    Args:
        options: resolved. With a `backbone_lr` other than 1 the encoders' parameters are a group of their own, the
            first.
        network: the encoders are the modules in it that `ENCODERS` names.
    """
    learned = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    build = OPTIMIZERS[options.optimizer]
    if options.backbone_lr == 1:
        return build([p for _, p in learned], lr=options.lr, weight_decay=options.weight_decay)
    encoders: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in learned:
        (others if set(ENCODERS).isdisjoint(name.split(".")) else encoders).append(parameter)
    groups = [{"params": encoders, "lr": options.lr * options.backbone_lr}, {"params": others}]
    return build(groups, lr=options.lr, weight_decay=options.weight_decay)


def build_schedule(
    options: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of a run of so many `steps`. Raises InputError if the warm-up takes them all."""
    warmup = options.warmup
    if warmup >= steps:
        raise InputError(f"--warmup {warmup} leaves none of the run's {steps} steps; give less, or train longer")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: rate_factor(t, steps, warmup))
