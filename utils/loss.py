"""Training losses: focal, cross-entropy, Lovász-softmax.

All take `logits` (N, K, H, W) and `target` (N, H, W) ids, and leave pixels of the id `ignored` out; if there is no
other, the loss is 0. With `class_weights` (K,) the pixels' mean is weighted by their classes' weights and divided by
the sum of these, so that weights shift attention between classes and leave the scale of the loss as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.classes import IGNORED
from utils.errors import InputError

EPSILON = 1e-7
GAMMA = 3.0


def pixel_weights(target: Tensor, ignored: int = IGNORED, class_weights: Tensor | None = None) -> Tensor:
    """What each pixel of `target` counts in a mean: 0 where it is `ignored`, else 1 or its class's weight."""
    known = target != ignored
    if class_weights is None:
        return known
    return known * class_weights.to(target.device)[target.where(known, 0).long()]


def _mean(values: Tensor, target: Tensor, ignored: int, class_weights: Tensor | None) -> Tensor:
    """The (weighted) mean of `values` (N, H, W) over the pixels; 0 where these weigh nothing."""
    weights = pixel_weights(target, ignored, class_weights)
    total = weights.sum()
    return (values * weights).sum() / total.where(total > 0, 1)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = GAMMA,
    ignored: int = IGNORED,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean of -(1 - p)^gamma log p over the pixels, p being the true class's probability.

    Probabilities are clamped to [1e-7, 1 - 1e-7] as released.
    """
    target = target.long()
    known = target != ignored
    probability = F.softmax(logits, dim=1).gather(1, target.where(known, 0).unsqueeze(1)).squeeze(1)
    probability = probability.clamp(EPSILON, 1 - EPSILON)
    loss = -((1 - probability) ** gamma) * probability.log()
    return _mean(loss, target, ignored, class_weights)


def cross_entropy(
    logits: Tensor, target: Tensor, ignored: int = IGNORED, class_weights: Tensor | None = None
) -> Tensor:
    """Mean of -log p over the pixels, p being the true class's probability."""
    target = target.long()
    loss = F.cross_entropy(logits, target, ignore_index=ignored, reduction="none")
    return _mean(loss, target, ignored, class_weights)


def lovasz_softmax(
    logits: Tensor, target: Tensor, ignored: int = IGNORED, class_weights: Tensor | None = None
) -> Tensor:
    """Lovász-softmax (Berman et al. 2018): a convex bound of 1 - IoU, over the batch as one, mean over the classes.

    All classes count, those without a pixel too: there the loss is the highest probability of the class anywhere.
    `class_weights` weigh the classes in the mean.
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
    """(K, P): by how much the Jaccard loss of each class grows when one more pixel, in this order, is wrong."""
    total = truth.sum(1, keepdim=True)
    intersection = total - truth.cumsum(1)
    union = total + (1 - truth).cumsum(1)
    loss = 1 - intersection / union
    return torch.cat([loss[:, :1], loss.diff(dim=1)], dim=1)


LOSSES = ("focal", "ce", "lovasz", "focal+lovasz")


@dataclass(frozen=True)
class Loss:
    """The loss called `name`, one of `LOSSES`: the sum of its `parts`.

    Calling it with logits and target gives a scalar. `class_weights` (K,), if any, are what its parts weigh with.
    """

    name: str
    parts: tuple[Callable[[Tensor, Tensor], Tensor], ...]
    class_weights: Tensor | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return sum(part(logits, target) for part in self.parts)

    def term(self, prediction: str) -> str:
        """What this loss of `prediction` is called among the terms of a step: `focal_global`."""
        return f"{self.name}_{prediction}"

    def weight(self, target: Tensor) -> float:
        """What all pixels of `target` count together: by it the means of several targets make one."""
        return float(pixel_weights(target, class_weights=self.class_weights).sum(dtype=torch.float64))


def build_loss(name: str = "focal", gamma: float = GAMMA, class_weights: Tensor | None = None) -> Loss:
    """The loss called `name`, one of `LOSSES`; the default is `focal_loss`, as released. `gamma` is the focal loss's.

    Raises InputError for another name and for a negative gamma.
    """
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
    """(K,) float32 weights of the classes `names`.

    Raises InputError unless there is one for each class, none negative, and not all zero.
    """
    if len(values) != len(names):
        raise InputError(
            f"--class_weights gives {len(values)} numbers for {len(names)} classes; give one each: {', '.join(names)}"
        )
    weights = torch.tensor(values, dtype=torch.float32)
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError(f"--class_weights {list(values)}: weights must be 0 or more, and one of them above 0")
    return weights
