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

from dataset.reading import MAX_PIXELS, read_image, read_label
from utils.classes import Classes
from utils.resize import shrink_label

_TURNS = (
    (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270),
    (
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSVERSE,
    ),
)
"""[mirrored][quarter turns]: the one transposition that mirrors left-right, then rotates counterclockwise."""

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
    more than `max_pixels`, an attribute, are refused.
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

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Return a checksum of the image ids, in order, and their number."""
        return f"{len(self)} images, checksum {zlib.crc32(chr(10).join(item.id for item in self.items).encode()):08x}"

    def read(self, index: int) -> tuple[Image.Image, np.ndarray | None]:
        """The RGB image of `index` and its label, (H, W) uint8 ids, None where there is none, as they are on disk.

        Raises InputError, naming the file, as `read_image` and `read_label` do.
        """
        item = self.items[index]
        image = read_image(item.image, self.max_pixels)
        if item.label is None:
            return image, None
        return image, read_label(item.label, self.classes, (image.height, image.width), self.max_pixels)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample of `key`: an index, or (epoch, index); without an epoch it is 0.

        The augmentation is drawn from seed, epoch and id only: workers need no state, and a resumed run draws the same.
        Raises InputError as `read` does.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.items[index]
        image, ids = self.read(index)
        if self.augment:
            mirrored, quarters = draw_turn(np.random.default_rng([self.seed, epoch, zlib.crc32(item.id.encode())]))
            if (turn := _TURNS[mirrored][quarters]) is not None:
                image = image.transpose(turn)
            if ids is not None:
                ids = np.rot90(ids[:, ::-1] if mirrored else ids, quarters)
        # copied where it was turned, and where Pillow still owns the memory: tensors must be writable
        label = None if ids is None else torch.from_numpy(np.require(ids, requirements=("C", "W")))
        quarter = self.size_g // 4
        return Sample(
            id=item.id,
            image=image_tensor(image),
            label=label,
            global_image=image_tensor(shrink_image(image, self.size_g)),
            global_label=None if label is None else shrink_label(label, (quarter, quarter)),
        )
