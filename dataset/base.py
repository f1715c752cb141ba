"""An image, its label and its id, read safely, and the data set that all others build on.

Sizes are (height, width) everywhere; Pillow's (width, height) is turned here, at the door.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.resize import shrink_label
from utils.tiling import Size

MAX_PIXELS = 1_000_000_000
"""Larger images are refused: decoded, each thousand million pixels take 4 GB."""

_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow's decoders raise on files that are missing, truncated or damaged."""

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B")

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


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Truncated files fail, whatever other code has set, and `MAX_PIXELS` replaces Pillow's limit of 0.18e9 pixels."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _decode(path: Path) -> Image.Image:
    """The fully decoded image, in the mode it is stored in; InputError where that cannot be done."""
    try:
        with _strict_pillow():
            with Image.open(path) as image:
                # compares checksums where the format has them (PNG), which decoding does not; spends the object
                image.verify()
            with Image.open(path) as image:
                pixels = image.width * image.height
                if pixels <= MAX_PIXELS:
                    image.load()
    except _DECODING_ERRORS as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image, or of an unknown format" if unknown else getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}; copy it again from its source or leave it out") from error
    if pixels > MAX_PIXELS:
        raise InputError(f"{path} has {pixels} pixels, more than the {MAX_PIXELS} allowed; cut it into smaller images")
    return image


def read_image(path: str | Path) -> Image.Image:
    """The image as 8-bit RGB; grey is repeated, transparency dropped.

    Raises InputError, naming the file: missing, truncated, damaged, too large, or more than 8 bits of grey.
    """
    image = _decode(Path(path))
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path} has grey values of more than 8 bits (mode {image.mode}); save it with 8 bits")
    # convert() copies even where there is nothing to convert
    return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path: str | Path, classes: Classes, size: Size) -> np.ndarray:
    """(H, W) uint8 class ids of a label of `size`, 255 where left out.

    A file holds either colours of `classes.palette` or ids; which, is decided for each file:
    - grey of any depth: ids;
    - colours (RGB, RGBA, ...): class colours, or, where some are not and the channels are all equal, ids;
    - palette: class colours where all that occur are; else, and wherever index 255 occurs, its indices are the ids.

    Raises InputError, naming the file: unreadable, of another size, a colour or an id that no class has.
    """
    path = Path(path)
    image = _decode(path)
    if (image.height, image.width) != tuple(size):
        raise InputError(
            f"{path} is {image.height} x {image.width} pixels, but its image is {size[0]} x {size[1]}; "
            "a label must have its image's size"
        )
    if image.mode in _GREY_MODES:
        ids = np.asarray(image.getchannel(0) if image.mode == "LA" else image)
        return _checked_ids(path, ids, len(classes))
    if image.mode == "P":
        return _ids_of_palette(path, image, classes)
    return _ids_of_colors(path, np.asarray(image.convert("RGB")), classes)


def _unknown_ids(ids: np.ndarray, n_class: int) -> np.ndarray:
    """Where `ids` are neither classes nor left out."""
    return (ids < 0) | (ids >= n_class) & (ids != IGNORED)


def _checked_ids(path: Path, ids: np.ndarray, n_class: int) -> np.ndarray:
    """`ids` as uint8; InputError where one is unknown."""
    unknown = _unknown_ids(ids, n_class)
    if unknown.any():
        row, column = np.unravel_index(unknown.argmax(), unknown.shape)
        raise InputError(
            f"{path}: id {ids[row, column]} at row {row}, column {column} ({unknown.sum()} such pixels) is no class; "
            f"ids must be 0..{n_class - 1}, or {IGNORED} to leave a pixel out"
        )
    return ids.astype(np.uint8)


def _ids_of_palette(path: Path, image: Image.Image, classes: Classes) -> np.ndarray:
    """(H, W) uint8 ids of a palette image: its indices, or what its colours tell.

    Tools that compress files turn RGB into a palette in an order of their own, so class colours win. But no
    class has a colour for index 255, so whoever wrote that wrote ids.
    """
    used = np.flatnonzero(image.histogram())
    colors = np.reshape(image.getpalette("RGB"), (-1, 3)).tolist()
    colored = all(k < len(colors) and tuple(colors[k]) in classes.palette for k in used)
    if not _unknown_ids(used, len(classes)).any() and (IGNORED in used or not colored):
        return np.asarray(image)
    if used[-1] >= len(colors):
        # Pillow would show it as black; it comes from writing id 255 with a palette too short for it
        raise InputError(
            f"{path}: index {used[-1]} is neither a class nor in the palette of {len(colors)} colours; "
            "save the ids as a grey image"
        )
    return _ids_of_colors(path, np.asarray(image.convert("RGB")), classes)


def _ids_of_colors(path: Path, pixels: np.ndarray, classes: Classes) -> np.ndarray:
    """(H, W) uint8 ids of `pixels` (H, W, 3) uint8: class colours, or ids in three equal channels."""
    # one table of all 2**24 colours is read in the time of a few comparisons, however many classes there are
    table = np.full(1 << 24, IGNORED, np.uint8)
    for k, (red, green, blue) in enumerate(classes.palette):
        table[red << 16 | green << 8 | blue] = k
    codes = pixels[..., 0].astype(np.uint32)
    for channel in (1, 2):
        codes <<= 8
        codes |= pixels[..., channel]
    ids = table[codes]
    unknown = ids == IGNORED
    if not unknown.any():
        return ids
    first = pixels[..., 0]
    if (pixels == first[..., None]).all() and not _unknown_ids(first, len(classes)).any():
        return first.copy()
    row, column = np.unravel_index(unknown.argmax(), unknown.shape)
    color = tuple(pixels[row, column].tolist())
    raise InputError(
        f"{path}: colour {color} at row {row}, column {column} is no class's ({unknown.sum()} such pixels); "
        f"use {', '.join(map(str, classes.palette))}, or class ids in a grey image"
    )


def image_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def shrink_image(image: Image.Image, size_g: int) -> Image.Image:
    """The whole image at size_g x size_g, bilinear and antialiased."""
    return image.resize((size_g, size_g), Image.Resampling.BILINEAR)


def draw_turn(rng: np.random.Generator) -> Image.Transpose | None:
    """Mirrored left-right with probability 1/2; then rotated by 90, 180 or 270 degrees with probability 1/2."""
    mirrored = rng.random() < 0.5
    quarters = rng.integers(1, 4) if rng.random() < 0.5 else 0
    return _TURNS[mirrored][quarters]


class SegmentationDataset(Dataset[Sample]):
    """Images, with or without labels, each of its own size.

    `classes` tells colours and ids of the labels; `size_g`, divisible by 4, is the side of what the global branch
    sees. With `augment` samples are mirrored and rotated, whole, so a rectangle's sides may change places.
    """

    def __init__(
        self, items: Sequence[Item], classes: Classes, size_g: int, augment: bool = False, seed: int = 0
    ) -> None:
        self.items = list(items)
        self.classes = classes
        self.size_g = size_g
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample of `key`: an index, or (epoch, index); without an epoch it is 0.

        The augmentation is drawn from seed, epoch and id only: workers need no state, and a resumed run draws the same.
        Raises InputError, naming the file, as `read_image` and `read_label` do.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.items[index]
        image = read_image(item.image)
        ids = None if item.label is None else read_label(item.label, self.classes, (image.height, image.width))
        if self.augment:
            turn = draw_turn(np.random.default_rng([self.seed, epoch, zlib.crc32(item.id.encode())]))
            if turn is not None:
                image = image.transpose(turn)
                ids = None if ids is None else np.asarray(Image.fromarray(ids).transpose(turn))
        # copied where Pillow still owns the memory: tensors must be writable
        label = None if ids is None else torch.from_numpy(np.require(ids, requirements="W"))
        quarter = self.size_g // 4
        return Sample(
            id=item.id,
            image=image_tensor(image),
            label=label,
            global_image=image_tensor(shrink_image(image, self.size_g)),
            global_label=None if label is None else shrink_label(label, (quarter, quarter)),
        )


class EpochSampler(Sampler[tuple[int, int]]):
    """All indices below `length` as (epoch, index), in an order that depends on seed and epoch only."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch, counted from 0, whose order the next iteration follows."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """The epoch's whole order: a process of several, or a resumed run, takes its part of it."""
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(repeat(self.epoch), self.order(), strict=False)

    def __len__(self) -> int:
        return self.length


def collate(samples: list[Sample]) -> list[Sample]:
    """A batch is a list: every sample has its own size."""
    return samples


class SampleLoader(DataLoader[Sample]):
    """Batches, as lists of samples, of a data set; in the sampler's order, or its own where there is none."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        batch_size: int = 1,
        sampler: Sampler[tuple[int, int]] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Raises InputError as the data set does: torch would bury its message in a worker's stack trace."""
        try:
            yield from super().__iter__()
        except InputError as error:
            raise InputError(str(error).strip().rsplit("utils.errors.InputError: ", 1)[-1]) from error
