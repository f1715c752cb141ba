"""How an image is cut into patches: the only module that computes coordinates.

Sizes are (height, width) and boxes (top, left, height, width), everywhere in this project. The float64 expressions are
the released implementation's; exact rationals round some ties the other way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import InputError

Size = tuple[int, int]
"""(height, width)."""

MIN_OVERLAP = 50
"""Pixels that neighbouring patches share at least, as released."""

BLENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "linear": lambda x: 1 - x.abs(),
    # its standard deviation is 1/8 of a side, as in MONAI and nnU-Net
    "gaussian": lambda x: torch.exp(-0.5 * (x / 0.25) ** 2),
}
"""By `--blend`, the weight of a pixel along one side of its patch, from its position: -1 and 1 at the two borders."""


def map_size(x: Tensor) -> Size:
    """Return the (height, width) of `x` (..., H, W)."""
    return x.shape[-2], x.shape[-1]


class Box(NamedTuple):
    """A rectangle of cells or pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """Return the view of `x` (..., H, W) that this box covers, (..., height, width)."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def overlap(self, other: "Box") -> "Box | None":
        """Return the cells that both boxes cover, None without any."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + self.height, other.top + other.height)
        right = min(self.left + self.width, other.left + other.width)
        return Box(top, left, bottom - top, right - left) if top < bottom and left < right else None

    def within(self, other: "Box") -> "Box":
        """Return this box as seen from the upper left corner of `other`."""
        return self._replace(top=self.top - other.top, left=self.left - other.left)


def strips(size: Size, pixels: int) -> Iterator[Box]:
    """Yield boxes that divide an image of `size` into strips of whole rows: about `pixels` each, at least a row."""
    height, width = size
    step = max(1, pixels // width)
    return (Box(top, 0, min(step, height - top), width) for top in range(0, height, step))


def around(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that holds all of `boxes`."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return Box(top, left, bottom - top, right - left)


def axis_starts(side: int, patch: int, min_overlap: int = MIN_OVERLAP) -> list[int]:
    """Return the first pixel of each patch along an axis of `side` pixels; a side that is not longer gets one, at 0.

    Neighbouring patches share at least `min_overlap` pixels. Raises InputError if `side` exceeds `patch`, but `patch`
    does not exceed `min_overlap`.
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


def border_weights(length: int, blend: str) -> Tensor:
    """Return the weights of the pixels along one side of a patch, (length,) float32, all larger than 0.

    There is no floor, such as MONAI's 0.001, as no weight is 0: where patches share 50 of 508 pixels, the floor would
    raise a patch's share at its border from 6 % to 15 %.
    """
    position = (2 * torch.arange(length, dtype=torch.float64) + 1) / length - 1  # of the pixel's centre
    return BLENDS[blend](position).float()


@dataclass(frozen=True)
class Axis:
    """Patches along one axis of an image, all lengths in pixels; `starts` are the first pixels of the patches."""

    side: int
    patch: int
    starts: tuple[int, ...]

    @classmethod
    def cover(
        cls, side: int, patch: int, min_overlap: int = MIN_OVERLAP, first: int = 0, length: int | None = None
    ) -> "Axis":
        """Return patches that cover `length` pixels from `first` on, by default the whole axis; see `axis_starts`."""
        length = side if length is None else length
        return cls(side, min(length, patch), tuple(first + start for start in axis_starts(length, patch, min_overlap)))

    def cells(self, length: int) -> tuple[tuple[int, ...], int]:
        """Return the first cell of each patch and the number of cells that every patch covers.

        `length` is the number of cells of the whole axis, whatever part of it the patches cover.
        """
        covered = max(1, round(length * (self.patch / self.side)))
        return tuple(min(round(start / self.side * length), length - covered) for start in self.starts), covered

    def counts(self) -> Tensor:
        """Return how many patches cover each pixel, (side,) float32."""
        return self.weights("none")

    def weights(self, blend: str) -> Tensor:
        """Return the sum of the weights of the patches that cover each pixel, (side,) float32; 0 without a patch."""
        total, window = torch.zeros(self.side), border_weights(self.patch, blend)
        for start in self.starts:
            total[start : start + self.patch] += window
        return total

    def shrunk_counts(self, length: int) -> Tensor:
        """Return the per-pixel counts resized bilinearly to `length` cells, (length,) float32.

        Pixels without a patch count 1. With 0 a covered cell at the edge of the patches would have a count near 0.
        """
        counts = self.counts().clamp_(min=1).view(1, 1, self.side, 1)
        return F.interpolate(counts, size=(length, 1), mode="bilinear", align_corners=False).view(length)


class Patches(ABC):
    """Overlapping patches of one size, cut from an image."""

    @property
    @abstractmethod
    def image(self) -> Size:
        """The size of the image, in pixels."""

    @property
    @abstractmethod
    def patch(self) -> Size:
        """The size of every patch, in pixels."""

    @abstractmethod
    def boxes(self) -> list[Box]:
        """Return the patches in pixels, sorted by top, then by left."""

    @abstractmethod
    def feature_boxes(self, size: Size) -> list[Box]:
        """Return the cells that each patch covers on a map of `size`: all of one size, not empty, within the map."""

    @abstractmethod
    def shrunk_counts(self, size: Size) -> Tensor:
        """Return the per-pixel patch counts resized bilinearly to `size`, (H, W) float32, never 0.

        The released implementation divides merged maps by them. They are not the numbers of patches that cover a cell.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    def weights(self, top: int, rows: int, blend: str) -> Tensor:
        """Return the sum of the patches' weights in each pixel of `rows` rows from `top` on, (rows, W) float32.

        It is 0 without a patch.
        """
        total, window = torch.zeros(rows, self.image[1]), self.window(blend)
        for box in self.boxes():
            first, end = max(box.top, top), min(box.top + box.height, top + rows)
            if first < end:
                part = window[first - box.top : end - box.top]
                total[first - top : end - top, box.left : box.left + box.width] += part
        return total

    def counts(self, top: int, rows: int) -> Tensor:
        """Return how many patches cover each pixel of `rows` rows from `top` on, (rows, W) float32."""
        return self.weights(top, rows, "none")

    def covered_pixels(self) -> int:
        """Return the number of pixels that at least one patch covers."""
        height = self.image[0]
        bands = range(0, height, self.patch[0]) if len(self) else ()
        return sum(int((self.counts(top, min(self.patch[0], height - top)) > 0).sum()) for top in bands)

    def window(self, blend: str) -> Tensor:
        """Return the weights of the pixels of every patch, (height, width) float32: a product of two sides."""
        height, width = self.patch
        return torch.outer(border_weights(height, blend), border_weights(width, blend))

    def sub_batches(self, size: int) -> Iterator[slice]:
        """Return slices of at most `size` consecutive patches, which together are all patches."""
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))


@dataclass(frozen=True)
class PatchGrid(Patches):
    """Patches that cover an image, or one region of it, row by row; those along the vertical axis are `rows`."""

    rows: Axis
    columns: Axis

    @classmethod
    def cover(
        cls, size: Size, patch: int | Size, min_overlap: int = MIN_OVERLAP, region: Box | None = None
    ) -> "PatchGrid":
        """Return the grid that covers an image of `size`, or one region of it. Raises InputError, see `axis_starts`.

        `patch` is the side or size of a patch. An axis that is not longer gets one patch as long as itself.
        """
        height, width = (patch, patch) if isinstance(patch, int) else patch
        box = region or Box(0, 0, size[0], size[1])
        return cls(
            Axis.cover(size[0], height, min_overlap, box.top, box.height),
            Axis.cover(size[1], width, min_overlap, box.left, box.width),
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
    def region(self) -> Box:
        """What the patches cover, in pixels."""
        return around(self.boxes())

    def covered_pixels(self) -> int:
        return self.region.height * self.region.width

    def boxes(self) -> list[Box]:
        height, width = self.patch
        return [Box(top, left, height, width) for top in self.rows.starts for left in self.columns.starts]

    def feature_boxes(self, size: Size) -> list[Box]:
        tops, height = self.rows.cells(size[0])
        lefts, width = self.columns.cells(size[1])
        return [Box(top, left, height, width) for top in tops for left in lefts]

    def weights(self, top: int, rows: int, blend: str) -> Tensor:
        # windows are products of two sides, and so are their sums over a grid
        return torch.outer(self.rows.weights(blend)[top : top + rows], self.columns.weights(blend))

    def shrunk_counts(self, size: Size) -> Tensor:
        # counts and bilinear weights are both separable, so two vectors suffice
        return torch.outer(self.rows.shrunk_counts(size[0]), self.columns.shrunk_counts(size[1]))


@dataclass(frozen=True)
class RegionGrids(Patches):
    """The grids of regions of one image, which do not overlap, as one grid; all patches have one size."""

    size: Size
    grids: tuple[PatchGrid, ...]

    @classmethod
    def cover(cls, size: Size, regions: Sequence[Box], patch: int, min_overlap: int = MIN_OVERLAP) -> "RegionGrids":
        """Return the grid that covers some regions of an image of `size`. Raises InputError, see `axis_starts`.

        The regions do not overlap, and each is at least as large as a patch, or as the image if that is smaller.
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
        """The regions, in pixels."""
        return [grid.region for grid in self.grids]

    def boxes(self) -> list[Box]:
        return sorted(box for grid in self.grids for box in grid.boxes())

    def feature_boxes(self, size: Size) -> list[Box]:
        pairs = [pair for grid in self.grids for pair in zip(grid.boxes(), grid.feature_boxes(size), strict=True)]
        return [cells for _, cells in sorted(pairs)]

    def shrunk_counts(self, size: Size) -> Tensor:
        total = torch.zeros(size)
        for grid in self.grids:
            cells = around(grid.feature_boxes(size))
            cells.of(total).add_(cells.of(grid.shrunk_counts(size)))
        return total.masked_fill_(total == 0, 1)


@dataclass(frozen=True)
class PatchSubset(Patches):
    """Some of an image's patches: those of `grid` at the indices `kept`, which rise."""

    grid: Patches
    kept: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def image(self) -> Size:
        return self.grid.image

    @property
    def patch(self) -> Size:
        return self.grid.patch

    def boxes(self) -> list[Box]:
        boxes = self.grid.boxes()
        return [boxes[k] for k in self.kept]

    def feature_boxes(self, size: Size) -> list[Box]:
        boxes = self.grid.feature_boxes(size)
        return [boxes[k] for k in self.kept]

    def shrunk_counts(self, size: Size) -> Tensor:
        """Return the whole grid's counts, each cell's in proportion to the patches that are left of those covering it.

        Where all of them are left, they are the released ones; where none is left, 1.
        """
        whole, left = torch.zeros(size), torch.zeros(size)
        for patches, total in ((self.grid, whole), (self, left)):
            for box in patches.feature_boxes(size):
                box.of(total).add_(1)
        counts = self.grid.shrunk_counts(size) * (left / whole.clamp(min=1))
        return counts.masked_fill(left == 0, 1)
