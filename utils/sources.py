"""Where pixels come from: images in memory, files that are read in windows, and views of either.

A source has a `size` and can `read` any box of itself, so that an image need not be in memory as a whole.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from utils.tiling import Box, Size
from utils.turns import Turn


class Source(Protocol):
    """An image of `size` (height, width)."""

    @property
    def size(self) -> Size: ...

    def read(self, box: Box) -> Tensor:
        """(3, height, width) uint8 RGB, 0..255, of `box`, which lies within the image.

        Raises InputError, naming the file, where there is one and it cannot be read.
        """
        ...

    def valid(self, box: Box) -> Tensor | None:
        """Return (height, width) bool, which pixels of `box` have data; None where every pixel of the image has."""
        ...


@dataclass(frozen=True)
class MemorySource:
    """An image in memory, (3, H, W) uint8, all of whose pixels count; what is read are views of it."""

    image: Tensor

    @property
    def size(self) -> Size:
        return tuple(self.image.shape[-2:])

    def read(self, box: Box) -> Tensor:
        return box.of(self.image)

    def valid(self, box: Box) -> Tensor | None:
        return None


@dataclass(frozen=True)
class CropSource:
    """What `box` covers of another source."""

    source: Source
    box: Box

    @property
    def size(self) -> Size:
        return self.box.height, self.box.width

    def read(self, box: Box) -> Tensor:
        return self.source.read(self._origin(box))

    def valid(self, box: Box) -> Tensor | None:
        return self.source.valid(self._origin(box))

    def _origin(self, box: Box) -> Box:
        return box._replace(top=box.top + self.box.top, left=box.left + self.box.left)


@dataclass(frozen=True)
class TurnedSource:
    """Another source, turned."""

    source: Source
    turn: Turn

    @property
    def size(self) -> Size:
        return self.turn.size(self.source.size)

    def read(self, box: Box) -> Tensor:
        return self.turn.apply(self.source.read(self.turn.origin(box, self.source.size)))

    def valid(self, box: Box) -> Tensor | None:
        found = self.source.valid(self.turn.origin(box, self.source.size))
        return None if found is None else self.turn.apply(found)


MEMORY_PIXELS = 64_000_000
"""Images, and scenes of images, of up to so many pixels (192 MB) are read once and held; larger ones in windows."""


def load_in_memory(source: Source, most: int = MEMORY_PIXELS) -> Source:
    """Return `source` read into memory if it has at most `most` pixels; else itself."""
    height, width = source.size
    return MemorySource(source.read(Box(0, 0, height, width))) if height * width <= most else source
