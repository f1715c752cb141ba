"""The common part of all stages' training steps: inputs, targets, and the terms of the loss."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dataset.base import Sample
from utils.errors import required
from utils.settings import Settings

Terms = dict[str, Tensor]
"""The terms of a loss by name, scalars."""


def outside_autocast(settings: Settings) -> AbstractContextManager:
    """Return a context for backward passes; in autocast, float32 values would get gradients of lower precision."""
    return torch.autocast(settings.device.type, enabled=False)


def add_terms(total: Terms, terms: Mapping[str, Tensor]) -> None:
    """Add `terms`, detached, to the sums `total` of a step, name by name."""
    for name, value in terms.items():
        total[name] = total.get(name, 0) + value.detach()


def global_inputs(batch: list[Sample], settings: Settings) -> Tensor:
    """Return the shrunk images of a batch as the network's input, (B, bands, size_g, size_g)."""
    return settings.to_input(torch.stack([sample.global_image for sample in batch]))


def global_targets(batch: list[Sample], settings: Settings) -> Tensor:
    """Return the shrunk labels of a batch, (B, side, side) uint8, on the device; the side is size_g / 4, or size_g."""
    return settings.to_device(torch.stack([required(sample.global_label, "label") for sample in batch]))
