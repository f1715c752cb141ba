"""Which patches of an image the local branch computes, chosen by what the global branch predicts.

Coarse to fine (the paper's variant for class imbalance): in a binary set, whose one class is background, only patches
in boxes around the predicted foreground. Uncertain patches (after PPN's idea): of any classes, only the patches in
which the global prediction is least certain.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.canvas import BoxScores, enlarged_boxes
from utils.classes import Classes
from utils.errors import InputError
from utils.tiling import MIN_OVERLAP, Box, Patches, PatchGrid, PatchSubset, RegionGrids, Size, around, map_size

BOX_MARGIN = 0.1
"""The part of its sides by which a box is enlarged, in each of the four directions."""

MOST_MARGIN = 10.0
"""The largest margin that is accepted: the sides of a box are then multiplied by 21."""

OUTSIDE = 10.0
"""The score of background in pixels that no patch covers. The other class has 0, which makes a probability of 0.99995.
It is finite, so that means with scores of the same pixel from turned images, or from other scenes, stay finite."""


@dataclass(frozen=True)
class Coverage:
    """How much of one or more images was computed at full resolution: pixels and patches of all, and those of it."""

    pixels: int = 0
    covered: int = 0
    patches: int = 0
    computed: int = 0

    def __add__(self, other: "Coverage") -> "Coverage":
        return Coverage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def pixels_not_covered(self) -> float:
        """The share of pixels that no patch covered, 0..1."""
        return 1 - self.covered / max(1, self.pixels)

    @property
    def patches_not_computed(self) -> float:
        """The share of patches that were not computed, 0..1."""
        return 1 - self.computed / max(1, self.patches)


@dataclass(frozen=True)
class UncertainPatches:
    """Selects the patches in which the global prediction is least certain; elsewhere the global prediction stands.

    The certainty of a cell is the margin between the probabilities of its two best classes; that of a patch is the mean
    over the cells that it covers. `share` is the part of all patches that is selected, rounded up, 0..1.
    """

    share: float

    def patches(self, logits: Tensor, size: Size, patch: int, min_overlap: int, label: Tensor | None = None) -> Patches:
        """Return the patches, of side `patch`, that are computed of an image of `size` pixels.

        `logits` are of the global branch, (1, n_class, h, w); `label`, in training, the image's class ids, (H, W)
        uint8, without influence here.
        """
        grid = PatchGrid.cover(size, patch, min_overlap)
        count = math.ceil(self.share * len(grid))
        if count == len(grid):
            return grid
        best = logits[0].float().softmax(0).topk(min(2, logits.shape[1]), dim=0).values
        margins = best[0] - best[-1]  # (h, w)
        means = torch.stack([box.of(margins).mean() for box in grid.feature_boxes(map_size(margins))])
        return PatchSubset(grid, tuple(sorted(means.argsort(stable=True)[:count].tolist())))

    def outside(self, logits: Tensor, size: Size, upsample: str = "nearest") -> BoxScores:
        """Return the scores of pixels that no patch covers: the global prediction's, enlarged as `upsample` says."""
        return enlarged_boxes(logits, size, upsample)


@dataclass(frozen=True)
class CoarseToFine:
    """Selects the patches with the class `foreground`; the other of the two is `background`.

    A box is enlarged by the part `margin` of its sides, in each direction. Training uses boxes that hold the part
    `recall` of a label's foreground.
    """

    foreground: int
    margin: float = BOX_MARGIN
    recall: float = 0.9

    @classmethod
    def of(cls, classes: Classes, margin: float = BOX_MARGIN) -> "CoarseToFine":
        """Return the selection for a binary set. Raises InputError if `classes` are not two, one of them foreground."""
        if len(classes) != 2 or len(classes.foreground) != 1:
            found = ", ".join(classes.names[k] for k in classes.foreground) or "none"
            raise InputError(
                f"--coarse_to_fine needs two classes, one of them foreground; here are {len(classes)} classes with "
                f"{found} as foreground: leave it out, or name the foreground of a binary set in its description"
            )
        return cls(classes.foreground[0], margin)

    @property
    def background(self) -> int:
        """The id of the class that is not selected."""
        return 1 - self.foreground

    def outside(self, logits: Tensor, size: Size, upsample: str = "nearest") -> BoxScores:
        """Return the scores of pixels that no patch covers: constant, those of background."""
        scores = logits.new_tensor([OUTSIDE if k == self.background else 0.0 for k in range(2)]).view(2, 1, 1)
        return lambda box: scores

    def patches(
        self, logits: Tensor, size: Size, patch: int, min_overlap: int, label: Tensor | None = None
    ) -> RegionGrids:
        """Return the patches with predicted foreground; if they miss too much of the label's, those with that.

        For the parameters see `UncertainPatches.patches`.
        """
        grids = self.grids(self.predicted(logits), size, patch, min_overlap)
        if label is None or self.covers(grids, label):
            return grids
        return self.grids(self.labelled(label, map_size(logits)), size, patch, min_overlap)

    def predicted(self, logits: Tensor) -> Tensor:
        """Return where `logits` (1, 2, h, w) predict foreground, (h, w) bool."""
        return logits[0, self.foreground] > logits[0, self.background]

    def labelled(self, label: Tensor, size: Size) -> Tensor:
        """Return which cells of a map of `size` hold any foreground pixel of a label (H, W) uint8, (h, w) bool."""
        return F.adaptive_max_pool2d((label == self.foreground)[None].float(), size)[0] > 0

    def covers(self, grids: RegionGrids, label: Tensor) -> bool:
        """Return whether `grids` cover at least the part `recall` of the foreground of `label`, (H, W) uint8 ids."""
        foreground = label == self.foreground
        inside = sum(int(region.of(foreground).sum()) for region in grids.regions)
        return inside >= self.recall * int(foreground.sum())

    def grids(self, mask: Tensor, size: Size, patch: int, min_overlap: int = MIN_OVERLAP) -> RegionGrids:
        """Return the patches of an image that cover its coarse foreground, `mask` (h, w) bool; for an empty one none.

        They cover one box around everything; or one box per object, that is per connected part of the mask, joined
        where boxes overlap, if these take fewer patches.
        """
        spans = _objects(mask, size)
        if not spans:
            return RegionGrids(size, ())
        least = min(patch, size[0]), min(patch, size[1])
        apart = _joined([_enlarged(box, size, least, self.margin) for box in spans])
        whole = _enlarged(around(spans), size, least, self.margin)
        choices = (RegionGrids.cover(size, boxes, patch, min_overlap) for boxes in ([whole], apart))
        return min(choices, key=len)  # the first of equal ones


PatchSelection = UncertainPatches | CoarseToFine
"""A rule that selects patches."""


def _objects(mask: Tensor, size: Size) -> list[Box]:
    """Return a box for each connected part of `mask` (h, w), diagonals included: the pixels that its cells touch."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.cpu().numpy().astype(np.uint8), connectivity=8)
    boxes = []
    for left, top, width, height, _ in stats[1:].tolist():
        axes = zip((top, left), (height, width), mask.shape, size, strict=True)
        spans = [(first * side // cells, -(-(first + count) * side // cells)) for first, count, cells, side in axes]
        starts, lengths = zip(*((start, end - start) for start, end in spans), strict=True)
        boxes.append(Box(*starts, *lengths))
    return boxes


def _enlarged(box: Box, size: Size, least: Size, margin: float) -> Box:
    """Return `box` with a margin all around, at least as large as `least`, within an image of `size`."""
    starts, lengths = [], []
    for first, length, side, shortest in zip(box[:2], box[2:], size, least, strict=True):
        start, end = max(0, first - round(margin * length)), min(side, first + length + round(margin * length))
        if end - start < shortest:
            start = min(max(0, (start + end - shortest) // 2), side - shortest)
            end = start + shortest
        starts.append(start)
        lengths.append(end - start)
    return Box(*starts, *lengths)


def _joined(boxes: Sequence[Box]) -> list[Box]:
    """Return boxes that do not overlap, sorted: overlapping ones are replaced by the box around them, in any order."""
    apart: list[Box] = []
    for box in boxes:
        while others := [other for other in apart if box.overlap(other)]:
            apart = [other for other in apart if other not in others]
            box = around([box, *others])
        apart.append(box)
    return sorted(apart)
