"""Mirrored and rotated images: the eight symmetries of a square, for images and for boxes in them."""

from dataclasses import dataclass

from torch import Tensor

from utils.tiling import Box, Size


@dataclass(frozen=True)
class Turn:
    """Mirror left-right, where `mirrored`; then rotate counterclockwise by `quarters` (0..3) of a full turn."""

    mirrored: bool = False
    quarters: int = 0

    def apply(self, x: Tensor) -> Tensor:
        """`x` (..., H, W) turned; a view where torch has one."""
        return (x.flip(-1) if self.mirrored else x).rot90(self.quarters, (-2, -1))

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `apply`."""
        x = x.rot90(-self.quarters, (-2, -1))
        return x.flip(-1) if self.mirrored else x

    def size(self, size: Size) -> Size:
        """The size that an image of `size` has when turned."""
        return (size[1], size[0]) if self.quarters % 2 else size

    def origin(self, box: Box, size: Size) -> Box:
        """Where in an image of `size` the pixels come from that `box` of the turned image covers."""
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
"""What is averaged over, by `--tta`."""
