"""How an image is cut into patches: the only place where coordinates are computed.

Sizes are (height, width) and boxes (top, left, height, width), everywhere in this project.
The float64 expressions are the released implementation's: exact rationals round some ties the other way.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of `boxes`."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return Box(top, left, bottom - top, right - left)


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
    """Patches along one axis of an image: its `side` and their length `patch` in pixels, the first pixel of each in
    `starts`."""

    side: int
    patch: int
    starts: tuple[int, ...]

    @classmethod
    def cover(
        cls, side: int, patch: int, min_overlap: int = MIN_OVERLAP, first: int = 0, length: int | None = None
    ) -> "Axis":
        """Patches that cover `length` pixels from `first` on, by default all of the axis."""
        length = side if length is None else length
        return cls(side, min(length, patch), tuple(first + start for start in axis_starts(length, patch, min_overlap)))

    def cells(self, length: int) -> tuple[tuple[int, ...], int]:
        """On a feature map of `length` cells: the first cell of each patch, and how many cells every patch covers.

        The map is that of the whole axis, whatever part of it the patches cover.
        """
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
        """(length,) float32: the per-pixel counts resized bilinearly to `length` cells.

        Pixels that no patch covers count 1: else a cell at the edge of what is covered, which is covered as a whole,
        would have a count near 0.
        """
        counts = self.counts().clamp_(min=1).view(1, 1, self.side, 1)
        return F.interpolate(counts, size=(length, 1), mode="bilinear", align_corners=False).view(length)


class Patches(ABC):
    """Overlapping patches of one size, cut from an image: what the network, and those who feed it, ask of them."""

    @property
    @abstractmethod
    def image(self) -> Size:
        """Size of the image, in pixels."""

    @property
    @abstractmethod
    def patch(self) -> Size:
        """Size of every patch."""

    @property
    @abstractmethod
    def regions(self) -> list[Box]:
        """What the patches cover, in pixels: boxes that do not overlap."""

    @abstractmethod
    def boxes(self) -> list[Box]:
        """The patches in pixels, sorted by their tops and then by their left sides."""

    @abstractmethod
    def feature_boxes(self, size: Size) -> list[Box]:
        """The cells that each patch covers on a map of `size`: all of one size, never empty, within the map."""

    @abstractmethod
    def counts(self, top: int, rows: int) -> Tensor:
        """(rows, W) float32: how many patches cover each pixel of `rows` rows from `top` on."""

    @abstractmethod
    def shrunk_counts(self, size: Size) -> Tensor:
        """(H, W) float32: per-pixel patch counts resized bilinearly to `size`, never 0.

        This is what the released implementation divides merged maps by. It is not the true count of the
        patches that cover a cell.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    def sub_batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` consecutive patches that together are all of them."""
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))


@dataclass(frozen=True)
class PatchGrid(Patches):
    """Patches that cover an image, or one region of it, row by row."""

    rows: Axis
    columns: Axis

    @classmethod
    def cover(
        cls, size: Size, patch: int | Size, min_overlap: int = MIN_OVERLAP, region: Box | None = None
    ) -> "PatchGrid":
        """The grid for an image of `size`, or for `region` of it, which lies within the image.

        An axis not longer than the patch gets one patch as long as itself. Raises InputError when a patch does not
        exceed `min_overlap` and what is covered is larger than it.
        """
        height, width = (patch, patch) if isinstance(patch, int) else patch
        top, left, *lengths = region or Box(0, 0, *size)
        return cls(
            Axis.cover(size[0], height, min_overlap, top, lengths[0]),
            Axis.cover(size[1], width, min_overlap, left, lengths[1]),
        )

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def image(self) -> Size:
        return self.rows.side, self.columns.side

    @property
    def patch(self) -> Size:
        return self.rows.patch, self.columns.patch

    @property
    def regions(self) -> list[Box]:
        return [around(self.boxes())]

    def boxes(self) -> list[Box]:
        return [Box(top, left, *self.patch) for top in self.rows.starts for left in self.columns.starts]

    def feature_boxes(self, size: Size) -> list[Box]:
        tops, height = self.rows.cells(size[0])
        lefts, width = self.columns.cells(size[1])
        return [Box(top, left, height, width) for top in tops for left in lefts]

    def counts(self, top: int, rows: int) -> Tensor:
        return torch.outer(self.rows.counts()[top : top + rows], self.columns.counts())

    def shrunk_counts(self, size: Size) -> Tensor:
        # counts and bilinear weights are both separable, so two vectors suffice
        return torch.outer(self.rows.shrunk_counts(size[0]), self.columns.shrunk_counts(size[1]))


@dataclass(frozen=True)
class RegionGrids(Patches):
    """The grids of several regions of one image, which do not overlap, as one; or of none."""

    size: Size
    grids: tuple[PatchGrid, ...]

    @classmethod
    def cover(cls, size: Size, regions: Sequence[Box], patch: int, min_overlap: int = MIN_OVERLAP) -> "RegionGrids":
        """The grids for `regions` of an image of `size`, each at least a patch large, or as the image is.

        Raises InputError as `PatchGrid.cover` does.
        """
        return cls(size, tuple(PatchGrid.cover(size, patch, min_overlap, region) for region in regions))

    def __len__(self) -> int:
        return sum(map(len, self.grids))

    @property
    def image(self) -> Size:
        return self.size

    @property
    def patch(self) -> Size:
        return self.grids[0].patch

    @property
    def regions(self) -> list[Box]:
        return [region for grid in self.grids for region in grid.regions]

    @cached_property
    def _order(self) -> list[int]:
        boxes = [box for grid in self.grids for box in grid.boxes()]
        return sorted(range(len(boxes)), key=boxes.__getitem__)

    def _sorted(self, boxes: list[Box]) -> list[Box]:
        return [boxes[k] for k in self._order]

    def boxes(self) -> list[Box]:
        return self._sorted([box for grid in self.grids for box in grid.boxes()])

    def feature_boxes(self, size: Size) -> list[Box]:
        return self._sorted([box for grid in self.grids for box in grid.feature_boxes(size)])

    def counts(self, top: int, rows: int) -> Tensor:
        return sum(grid.counts(top, rows) for grid in self.grids)

    def shrunk_counts(self, size: Size) -> Tensor:
        total = torch.zeros(size)
        for grid in self.grids:
            cells = around(grid.feature_boxes(size))
            cells.of(total).add_(cells.of(grid.shrunk_counts(size)))
        return total.masked_fill_(total == 0, 1)
