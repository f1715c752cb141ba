"""Sources of pixels: images in memory, and views of other sources; files that are read in windows are sources, too.

A source has a `size` and a method `read` for any box, so that an image need not be in memory as a whole.
"""

from typing import Protocol

import torch
from torch import Tensor

from utils.errors import InputError
from utils.stretch import RGB
from utils.tiling import Box, Size, map_size
from utils.turns import Turn


class Source(Protocol):
    """An image whose parts can be read. `read` and `valid` may be called by two threads at a time."""

    @property
    def size(self) -> Size:
        """The image's (height, width), in pixels."""
        ...

    @property
    def n_bands(self) -> int:
        """The number of bands."""
        ...

    def read(self, box: Box) -> Tensor:
        """Return the pixels of `box`, which lies within the image: (bands, height, width) uint8, 0..255.

        Raises InputError, naming the file, if the pixels come from a file that cannot be read.
        """
        ...

    def valid(self, box: Box) -> Tensor | None:
        """Return which pixels of `box` have data, (height, width) bool; None if all pixels of the image have."""
        ...


class MemorySource:
    """An image in memory, (bands, H, W) uint8, without pixels that lack data; `read` returns views of it."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.size, self.n_bands = image, map_size(image), len(image)

    def read(self, box: Box) -> Tensor:
        return box.of(self.image)

    def valid(self, box: Box) -> Tensor | None:
        return None


class _SourceView:
    """Another source, of which the box `_origin(box)` is read."""

    def __init__(self, source: Source) -> None:
        self.source, self.size, self.n_bands = source, source.size, source.n_bands

    def read(self, box: Box) -> Tensor:
        return self.source.read(self._origin(box))

    def valid(self, box: Box) -> Tensor | None:
        return self.source.valid(self._origin(box))

    def _origin(self, box: Box) -> Box:
        return box


class CropSource(_SourceView):
    """The part of another source that `box` covers."""

    def __init__(self, source: Source, box: Box) -> None:
        super().__init__(source)
        self.box, self.size = box, (box.height, box.width)

    def _origin(self, box: Box) -> Box:
        return box._replace(top=box.top + self.box.top, left=box.left + self.box.left)


class CheckedSource(_SourceView):
    """Another source, which raises InputError if it gives anything but the pixels that were asked for."""

    def read(self, box: Box) -> Tensor:
        return self._checked("read", super().read(box), (self.n_bands, box.height, box.width), torch.uint8)

    def valid(self, box: Box) -> Tensor | None:
        found = super().valid(box)
        return None if found is None else self._checked("valid", found, (box.height, box.width), torch.bool)

    def _checked(self, method: str, found: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if isinstance(found, Tensor) and (tuple(found.shape), found.dtype) == (shape, dtype):
            return found
        kind = f"{tuple(found.shape)} {found.dtype}" if hasattr(found, "shape") else ""
        raise InputError(
            f"{type(self.source).__name__}.{method} must return a tensor {shape} {dtype}, not {type(found).__name__} "
            f"{kind}".rstrip()
        )


class TurnedSource(_SourceView):
    """Another source, mirrored or rotated."""

    def __init__(self, source: Source, turn: Turn) -> None:
        super().__init__(source)
        self.turn, self.size = turn, turn.size(source.size)

    def read(self, box: Box) -> Tensor:
        return self.turn.apply(super().read(box))

    def valid(self, box: Box) -> Tensor | None:
        found = super().valid(box)
        return None if found is None else self.turn.apply(found)

    def _origin(self, box: Box) -> Box:
        return self.turn.origin(box, self.source.size)


MEMORY_PIXELS = 64_000_000
"""RGB images, and scenes of them, of at most so many pixels (192 MB) are read once and held; larger ones in windows."""


def fits_memory(source: Source, most: int = MEMORY_PIXELS) -> bool:
    """Return whether a source takes at most the memory of `most` pixels of RGB."""
    height, width = source.size
    return height * width * source.n_bands <= most * RGB


def load_in_memory(source: Source, most: int = MEMORY_PIXELS) -> Source:
    """Return `source` read into memory if it takes at most that of `most` pixels of RGB, else `source` itself."""
    return MemorySource(source.read(Box(0, 0, *source.size))) if fits_memory(source, most) else source
