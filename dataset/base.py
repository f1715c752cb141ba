"""Samples: an image, its label and its id, and the data set that all others build on.

Sizes are (height, width) everywhere; Pillow's (width, height) is turned here, at the door.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.augmentation import LARGEST_SCALE, Draw, Windows, enlarged
from dataset.pairs import KEPT_BYTES, Item, OpenFiles, PairReader
from imaging.image_file import View
from imaging.pictures import shrink
from imaging.planes import MAX_PIXELS
from imaging.sources import MemorySource
from utils.classes import Classes
from utils.errors import InputError
from utils.resize import shrink_label
from utils.settings import ContextScale
from utils.tiling import Size, map_size

KEPT_SHRUNK_BYTES = 256 << 20
"""How much of shrunk images a process keeps: of 508 x 508 pixels in RGB, 346."""

HASHED_BYTES = 4096
"""How much of the middle of each file the hash of an image is of."""

GREY = 128
"""The value of all pixels of the image whose maps `--share blank` shares."""


class Sample(NamedTuple):
    """A decoded image with its label, and both as the global branch sees them.

    All tensors are uint8 on the CPU: images 0..255, labels class ids or 255 (left out), None where there are none. The
    image is None where the data set leaves it out. `shared` is the shrunk image whose global maps are shared,
    None for the image's own. `seed` is of what the training step draws; it follows from the data set's seed, epoch, id
    and the window's number.
    """

    id: str
    image: Tensor | None  # (bands, H, W)
    label: Tensor | None  # (H, W)
    global_image: Tensor  # (bands, h, w); in training size_g x size_g, with --context scale of any size
    global_label: Tensor | None  # (h // 4, w // 4), or (h, w)
    seed: int = 0
    shared: Tensor | None = None  # (bands, h, w)


class SegmentationDataset(Dataset[Sample]):
    """Images, with or without labels, each of its own size."""

    max_pixels = MAX_PIXELS
    """Larger images are refused."""
    view = View()
    """Which bands are read, and how values of more than 8 bits become 0..255."""
    turns = "all"
    """How samples are turned where they are (`augment`), one of `DRAWN_TURNS`."""
    full_labels = False
    """Whether `global_label` is as large as `global_image`; else a quarter of it, as the logits are."""
    whole = True
    """Whether samples hold the whole image. Stage 1 trains without: it need not be sent between processes."""
    share = "own"
    """Whose global maps are shared, one of `utils.settings.SHARES`; another image is the next one of the set."""
    context: ContextScale | None = None
    """Gives the size of the shrunk image instead of `size_g`, by the size of the image."""
    keep_shrunk = False
    """Whether each process keeps shrunk images up to `KEPT_SHRUNK_BYTES`, for passes without any variation."""

    def __init__(
        self,
        items: Sequence[Item],
        classes: Classes,
        size_g: int,
        augment: bool = False,
        seed: int = 0,
        *,
        jitter: bool = False,
        windows: Windows | None = None,
    ) -> None:
        """Prepare to read samples; with `windows`, the headers of all images are read.

        Args:
            items: where images and labels are.
            classes: colours and ids of the labels.
            size_g: side of what the global branch gets, in pixels, divisible by 4.
            augment: whether samples are mirrored and rotated, whole, so that a rectangle's sides may change places.
            seed: of everything that is drawn.
            jitter: whether scale and colours of samples vary as well.
            windows: what is cut from large images; by default every image is one sample.

        Raises:
            InputError: with `windows`, where a header cannot be read.
        """
        self.items, self.classes, self.size_g = list(items), classes, size_g
        self.augment, self.seed, self.jitter, self.windows = augment, seed, jitter, windows
        self._shrunk: dict[int, Tensor] = {}
        self._held = 0  # their bytes
        self._files = OpenFiles(KEPT_BYTES if windows else 0)
        self._samples: list[tuple[Item, int | None]] = []  # the number of a window, None of a whole image
        for item in self.items:
            cut = windows is not None and windows.cuts(self.reader.size(item))
            self._samples += [(item, number) for number in range(windows.count)] if windows and cut else [(item, None)]

    @property
    def reader(self) -> PairReader:
        """Reads files as this data set shows them."""
        return PairReader(self.classes, self.view, self.max_pixels, self._files)

    def __len__(self) -> int:
        """Return the number of samples in an epoch: images, and windows of those that are cut."""
        return len(self._samples)

    def id(self, index: int) -> str:
        """Return the id of the image that a sample is taken from."""
        return self._samples[index][0].id

    def describe(self, images: str) -> str:
        """Return how many `images` there are and, with windows, how many samples an epoch takes from them."""
        samples = "" if self.windows is None else f" ({len(self)} samples an epoch, windows of {self.windows.size})"
        return f"{len(self.items)} {images}{samples}"

    def smallest_sample(self, item: Item) -> Size:
        """Return the least (height, width) that samples of an item have before they are turned, from its headers.

        Without windows and scales that is the image's own size. Raises InputError as `PairReader.size` does.
        """
        scale = 1 / LARGEST_SCALE if self.jitter else 1.0
        height, width = (enlarged(side, scale) for side in self.reader.size(item))
        return (height, width) if self.windows is None else self.windows.clip((height, width))

    def fingerprint(self) -> str:
        """Return a checksum of the image ids, in order, and the numbers of images and windows."""
        checksum = zlib.crc32("\n".join(item.id for item in self.items).encode("utf-8", "surrogateescape"))
        windows = sum(number is not None for _, number in self._samples)
        return f"{len(self.items)} images, {f'{windows} windows, ' if windows else ''}checksum {checksum:08x}"

    def hashes(self) -> list[str]:
        """Return a hash of each image, 16 hexadecimal digits: of its id, and of length and middle of its files.

        Other sets may have the same ids, and a set may be moved.
        """
        found = []
        for item in self.items:
            own = hashlib.blake2b(item.id.encode("utf-8", "surrogateescape"), digest_size=8)
            for pair in item.pairs():
                with suppress(OSError), pair.image.open("rb") as file:  # reading says what is missing
                    length = file.seek(0, os.SEEK_END)
                    file.seek(length // 2)
                    own.update(b"%d:" % length + file.read(HASHED_BYTES))
            found.append(own.hexdigest())
        return found

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Read one of the items whole; see `PairReader.read`."""
        return self.reader.read(self.items[index])

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Return the sample of `key`: an index, or (epoch, index); without an epoch it is 0.

        What varies is drawn from seed, epoch, id and the window's number only: workers need no state, and a resumed
        run draws the same. Raises InputError as `PairReader.read` does.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item, number = self._samples[index]
        # ids come from file names, which are bytes
        drawn_from = [self.seed, epoch, zlib.crc32(item.id.encode("utf-8", "surrogateescape"))]
        drawn_from += [] if number is None else [1 + number]
        draw = Draw.of(drawn_from, self.turns if self.augment else "none", self.jitter)
        if self.windows is None or number is None:
            image, ids = self.reader.read(item)
            size = enlarged(image.shape[1], draw.scale), enlarged(image.shape[2], draw.scale)
        else:
            box, size = self.windows.place(self.reader.size(item), draw.position, draw.scale)
            image, ids = self.reader.read(item, box)
        image, ids = draw.apply(image, ids, size)
        shrunk = self._shrink(index, image)
        part = 1 if self.full_labels else 4
        height, width = map_size(shrunk)
        return Sample(
            id=item.id,
            image=image if self.whole else None,
            label=ids,
            global_image=shrunk,
            global_label=None if ids is None else shrink_label(ids, (height // part, width // part)),
            shared=self._shared(index, shrunk),
            seed=int(np.random.SeedSequence(drawn_from).generate_state(1)[0]),
        )

    def _shared(self, index: int, shrunk: Tensor) -> Tensor | None:
        """Return the shrunk image whose global maps sample `index`, itself shrunk to `shrunk`, gets; see `Sample`."""
        if self.share == "blank":
            return torch.full_like(shrunk, GREY)
        if self.share != "other":
            return None
        if len(self) == 1:
            raise InputError(f"--share other needs a second image; the split has {self.id(index)} alone")
        following = (index + 1) % len(self)
        return self._shrink(following, self.reader.read(self._samples[following][0])[0])

    def _shrink(self, index: int, image: Tensor) -> Tensor:
        """Return the image of sample `index`, shrunk to (bands, h, w), kept from an earlier pass if it may be."""
        if index in self._shrunk:
            return self._shrunk[index].clone()  # each tensor that a worker sends holds a file open while it lives
        size = (self.size_g, self.size_g) if self.context is None else self.context.size(map_size(image))
        shrunk = shrink(MemorySource(image), size)
        if self.keep_shrunk and self._held + shrunk.numel() <= KEPT_SHRUNK_BYTES:
            self._shrunk[index] = shrunk.clone()
            self._held += shrunk.numel()
        return shrunk
