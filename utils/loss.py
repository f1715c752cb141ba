"""Training losses: focal, cross-entropy, Lovász-softmax.

Every loss takes the same arguments and returns a scalar:

    logits: (N, K, H, W).
    target: ids (N, H, W), 0..K-1 or `ignored`.
    ignored: the id of pixels that are left out. Without any other pixel the loss is 0.
    class_weights: (K,). The mean over pixels is weighted by the weights of their classes and divided by the sum of
        these, so that weights shift attention between classes and do not change the scale of the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.classes import IGNORED
from utils.errors import InputError

EPSILON = 1e-7
"""Probabilities are clamped to [EPSILON, 1 - EPSILON] in the focal loss, as released."""

GAMMA = 3.0
"""The focal loss's exponent, as released."""


def pixel_weights(target: Tensor, ignored: int = IGNORED, class_weights: Tensor | None = None) -> Tensor:
    """Return the weight of each pixel of `target` in a mean: 0 if it is ignored, else 1 or its class's weight."""
    known = target != ignored
    if class_weights is None:
        return known
    return known * class_weights.to(target.device)[target.where(known, 0).long()]


def _mean(values: Tensor, target: Tensor, ignored: int, class_weights: Tensor | None) -> Tensor:
    """Return the weighted mean of `values` (N, H, W) over the pixels; 0 if all weights are 0."""
    weights = pixel_weights(target, ignored, class_weights)
    total = weights.sum()
    return (values * weights).sum() / total.where(total > 0, 1)


def focal_loss(
    logits: Tensor, target: Tensor, gamma: float = GAMMA, ignored: int = IGNORED, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean of -(1 - p)^gamma log p over the pixels, p being the true class's probability."""
    target = target.long()
    known = target != ignored
    probability = F.softmax(logits, dim=1).gather(1, target.where(known, 0).unsqueeze(1)).squeeze(1)
    probability = probability.clamp(EPSILON, 1 - EPSILON)
    loss = -((1 - probability) ** gamma) * probability.log()
    return _mean(loss, target, ignored, class_weights)


def cross_entropy(
    logits: Tensor, target: Tensor, ignored: int = IGNORED, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean of -log p over the pixels, p being the true class's probability."""
    target = target.long()
    loss = F.cross_entropy(logits, target, ignore_index=ignored, reduction="none")
    return _mean(loss, target, ignored, class_weights)


def lovasz_softmax(
    logits: Tensor, target: Tensor, ignored: int = IGNORED, class_weights: Tensor | None = None
) -> Tensor:
    """Return the Lovász-softmax loss (Berman et al. 2018), a convex bound of 1 - IoU.

    The batch is taken as one image. The result is the mean over all classes, weighted by `class_weights`. The loss of
    a class without a pixel is its highest probability anywhere.
    """
    target = target.long()
    known = target != ignored
    probability = F.softmax(logits, dim=1).movedim(1, 0)[:, known]  # (K, P)
    if probability.shape[1] == 0:
        return probability.sum()  # 0, with a gradient of zeros
    truth = F.one_hot(target[known], len(probability)).T.to(probability)  # (K, P)
    errors, order = (truth - probability).abs().sort(dim=1, descending=True)
    losses = (errors * _jaccard_steps(truth.gather(1, order))).sum(1)
    if class_weights is None:
        return losses.mean()
    weights = class_weights.to(losses)
    return (losses * weights).sum() / weights.sum()


def _jaccard_steps(truth: Tensor) -> Tensor:
    """Return by how much the Jaccard loss of each class grows with each further wrong pixel, (K, P).

    `truth` (K, P) is 1 for the pixels of each class, in the order of descending errors.
    """
    total = truth.sum(1, keepdim=True)
    intersection = total - truth.cumsum(1)
    union = total + (1 - truth).cumsum(1)
    loss = 1 - intersection / union
    return torch.cat([loss[:, :1], loss.diff(dim=1)], dim=1)


LOSSES = ("focal", "ce", "lovasz", "focal+lovasz")


@dataclass(frozen=True)
class Loss:
    """A training loss, one of `LOSSES`: the sum of its parts, functions of logits and target.

    `class_weights` (K,) are bound in the parts already; None if all classes count alike.
    """

    name: str
    parts: tuple[Callable[[Tensor, Tensor], Tensor], ...]
    class_weights: Tensor | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `logits` (N, K, h, w) against ids `target` (N, H, W), a scalar.

        Logits of another size than the target are enlarged to it bilinearly, corners not aligned.
        """
        if logits.shape[2:] != target.shape[1:]:
            logits = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=False)
        return reduce(torch.add, (part(logits, target) for part in self.parts))

    def term(self, prediction: str) -> str:
        """Return the name of this loss of `prediction` among the terms of a step, such as `focal_global`."""
        return f"{self.name}_{prediction}"

    def weight(self, target: Tensor) -> float:
        """Return the sum of the weights of all pixels of `target`.

        The mean over several targets is the mean of their means, weighted by these sums.
        """
        return float(pixel_weights(target, class_weights=self.class_weights).sum(dtype=torch.float64))


def build_loss(name: str = "focal", gamma: float = GAMMA, class_weights: Tensor | None = None) -> Loss:
    """Return a training loss, one of `LOSSES`. Raises InputError for another name and for a negative `gamma`."""
    if not gamma >= 0:
        raise InputError(f"--gamma {gamma} is negative; give 0 or more (0 is cross-entropy, the released value is 3)")
    parts = {
        "focal": partial(focal_loss, gamma=gamma, class_weights=class_weights),
        "ce": partial(cross_entropy, class_weights=class_weights),
        "lovasz": partial(lovasz_softmax, class_weights=class_weights),
    }
    if name not in LOSSES:
        raise InputError(f"--loss {name} is none of {', '.join(LOSSES)}")
    return Loss(name, tuple(parts[part] for part in name.split("+")), class_weights)


def check_class_weights(values: Sequence[float], names: Sequence[str]) -> Tensor:
    """Return the weights of the classes called `names` as a tensor, (K,) float32.

    Raises InputError if there is not one weight for each class, one is negative or not finite, or all are 0.
    """
    if len(values) != len(names):
        raise InputError(
            f"--class_weights gives {len(values)} numbers for {len(names)} classes; give one each: {', '.join(names)}"
        )
    weights = torch.tensor(values, dtype=torch.float32)
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError(f"--class_weights {list(values)}: weights must be 0 or more, and one of them above 0")
    return weights
