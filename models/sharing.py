"""The exchange of maps between branches: crops of global maps, and local maps merged into the global frame.

The two are inverse to each other up to resizing and to the released way of counting overlaps.
"""

from functools import partial

import torch
from torch import Tensor

from models.pyramid import Pyramid, fitted
from utils.errors import required
from utils.tiling import Patches, Size, map_size


def crop_global(x: Tensor, grid: Patches, patches: slice) -> Tensor:
    """Crop from a global map (1, C, H, W) the cells that n patches of the image's grid cover (paper, section 3.2).

    Return (n, C, h, w), at the scale of `x`.
    """
    return torch.cat([box.of(x) for box in grid.feature_boxes(map_size(x))[patches]])


def crop_pyramid(pyramid: Pyramid, grid: Patches, patches: slice) -> Pyramid:
    """Crop all global maps but ps3, (1, C, H, W) each, to n patches of the grid: (n, C, h, w) each."""
    return pyramid.map(lambda x: crop_global(x, grid, patches))


def merge_local_maps(local: Pyramid, grid: Patches, frame: Pyramid) -> Pyramid:
    """Merge the maps of all n patches of one image into the frame of its global maps (paper, section 3.2).

    `local` has (n, C, h, w) each; the result (1, C, H, W) each, at the sizes of `frame`, without ps3.
    """
    mosaic = Mosaic(1, frame)
    local.visit(partial(mosaic.add, 0, grid, slice(0, len(grid))))
    return mosaic.merged()


class Mosaic:
    """Merges the local maps of the patches of B images into the frame of their global pyramid, map by map.

    Each patch's map is resized to the cells that it covers and added; `merged` divides by the patch counts.
    """

    def __init__(self, images: int, frame: Pyramid) -> None:
        """Start empty, with B = `images`; `frame` is the global pyramid of any of them, of which sizes are read."""
        self.grids: list[Patches | None] = [None] * images
        self.sizes = [map_size(x) for x in frame.ps0]
        self.sums: list[list[Tensor | None]] = [[None] * len(self.sizes) for _ in frame.levels]

    def add(self, image: int, grid: Patches, patches: slice, depth: int, level: int, x: Tensor) -> None:
        """Add one map `x` (n, C, h, w) of n patches of an image; `depth` and `level` are as in `OnMap`."""
        self.grids[image] = grid
        total = self.sums[depth][level]
        if total is None:
            total = self.sums[depth][level] = _zeros(x, len(self.grids), self.sizes[level])
        boxes = grid.feature_boxes(self.sizes[level])[patches]
        size = boxes[0].height, boxes[0].width
        for box, patch in zip(boxes, fitted(x, size), strict=True):
            box.of(total)[image].add_(patch)

    def merged(self) -> Pyramid:
        """Return the merged maps, (B, C, H, W) each. The sums are overwritten: call this once, last.

        As released, sums are divided by the per-pixel patch counts *resized bilinearly* to the map, not by the true
        number of patches that cover a cell; the published weights were trained with that. Cells without any patch are
        0. Raises ValueError if a map was never added.
        """
        sums = [[required(total, "a merged map") for total in levels] for levels in self.sums]
        for level, size in enumerate(self.sizes):
            for image, grid in enumerate(self.grids):
                if grid is not None:
                    counts = grid.shrunk_counts(size).to(sums[0][level])
                    for levels in sums:
                        levels[level][image].div_(counts)
        return Pyramid.of(sums)


def _zeros(x: Tensor, images: int, size: Size) -> Tensor:
    """Return zeros (images, C, *size) on the device, in the type and in the memory layout of `x` (n, C, h, w).

    Adding a map in another layout takes three times as long on a CPU.
    """
    channels, (height, width) = x.shape[1], size
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.new_zeros(images, height, width, channels).permute(0, 3, 1, 2)
    return x.new_zeros(images, channels, height, width)
