"""Any box of an image and of its label, whether each is one file or a scene of joined parts."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dataset.label_file import STRIP_PIXELS, LabelFile, fit_of, open_label
from imaging.failures import too_large
from imaging.image_file import View, open_image
from imaging.planes import MAX_PIXELS
from imaging.probe import RASTERIO, FileInfo, probe
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.tiling import Box, Size, around


@dataclass(frozen=True)
class JoinedParts:
    """The files that together are one image, or one label: `rows` of paths, all of the same number."""

    rows: tuple[tuple[Path, ...], ...]

    @property
    def paths(self) -> list[Path]:
        """Return all parts, row by row."""
        return [path for row in self.rows for path in row]

    def __str__(self) -> str:
        return f"{self.paths[0].parent} ({len(self.paths)} parts)"

    @cached_property
    def boxes(self) -> list[Box]:
        """Return where each part lies in the scene, row by row, from the files' headers.

        Raises InputError, naming the file, where a part cannot be read, or has another height than most of its row or
        another width than most of its column.
        """
        sizes = [[probe(path).size for path in row] for row in self.rows]
        widths = [mode(width for _, width in column) for column in zip(*sizes, strict=True)]
        lefts = list(accumulate(widths, initial=0))
        boxes, top = [], 0
        for paths, row in zip(self.rows, sizes, strict=True):
            height = mode(height for height, _ in row)
            for path, size, left, width in zip(paths, row, lefts, widths, strict=False):
                if size != (height, width):
                    raise InputError(
                        f"{path} is {size[0]} x {size[1]} pixels, but its place in the scene is {height} x {width}: "
                        "parts in one row have one height, parts in one column one width; copy it again from its "
                        "source",
                        "sizes differ",
                    )
                boxes.append(Box(top, left, height, width))
            top += height
        return boxes

    @property
    def size(self) -> Size:
        """Return (height, width) of all parts together; raises InputError as `boxes`."""
        whole = around(self.boxes)
        return whole.height, whole.width


T = TypeVar("T")

KEPT_BYTES = 256 << 20
"""How much of decoded pictures each process keeps while windows are cut from them."""

RASTER_BYTES = 1 << 20
"""What an open raster, whose values stay on disk, is taken to hold."""


class FilePair(NamedTuple):
    """An image file and its label, None where it has none."""

    image: Path
    label: Path | None


class Item(NamedTuple):
    """Where a sample lies on disk. Image and label are both files, or both joined parts of the same grid."""

    id: str
    image: Path | JoinedParts
    label: Path | JoinedParts | None

    def pairs(self) -> list[FilePair]:
        """Return its files: one pair, or those of the parts row by row."""
        images = self.image.paths if isinstance(self.image, JoinedParts) else [self.image]
        labels = self.label.paths if isinstance(self.label, JoinedParts) else [self.label] * len(images)
        return [FilePair(image, label) for image, label in zip(images, labels, strict=True)]


class OpenFiles:
    """Files that stay open until others are used more recently.

    `most` bytes are held at most, and a file that takes more alone is closed after use; 0 closes every file.
    """

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._open: OrderedDict[Hashable, tuple[Any, int, ExitStack]] = OrderedDict()

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[int]]:
        return OpenFiles, (self.most,)  # each process opens its own

    @property
    def held(self) -> int:
        """Bytes of all open files."""
        return sum(size for _, size, _ in self._open.values())

    @contextmanager
    def use(
        self, key: Hashable, start: Callable[[], AbstractContextManager[T]], size: Callable[[T], int]
    ) -> Iterator[T]:
        """Yield the open file `key`, which `start` opens where it is not open; it holds `size` bytes while it is."""
        if key not in self._open:
            with ExitStack() as stack:
                file = stack.enter_context(start())
                own = size(file)
                if own > self.most:
                    yield file
                    return
                self._open[key] = file, own, stack.pop_all()
            while self.held > self.most:
                self._open.popitem(last=False)[1][2].close()
        self._open.move_to_end(key)
        yield self._open[key][0]


def _value_bytes(info: FileInfo) -> int:
    """Return what the values of an open file take."""
    return RASTER_BYTES if info.decoder == RASTERIO else info.pixels * info.bands * np.dtype(info.dtype).itemsize


def _label_bytes(label: LabelFile) -> int:
    """Return what an open label holds at most: its values, and ids, of a raster unless it is large."""
    pixels = label.info.pixels
    return _value_bytes(label.info) + (min(pixels, STRIP_PIXELS) if label.info.decoder == RASTERIO else pixels)


@dataclass(frozen=True)
class PairReader:
    """Reads images as 8-bit bands and labels as class ids.

    Attributes:
        classes: how labels spell ids.
        view: which bands are read, and how values of more than 8 bits become 0..255.
        max_pixels: more are not read at once.
        files: keeps files open.
    """

    classes: Classes
    view: View = field(default_factory=View)
    max_pixels: int = MAX_PIXELS
    files: OpenFiles = field(default_factory=OpenFiles)

    def size(self, item: Item) -> Size:
        """Return (height, width) of an item as displayed, from headers; InputError where they cannot be read."""
        return item.image.size if isinstance(item.image, JoinedParts) else probe(item.image).size

    def whole(self, item: Item) -> Box:
        """Return the box that is all of an item; InputError as for `size`, and where it has too many pixels."""
        return self._allowed(item.image, Box(0, 0, *self.size(item)))

    def _allowed(self, path: Path | JoinedParts, box: Box) -> Box:
        if box.height * box.width > self.max_pixels:
            raise too_large(path, box.height * box.width, self.max_pixels)
        return box

    def read(self, item: Item, box: Box | None = None) -> tuple[Tensor, Tensor | None]:
        """Read an image and its label within `box`, by default all, as displayed.

        Returns (bands, height, width) uint8; and (height, width) uint8 ids, 255 where the image has no data, too; None
        without a label. Raises InputError, naming the file, as `open_image` and `open_label` do.
        """
        pairs = item.pairs()
        if not isinstance(item.image, JoinedParts):
            return self.read_files(pairs[0], box)
        box = box or self.whole(item)
        pixels = torch.empty((self.view.n_bands, box.height, box.width), dtype=torch.uint8)
        ids = None if item.label is None else torch.empty((box.height, box.width), dtype=torch.uint8)
        for pair, part in zip(pairs, item.image.boxes, strict=True):
            if (shared := box.overlap(part)) is None:
                continue
            own_pixels, own_ids = self.read_files(pair, shared.within(part))
            shared.within(box).of(pixels).copy_(own_pixels)
            if ids is not None and own_ids is not None:
                shared.within(box).of(ids).copy_(own_ids)
        return pixels, ids

    def read_files(self, pair: FilePair, box: Box | None = None) -> tuple[Tensor, Tensor | None]:
        """Read a pair of files as `read` does an item."""
        start_image = partial(open_image, pair.image, self.view, self.max_pixels)
        with self.files.use((pair.image, self.view), start_image, lambda image: _value_bytes(image.info)) as image:
            info, box = image.info, self._allowed(pair.image, box or Box(0, 0, *image.size))
            pixels, valid = image.read(box).contiguous(), image.valid(box)
        if self.files.most:
            pixels = pixels.clone()  # a view of what stays in memory would be sent between processes as a whole
        if pair.label is None:
            return pixels, None
        start_label = partial(open_label, pair.label, self.classes, info, self.max_pixels)
        with self.files.use(pair.label, start_label, _label_bytes) as label:
            ids = label.read(box)
        if self.files.most:
            ids = ids.clone()
        return pixels, ids if valid is None else ids.masked_fill(~valid, IGNORED)

    def notes(self, item: Item) -> list[str]:
        """Return what is done to an image before it is used, beyond decoding: a turn for display, a stretch."""
        found: dict[str, None] = {}
        for pair in item.pairs():
            info = probe(pair.image)
            if info.orientation > 1:
                fits = "" if pair.label is None else f", labels taken {fit_of(probe(pair.label), info)}"
                found[f"Turned for display{fits}"] = None
            if info.needs_stretch:
                found[f"Stretched from {info.dtype} ({self.view.stretch})"] = None
        return list(found)
