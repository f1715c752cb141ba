"""The feature maps that one branch computes from one image, or from a batch of patches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.tiling import Size, map_size

Levels = tuple[Tensor, ...]
"""Four maps, coarsest first: p5, p4, p3, p2, at 1/32, 1/16, 1/8 and 1/4 of the input."""

STRIDES = (4, 8, 16, 32)
"""Pixels of the image for one cell of c2, c3, c4 and c5, in each direction."""

OnMap = Callable[[int, int, Tensor], None]
"""A callback for each map as soon as it is computed: its depth (0: c, 1: ps0, 2: ps1, 3: ps2), its level (0: p5, ...
3: p2), and the map, (N, C, h, w). Maps are used in this way before the next ones take memory."""


def resize(x: Tensor, size: Size) -> Tensor:
    """Return `x` (N, C, H, W) resized bilinearly to `size`, without aligned corners or antialiasing."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def cells(side: int, stride: int) -> int:
    """Return how many cells of `stride` pixels cover `side` pixels.

    No number is negative on the way: a graph of ONNX rounds towards zero, Python down.
    """
    return (side + stride - 1) // stride


def level_sizes(image: Size) -> list[Size]:
    """Return the (height, width) of the maps of an image, coarsest first: 1/32 to 1/4 of it, rounded up."""
    return [(cells(image[0], stride), cells(image[1], stride)) for stride in STRIDES[::-1]]


def fitted(x: Tensor, size: Size) -> Tensor:
    """Return `x` (N, C, H, W) resized to `size`; `x` itself if it fits."""
    return x if map_size(x) == size else resize(x, size)


@dataclass(frozen=True)
class Pyramid:
    """The maps that branches share (paper, section 3.2), (N, C, h, w) each, coarsest level first."""

    c: Levels  # the backbone's c5, c4, c3, c2
    ps0: Levels  # top-down sums, 256 channels as released (`models.fpn.WIDTH`)
    ps1: Levels  # ps0 smoothed, as many channels
    ps2: Levels  # ps1 smoothed, half as many channels

    @classmethod
    def of(cls, levels: Iterable[Iterable[Tensor]]) -> "Pyramid":
        """Return the pyramid of the maps c, ps0, ps1 and ps2: the inverse of `levels`."""
        c, ps0, ps1, ps2 = map(tuple, levels)
        return Pyramid(c, ps0, ps1, ps2)

    @property
    def levels(self) -> tuple[Levels, Levels, Levels, Levels]:
        """c, ps0, ps1, ps2: the maps that a fused pyramid reads of another branch."""
        return self.c, self.ps0, self.ps1, self.ps2

    def map(self, change: Callable[..., Tensor], *others: "Pyramid") -> "Pyramid":
        """Return the pyramid of `change(map, ...)`, which gets each map and the same map of each of `others`."""
        every = zip(*(pyramid.levels for pyramid in (self, *others)), strict=True)
        return Pyramid.of(map(change, *levels) for levels in every)

    def withheld(self) -> "Pyramid":
        """Return zeros in place of every map: what a fused pyramid reads where no maps are shared."""
        return self.map(torch.zeros_like)

    def visit(self, on_map: OnMap) -> None:
        """Call `on_map` with every map of `levels`, in the order of computation."""
        for depth, levels in enumerate(self.levels):
            for level, x in enumerate(levels):
                on_map(depth, level, x)


@dataclass(frozen=True)
class FullPyramid(Pyramid):
    """A pyramid with its last map: all levels of ps2 joined at 1/4 of the input, twice as many channels as ps0."""

    ps3: Tensor

    def withheld(self) -> "FullPyramid":
        return FullPyramid(*super().withheld().levels, torch.zeros_like(self.ps3))
