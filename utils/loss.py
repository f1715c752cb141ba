"""Training losses."""

import torch.nn.functional as F
from torch import Tensor

from utils.classes import IGNORED

EPSILON = 1e-7


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 3.0, ignored: int = IGNORED) -> Tensor:
    """Mean of -(1 - p)^gamma log p over the pixels, p being the true class's probability.

    `logits` (N, K, H, W), `target` (N, H, W) ids. Probabilities are clamped to [1e-7, 1 - 1e-7] as released.
    Pixels of id `ignored` count neither in the sum nor in the mean; if there is no other, the loss is 0.
    """
    target = target.long()
    known = target != ignored
    probability = F.softmax(logits, dim=1).gather(1, target.where(known, 0).unsqueeze(1)).squeeze(1)
    probability = probability.clamp(EPSILON, 1 - EPSILON)
    loss = -((1 - probability) ** gamma) * probability.log()
    return (loss * known).sum() / known.sum().clamp(min=1)
