"""Sources of pixels: images in memory, and views of other sources; files that are read in windows are sources, too.

A source has a `size` and a method `read` for any box, so that an image need not be in memory as a whole.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from utils.tiling import Box, Size, map_size
from utils.turns import Turn


class Source(Protocol):
    """An image whose parts can be read."""

    @property
    def size(self) -> Size:
        """The image's (height, width), in pixels."""
        ...

    def read(self, box: Box) -> Tensor:
        """Return the pixels of `box`, which lies within the image: (3, height, width) uint8 RGB, 0..255.

        Raises InputError, naming the file, if the pixels come from a file that cannot be read.
        """
        ...

    def valid(self, box: Box) -> Tensor | None:
        """Return which pixels of `box` have data, (height, width) bool; None if all pixels of the image have."""
        ...


@dataclass(frozen=True)
class MemorySource:
    """An image in memory, (3, H, W) uint8 RGB, without pixels that lack data; `read` returns views of it."""

    image: Tensor

    @property
    def size(self) -> Size:
        return map_size(self.image)

    def read(self, box: Box) -> Tensor:
        return box.of(self.image)

    def valid(self, box: Box) -> Tensor | None:
        return None


@dataclass(frozen=True)
class CropSource:
    """The part of another source that `box` covers."""

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
    """Another source, mirrored or rotated."""

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
"""Images, and scenes of images, of at most so many pixels (192 MB) are read once and held; larger ones in windows."""


def load_in_memory(source: Source, most: int = MEMORY_PIXELS) -> Source:
    """Return `source` read into memory if it has at most `most` pixels, else `source` itself."""
    height, width = source.size
    return MemorySource(source.read(Box(0, 0, height, width))) if height * width <= most else source
