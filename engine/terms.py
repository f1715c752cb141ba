"""What the training steps of all stages share: inputs, targets, and the terms of the loss."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dataset.base import Sample
from utils.settings import Settings

Terms = dict[str, Tensor]
"""The terms of one step's loss by name, each the sum over the step, detached."""


def add_terms(total: Terms, terms: Mapping[str, Tensor]) -> None:
    """Add detached `terms` to `total`, name by name."""
    for name, value in terms.items():
        total[name] = total.get(name, 0) + value.detach()


def global_inputs(batch: list[Sample], settings: Settings) -> Tensor:
    """Return the shrunk images of a batch as the network reads them, (B, 3, size_g, size_g)."""
    return settings.to_input(torch.stack([sample.global_image for sample in batch]))


def global_targets(batch: list[Sample], settings: Settings) -> Tensor:
    """Return the shrunk labels of a batch, (B, size_g / 4, size_g / 4) uint8, on the device."""
    return settings.to_device(torch.stack([sample.global_label for sample in batch]))
