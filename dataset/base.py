"""An image, its label and its id, and the data set that all others build on.

Sizes are (height, width) everywhere; Pillow's (width, height) is turned here, at the door.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.failures import too_large
from dataset.image_file import View, open_image
from dataset.label_file import fit_of, open_label
from dataset.pictures import shrink
from dataset.planes import MAX_PIXELS
from dataset.probe import probe
from utils.classes import IGNORED, Classes
from utils.resize import shrink_label
from utils.sources import MemorySource
from utils.tiling import Box
from utils.turns import Turn

_STRIP = 64
"""Rows."""


class Item(NamedTuple):
    """Where a sample lies on disk."""

    id: str
    image: Path
    label: Path | None


class Sample(NamedTuple):
    """A decoded image with its label, and both as the global branch sees them.

    All tensors are uint8 on the CPU: images RGB 0..255, labels class ids or 255 (left out), None where there are none.
    """

    id: str
    image: Tensor  # (3, H, W)
    label: Tensor | None  # (H, W)
    global_image: Tensor  # (3, size_g, size_g)
    global_label: Tensor | None  # (size_g // 4, size_g // 4)


def image_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image."""
    planes = np.empty((3, image.height, image.width), np.uint8)
    # numpy gets Pillow's pixels by way of copies: of strips they stay small, and in the processor's cache
    for top in range(0, image.height, _STRIP):
        rows = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        planes[:, top : top + _STRIP] = np.asarray(rows).transpose(2, 0, 1)
    return torch.from_numpy(planes)


def shrink_image(image: Image.Image, size_g: int) -> Image.Image:
    """The whole image at size_g x size_g, bilinear and antialiased."""
    return image.resize((size_g, size_g), Image.Resampling.BILINEAR)


def draw_turn(rng: np.random.Generator) -> tuple[bool, int]:
    """Mirrored left-right with probability 1/2; then 1, 2 or 3 quarters counterclockwise with probability 1/2."""
    mirrored = rng.random() < 0.5
    return mirrored, int(rng.integers(1, 4)) if rng.random() < 0.5 else 0


class SegmentationDataset(Dataset[Sample]):
    """Images, with or without labels, each of its own size.

    `classes` tells colours and ids of the labels; `size_g`, divisible by 4, is the side of what the global branch
    sees. With `augment` samples are mirrored and rotated, whole, so a rectangle's sides may change places. Images of
    more than `max_pixels`, an attribute, are refused, and `view`, another, says which bands are shown and how values
    of more than 8 bits become 0..255.
    """

    def __init__(
        self, items: Sequence[Item], classes: Classes, size_g: int, augment: bool = False, seed: int = 0
    ) -> None:
        self.items = list(items)
        self.classes = classes
        self.size_g = size_g
        self.augment = augment
        self.seed = seed
        self.max_pixels = MAX_PIXELS
        self.view = View()

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Return a checksum of the image ids, in order, and their number."""
        ids = chr(10).join(item.id for item in self.items).encode("utf-8", "surrogateescape")
        return f"{len(self)} images, checksum {zlib.crc32(ids):08x}"

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Read an image and its label, as displayed.

        Args:
            index: which of the items.

        Returns:
            (3, H, W) uint8 RGB; and (H, W) uint8 ids, 255 where the image has no data, too; None without a label.

        Raises:
            InputError: a file cannot be used, as `open_image` and `open_label` say, naming it.
        """
        item = self.items[index]
        info = probe(item.image)
        if info.pixels > self.max_pixels:
            raise too_large(item.image, info.pixels, self.max_pixels)
        whole = Box(0, 0, *info.size)
        with open_image(info, self.view, self.max_pixels) as image:
            pixels, valid = image.read(whole).contiguous(), image.valid(whole)
        if item.label is None:
            return pixels, None
        with open_label(item.label, self.classes, info, self.max_pixels) as label:
            ids = label.read(whole)
        return pixels, ids if valid is None else ids.masked_fill(~valid, IGNORED)

    def notes(self, index: int) -> list[str]:
        """Return what is done to an image before it is used, beyond decoding: a turn for display, a stretch."""
        item = self.items[index]
        info = probe(item.image)
        found = []
        if info.orientation > 1:
            fits = "" if item.label is None else f", labels taken {fit_of(probe(item.label), info)}"
            found.append(f"Turned for display{fits}")
        if info.needs_stretch:
            found.append(f"Stretched from {info.dtype} ({self.view.stretch})")
        return found

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample of `key`: an index, or (epoch, index); without an epoch it is 0.

        The augmentation is drawn from seed, epoch and id only: workers need no state, and a resumed run draws the same.
        Raises InputError as `read` does.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.items[index]
        image, ids = self.read(index)
        if self.augment:
            # ids come from file names, which are bytes
            own = zlib.crc32(item.id.encode("utf-8", "surrogateescape"))
            turn = Turn(*draw_turn(np.random.default_rng([self.seed, epoch, own])))
            image = turn.apply(image).contiguous()
            ids = None if ids is None else turn.apply(ids).contiguous()
        quarter = self.size_g // 4
        return Sample(
            id=item.id,
            image=image,
            label=ids,
            global_image=shrink(MemorySource(image), (self.size_g, self.size_g)),
            global_label=None if ids is None else shrink_label(ids, (quarter, quarter)),
        )
