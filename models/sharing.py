"""How the branches exchange maps: crops of global maps, and local maps merged into the global frame.

The two are each other's inverse up to resizing and to the released way of counting overlaps.
"""

import torch
from torch import Tensor

from models.pyramid import Pyramid
from models.resized import resize
from utils.tiling import PatchGrid


def crop_global(x: Tensor, grid: PatchGrid, patches: slice) -> Tensor:
    """What `patches` of `grid` cover on a global map `x` (1, C, H, W): (n, C, h, w), at the map's own scale."""
    return torch.cat([box.of(x) for box in grid.feature_boxes(x.shape[-2:])[patches]])


def crop_pyramid(pyramid: Pyramid, grid: PatchGrid, patches: slice) -> Pyramid:
    """What `patches` cover of an image's global pyramid, ps3 left out."""
    return pyramid.map(lambda x: crop_global(x, grid, patches))


class Mosaic:
    """The local maps of one image's patches, merged into the frame of its global pyramid as they come.

    Each patch's map is resized to the cells that it covers and added; `merged` divides by the patch counts.
    Made for one image and dropped with it.
    """

    def __init__(self, grid: PatchGrid, frame: Pyramid) -> None:
        """`frame`: the image's global pyramid, (1, C, H, W) maps; only its sizes are read."""
        self.grid = grid
        self.sizes = [tuple(x.shape[-2:]) for x in frame.ps0]
        self.sums: list[list[Tensor | None]] = [[None] * len(self.sizes) for _ in frame.levels]

    def add(self, patches: slice, depth: int, level: int, x: Tensor) -> None:
        """Add one map `x` (n, C, h, w) of the local pyramid of `patches`; depth and level as in `See`."""
        total = self.sums[depth][level]
        if total is None:
            total = self.sums[depth][level] = x.new_zeros(1, x.shape[1], *self.sizes[level])
        boxes = self.grid.feature_boxes(self.sizes[level])[patches]
        for box, patch in zip(boxes, resize(x, boxes[0][2:]), strict=True):
            box.of(total)[0].add_(patch)

    def merged(self) -> Pyramid:
        """The merged maps, (1, C, H, W) each. The sums become them, so this is the last that is asked of a mosaic.

        As released, sums are divided by the per-pixel patch counts *resized bilinearly* to the map, not by the true
        count of covered cells; the published weights were trained with that.
        """
        sums = Pyramid(*map(tuple, self.sums))
        return sums.map(lambda x: x.div_(self.grid.shrunk_counts(x.shape[-2:]).to(x)))
