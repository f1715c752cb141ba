"""What norm layers cannot train on, found from files' headers before the first step.

A norm layer that learns needs more than one value in each channel. The backbone's last maps are 32 times smaller than
its input, so a lone patch of 32 x 32 pixels or less, or a lone shrunk image of 32 x 32, leaves one.
"""

import logging
from collections.abc import Iterator

from dataset.base import Item, SegmentationDataset
from imaging.probe import FileInfo, probe
from utils.errors import InputError
from utils.settings import TrainingSettings, ViewScale
from utils.tiling import PatchGrid, Size

STRIDE = 32
"""Pixels of the input for one cell of the backbone's last maps, in each direction."""


def check_batches(images: int, batch_size: int, size_g: int, *, world: int = 1, joint: bool = False) -> None:
    """Raise InputError if a process would train the global branch, modes 1 and 3, on one value in each channel.

    `joint` says whether norm layers take their statistics over all `world` processes.
    """
    if size_g > STRIDE:
        return
    for batch in {min(batch_size, images), images % batch_size} - {0}:
        parts = [batch] if joint else [len(range(rank, batch, world)) for rank in range(world)]
        if 1 in parts:
            raise InputError(
                f"--size_g {size_g} with one image in a batch (--batch_size {batch_size}, {images} images, {world} "
                f"processes) leaves a norm layer a single value to learn from; give --size_g {2 * STRIDE}, or a "
                "--batch_size that leaves no image alone"
            )


def problem_of(item: Item, size: Size, settings: TrainingSettings) -> InputError | None:
    """Return why mode 2 cannot train the local branch on an item at `size` pixels, None where it can."""
    grid = PatchGrid.cover(size, settings.size_p, settings.min_overlap)
    count = min(len(grid), settings.patches or len(grid))
    alone = count % settings.sub_batch_size == 1 or settings.sub_batch_size == 1
    if max(grid.patch) > STRIDE or not (alone or settings.selection is not None):
        return None
    if max(size) <= STRIDE:
        mend = f"leave it out of training, or join it with others to more than {STRIDE} pixels a side"
    else:
        mend = f"give --size_p {2 * STRIDE}, or a --sub_batch_size that leaves no patch alone"
    return InputError(
        f"{item.image} is {size[0]} x {size[1]} pixels, and mode 2 would train on a single patch of {grid.patch[0]} x "
        f"{grid.patch[1]}, which leaves a norm layer one value to learn from; {mend}",
        "too small",
    )


def headers(data: SegmentationDataset) -> Iterator[tuple[Item, Size, list[FileInfo]]]:
    """Yield each item with readable headers, its smallest sample's size and the headers; reading reports others."""
    for item in data.items:
        try:
            yield item, data.smallest_sample(item), [probe(pair.image) for pair in item.pairs()]
        except InputError:
            continue


def check_views(data: SegmentationDataset) -> None:
    """Raise InputError for the first image whose view exceeds `--view_pixels`: an evaluation makes no scenes."""
    if not isinstance(data.context, ViewScale):
        return
    for item, size, _ in headers(data):
        if not data.context.fits(size):
            height, width = data.context.size(size)
            raise InputError(
                f"{item.image} is shrunk to {height} x {width} pixels, more than --view_pixels {data.context.most}; "
                f"give --view_pixels {height * width}, if the memory allows it, or cut the image"
            )


def check_images(data: SegmentationDataset, settings: TrainingSettings | None) -> None:
    """Log in one line each what is done to images beyond decoding.

    Raises InputError for the first image that lacks a band or, with the `settings` of mode 2, is too small to train on.
    """
    stretched = turned = 0
    for item, size, files in headers(data):
        for info in files:
            data.view.choose(info)
        stretched += any(info.needs_stretch for info in files)
        turned += any(info.orientation > 1 for info in files)
        if settings is not None and (problem := problem_of(item, size, settings)) is not None:
            raise problem
    if stretched:
        logging.info(
            f"{stretched} of {len(data.items)} images have more than 8 bits and are stretched: "
            f"--stretch {data.view.stretch}"
        )
    if turned:
        logging.info(f"{turned} of {len(data.items)} images are turned as they are displayed, with their labels")
