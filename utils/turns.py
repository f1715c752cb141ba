"""Mirrored and rotated images: the eight symmetries of a square, for images and for boxes in them."""

from dataclasses import dataclass

from torch import Tensor

from utils.tiling import Box, Size


@dataclass(frozen=True)
class Turn:
    """Mirrors an image left-right if `mirrored`, then rotates it counterclockwise by `quarters` (0..3) of a turn."""

    mirrored: bool = False
    quarters: int = 0

    def apply(self, x: Tensor) -> Tensor:
        """Return `x` (..., H, W) turned, a view if it is only rotated."""
        return (x.flip(-1) if self.mirrored else x).rot90(self.quarters, (-2, -1))

    def undo(self, x: Tensor) -> Tensor:
        """Return `x` (..., H', W') turned back: the inverse of `apply`."""
        x = x.rot90(-self.quarters, (-2, -1))
        return x.flip(-1) if self.mirrored else x

    def size(self, size: Size) -> Size:
        """Return the size of a turned image that had `size` before."""
        return (size[1], size[0]) if self.quarters % 2 else size

    def origin(self, box: Box, size: Size) -> Box:
        """Return the box of the image, of `size` before it is turned, that becomes `box` of the turned image."""
        height, width = self.size(size)
        for _ in range(self.quarters):  # back by one quarter each
            box = Box(box.left, height - box.top - box.height, box.width, box.height)
            height, width = width, height
        return box._replace(left=width - box.left - box.width) if self.mirrored else box


TURNS = {
    "none": (Turn(),),
    "flip": (Turn(), Turn(mirrored=True)),
    "d4": tuple(Turn(mirrored, quarters) for mirrored in (False, True) for quarters in range(4)),
}
"""By `--tta`, the turns that scores are averaged over."""
