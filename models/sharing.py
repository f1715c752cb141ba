"""How the branches exchange maps: crops of global maps, and local maps merged into the global frame.

The two are each other's inverse up to resizing and to the released way of counting overlaps.
"""

import torch
from torch import Tensor

from models.pyramid import Pyramid
from models.resized import resize
from utils.tiling import Patches


def crop_global(x: Tensor, grid: Patches, patches: slice) -> Tensor:
    """What `patches` of `grid` cover on a global map `x` (1, C, H, W): (n, C, h, w), at the map's own scale."""
    return torch.cat([box.of(x) for box in grid.feature_boxes(x.shape[-2:])[patches]])


def crop_pyramid(pyramid: Pyramid, grid: Patches, patches: slice) -> Pyramid:
    """What `patches` cover of an image's global pyramid, ps3 left out."""
    return pyramid.map(lambda x: crop_global(x, grid, patches))


class Mosaic:
    """The local maps of the patches of B images, merged into the frame of their global pyramid as they come.

    Each patch's map is resized to the cells that it covers and added; `merged` divides by the patch counts.
    Made for these images and dropped with them.
    """

    def __init__(self, images: int, frame: Pyramid) -> None:
        """`images`: how many. `frame`: the global pyramid of any of them; only the sizes of its maps are read."""
        self.grids: list[Patches | None] = [None] * images
        self.sizes = [tuple(x.shape[-2:]) for x in frame.ps0]
        self.sums: list[list[Tensor | None]] = [[None] * len(self.sizes) for _ in frame.levels]

    def add(self, image: int, grid: Patches, patches: slice, depth: int, level: int, x: Tensor) -> None:
        """Add a map `x` (n, C, h, w) of the local pyramid of `patches` of an image's `grid`; the rest as in `See`."""
        self.grids[image] = grid
        total = self.sums[depth][level]
        if total is None:
            total = self.sums[depth][level] = x.new_zeros(len(self.grids), x.shape[1], *self.sizes[level])
        boxes = grid.feature_boxes(self.sizes[level])[patches]
        for box, patch in zip(boxes, resize(x, boxes[0][2:]), strict=True):
            box.of(total)[image].add_(patch)

    def merged(self) -> Pyramid:
        """The merged maps, (B, C, H, W) each. The sums become them, so this is the last that is asked of a mosaic.

        As released, sums are divided by the per-pixel patch counts *resized bilinearly* to the map, not by the true
        count of covered cells; the published weights were trained with that. Where no patch was, maps are 0.
        """

        def divide(x: Tensor) -> Tensor:
            for total, grid in zip(x, self.grids, strict=True):
                if grid is not None:
                    total.div_(grid.shrunk_counts(x.shape[-2:]).to(x))
            return x

        return Pyramid(*map(tuple, self.sums)).map(divide)
