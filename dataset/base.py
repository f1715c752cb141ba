"""An image, its label and its id, and the data set that all others build on.

Sizes are (height, width) everywhere; Pillow's (width, height) is turned here, at the door.
"""

import atexit
import multiprocessing.util  # registers its exit handler, which waits for workers: ours must come later to run first
import signal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.reading import MAX_PIXELS, read_image, read_label
from utils.classes import Classes
from utils.errors import InputError
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
        """A line that is another where the images, by their ids and in their order, are others."""
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


class BatchPart(Sampler[list[tuple[int, int]]]):
    """This process's part of each batch of an epoch: every `world`-th key from the `rank`-th on.

    `batch_size` is that of all processes together. All get as many batches; in a short last one, parts may be empty.
    No key is left out or comes twice. Iteration starts at batch `start`, for a run that goes on inside an epoch.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch, and the batch in it, both counted from 0, that the next iteration starts with."""
        self.sampler.set_epoch(epoch)
        self.start = start

    def batch(self, number: int) -> list[int]:
        """The indices of a whole batch of the epoch, all processes' parts."""
        return self.sampler.order()[number * self.batch_size : (number + 1) * self.batch_size]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = list(self.sampler)
        for first in range(self.start * self.batch_size, len(keys), self.batch_size):
            yield keys[first : first + self.batch_size][self.rank :: self.world]

    @property
    def batches(self) -> int:
        """In a whole epoch."""
        return -(-len(self.sampler) // self.batch_size)

    def __len__(self) -> int:
        return self.batches - self.start


def collate(samples: list[Sample]) -> list[Sample]:
    """A batch is a list: every sample has its own size."""
    return samples


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, and batch systems, send signals to every process; the parent has still use for its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End workers whose loader was left in the middle: they ignore the SIGTERM that Python sends before it waits."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class SampleLoader(DataLoader[Sample]):
    """Batches, as lists of samples, of a data set.

    In the order of `sampler`, whose items are keys of the data set or, of a `BatchPart`, lists of them; else in the
    data set's own. Workers are ready with two batches each. They end with a pass over the data; those of a `persistent`
    loader wait for the next pass, until `close`. With `pin`, which needs CUDA, tensors are in pinned memory.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        batch_size: int = 1,
        sampler: Iterable | None = None,
        num_workers: int = 0,
        persistent: bool = False,
        pin: bool = False,
    ) -> None:
        if isinstance(sampler, BatchPart):
            order = {"batch_sampler": sampler}
        else:
            order = {"batch_size": batch_size, "sampler": sampler}
        super().__init__(
            dataset,
            **order,
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_parent,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=pin,
            # torch would draw the workers' seeds from the generator that initial weights come from
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[list[Sample]]:
        """Raises InputError as the data set does: torch would bury its message in a worker's stack trace."""
        try:
            yield from super().__iter__()
        except InputError as error:
            raise InputError(str(error).strip().rsplit("utils.errors.InputError: ", 1)[-1]) from error

    def close(self) -> None:
        """End the workers that wait for another pass, if any; the next pass starts new ones."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None
