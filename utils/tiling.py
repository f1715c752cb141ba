"""How an image is cut into patches: the only place where coordinates are computed.

Sizes are (height, width) and boxes (top, left, height, width), everywhere in this project.
The float64 expressions are the released implementation's: exact rationals round some ties the other way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import InputError

Size = tuple[int, int]

MIN_OVERLAP = 50
"""Pixels that neighbouring patches share at least, as released."""


class Box(NamedTuple):
    """A rectangle of cells or pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """The view of `x` (..., H, W) that this box covers: (..., height, width)."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def axis_starts(side: int, patch: int, min_overlap: int = MIN_OVERLAP) -> list[int]:
    """First pixels of the patches along an axis of `side` pixels; a side not longer than `patch` has one, at 0.

    Raises InputError when `patch` does not exceed `min_overlap` and the side is longer.
    """
    if side <= patch:
        return [0]
    if patch <= min_overlap:
        raise InputError(
            f"size_p={patch} is not larger than min_overlap={min_overlap}; enlarge the one or lower the other"
        )
    count = max(2, -(-side // patch))
    while patch - (side - patch) / (count - 1) < min_overlap:
        count += 1
    step = (side - patch) / (count - 1)
    return [round(i * step) for i in range(count - 1)] + [side - patch]


@dataclass(frozen=True)
class Axis:
    """Patches along one axis: `side` and `patch` in pixels, the first pixel of each patch in `starts`."""

    side: int
    patch: int
    starts: tuple[int, ...]

    @classmethod
    def cover(cls, side: int, patch: int, min_overlap: int = MIN_OVERLAP) -> "Axis":
        return cls(side, min(side, patch), tuple(axis_starts(side, patch, min_overlap)))

    def cells(self, length: int) -> tuple[tuple[int, ...], int]:
        """On a feature map of `length` cells: the first cell of each patch, and how many cells every patch covers."""
        covered = max(1, round(length * (self.patch / self.side)))
        return tuple(min(round(start / self.side * length), length - covered) for start in self.starts), covered

    def counts(self) -> Tensor:
        """(side,) float32: how many patches cover each pixel."""
        steps = torch.zeros(self.side + 1)
        starts = torch.tensor(self.starts)
        steps.index_add_(0, starts, torch.ones(len(self.starts)))
        steps.index_add_(0, starts + self.patch, -torch.ones(len(self.starts)))
        return steps.cumsum(0)[: self.side]

    def shrunk_counts(self, length: int) -> Tensor:
        """(length,) float32: the per-pixel counts resized bilinearly to `length` cells."""
        counts = self.counts().view(1, 1, self.side, 1)
        return F.interpolate(counts, size=(length, 1), mode="bilinear", align_corners=False).view(length)


@dataclass(frozen=True)
class PatchGrid:
    """Overlapping patches of one size that cover an image, row by row."""

    rows: Axis
    columns: Axis

    @classmethod
    def cover(cls, size: Size, patch: int | Size, min_overlap: int = MIN_OVERLAP) -> "PatchGrid":
        """The grid for an image of `size`; an axis not longer than the patch gets one patch as long as the image.

        Raises InputError when a patch does not exceed `min_overlap` and the image is larger than it.
        """
        height, width = (patch, patch) if isinstance(patch, int) else patch
        return cls(Axis.cover(size[0], height, min_overlap), Axis.cover(size[1], width, min_overlap))

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def image(self) -> Size:
        return self.rows.side, self.columns.side

    @property
    def patch(self) -> Size:
        """Size of every patch."""
        return self.rows.patch, self.columns.patch

    def boxes(self) -> list[Box]:
        """The patches in pixels, in row-major order."""
        return [Box(top, left, *self.patch) for top in self.rows.starts for left in self.columns.starts]

    def feature_boxes(self, size: Size) -> list[Box]:
        """The cells that each patch covers on a map of `size`: all of one size, never empty, within the map."""
        tops, height = self.rows.cells(size[0])
        lefts, width = self.columns.cells(size[1])
        return [Box(top, left, height, width) for top in tops for left in lefts]

    def sub_batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` consecutive patches that together are all of them."""
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def shrunk_counts(self, size: Size) -> Tensor:
        """(H, W) float32: per-pixel patch counts resized bilinearly to `size`.

        This is what the released implementation divides merged maps by. It is not the true count of the
        patches that cover a cell. Counts and bilinear weights are both separable, so two vectors suffice.
        """
        return torch.outer(self.rows.shrunk_counts(size[0]), self.columns.shrunk_counts(size[1]))
