"""Coarse to fine: the boxes around what a first look at the shrunk image found (paper, its class-imbalance variant).

Of a binary set, whose one class is background, only these boxes are looked at in full resolution.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import cv2
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.classes import Classes
from utils.errors import InputError
from utils.tiling import MIN_OVERLAP, Box, RegionGrids, Size, around

BOX_MARGIN = 0.1
"""By what part of its sides a box is enlarged, in each of the four directions."""

MOST_MARGIN = 10.0
"""A box then has 21 times its sides: more is a slip."""

BOX_RECALL = 0.9
"""What part of the label's foreground the coarse boxes must hold for training to use them."""

OUTSIDE = 10.0
"""The score of background where nobody looked, the other class having 0: a probability of 0.99995. It is finite, so
that means with other looks at the same pixel, turned or from another scene, stay means."""


@dataclass(frozen=True)
class Effort:
    """How much of images was looked at in full resolution: `looked_at` of their `pixels`, by `cut` of the `patches`
    that cover them."""

    pixels: int = 0
    looked_at: int = 0
    patches: int = 0
    cut: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def not_looked_at(self) -> float:
        """The share of pixels, 0..1."""
        return 1 - self.looked_at / max(1, self.pixels)

    @property
    def not_computed(self) -> float:
        """The share of patches, 0..1."""
        return 1 - self.cut / max(1, self.patches)


@dataclass(frozen=True)
class CoarseToFine:
    """What is looked at: boxes around the class `foreground`; the other of the two is `background`."""

    foreground: int
    margin: float = BOX_MARGIN
    recall: float = BOX_RECALL

    @classmethod
    def of(cls, classes: Classes, margin: float = BOX_MARGIN, recall: float = BOX_RECALL) -> "CoarseToFine":
        """Raises InputError where `classes` are not two, one of them foreground."""
        if len(classes) != 2 or len(classes.foreground) != 1:
            found = ", ".join(classes.names[k] for k in classes.foreground) or "none"
            raise InputError(
                f"--coarse_to_fine looks for the one foreground class of two; here are {len(classes)} classes with "
                f"{found} as foreground: leave it out, or name the foreground of a binary set in its description"
            )
        return cls(classes.foreground[0], margin, recall)

    @property
    def background(self) -> int:
        return 1 - self.foreground

    @property
    def outside(self) -> tuple[float, ...]:
        """The scores by class where nobody looked."""
        return tuple(OUTSIDE if k == self.background else 0.0 for k in range(2))

    def found(self, logits: Tensor) -> Tensor:
        """(h, w) bool: where `logits` (1, 2, h, w) say foreground."""
        return logits[0, self.foreground] > logits[0, self.background]

    def labelled(self, label: Tensor, size: Size) -> Tensor:
        """(h, w) bool: the cells of a map of `size` with any foreground pixel of `label` (H, W) uint8 ids."""
        return F.adaptive_max_pool2d((label == self.foreground)[None].float(), size)[0] > 0

    def covers(self, grids: RegionGrids, label: Tensor) -> bool:
        """Whether `grids` hold enough of the foreground of `label` (H, W)."""
        foreground = label == self.foreground
        inside = sum(int(region.of(foreground).sum()) for region in grids.regions)
        return inside >= self.recall * int(foreground.sum())

    def grids(self, mask: Tensor, size: Size, patch: int, min_overlap: int = MIN_OVERLAP) -> RegionGrids:
        """The patches to look at in an image of `size`, given a coarse `mask` (h, w) bool of it; none of an empty one.

        They cover one box around everything; or one per object, that is per connected part of the mask, those that
        overlap joined, where these take fewer patches.
        """
        spans = _objects(mask, size)
        if not spans:
            return RegionGrids(size, ())
        least = tuple(min(patch, side) for side in size)
        apart = _joined([_enlarged(box, size, least, self.margin) for box in spans])
        whole = _enlarged(around(spans), size, least, self.margin)
        choices = (RegionGrids.cover(size, boxes, patch, min_overlap) for boxes in ([whole], apart))
        return min(choices, key=len)  # the first of equal ones


def _objects(mask: Tensor, size: Size) -> list[Box]:
    """The connected parts of `mask`, diagonals included: the pixels that their cells touch, as boxes."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.cpu().numpy().astype(np.uint8), connectivity=8)
    boxes = []
    for left, top, width, height, _ in stats[1:].tolist():
        first, end = _pixels(top, height, mask.shape[0], size[0]), _pixels(left, width, mask.shape[1], size[1])
        boxes.append(Box(first[0], end[0], first[1], end[1]))
    return boxes


def _pixels(first: int, count: int, cells: int, side: int) -> tuple[int, int]:
    """First pixel and length of what `count` cells from `first` on touch, of `cells` that share `side` pixels."""
    start = first * side // cells
    return start, -(-(first + count) * side // cells) - start


def _enlarged(box: Box, size: Size, least: Size, margin: float) -> Box:
    """`box` with a margin all around, at least as large as `least`, within an image of `size`."""
    spans = []
    for first, length, side, shortest in zip(box[:2], box[2:], size, least, strict=True):
        start, end = max(0, first - round(margin * length)), min(side, first + length + round(margin * length))
        if end - start < shortest:
            start = min(max(0, (start + end - shortest) // 2), side - shortest)
            end = start + shortest
        spans.append((start, end - start))
    return Box(spans[0][0], spans[1][0], spans[0][1], spans[1][1])


def _overlap(a: Box, b: Box) -> bool:
    return all(a[k] < b[k] + b[k + 2] and b[k] < a[k] + a[k + 2] for k in (0, 1))


def _joined(boxes: Sequence[Box]) -> list[Box]:
    """`boxes`, and those around joined ones, joined as long as any overlap. The order of `boxes` does not matter."""
    apart: list[Box] = []
    for box in boxes:
        while others := [other for other in apart if _overlap(box, other)]:
            apart = [other for other in apart if other not in others]
            box = around([box, *others])
        apart.append(box)
    return sorted(apart)
