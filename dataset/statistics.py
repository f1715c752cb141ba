"""Mean and deviation of each band over the images of a data set, for `--normalize data`."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dataset.base import SegmentationDataset
from dataset.loader import read_each
from imaging.image_file import STRIP_PIXELS, open_image
from utils.errors import InputError
from utils.settings import Statistics
from utils.tiling import strips

SMALLEST_STD = 1 / 255
"""Of a band that hardly varies: the step between two values."""


def _count(data: SegmentationDataset, index: int) -> Tensor:
    """Return how often each value occurs in each band of an item, (bands, 256)."""
    counts = torch.zeros((data.view.n_bands, 256), dtype=torch.int64)
    for pair in data.items[index].pairs():
        with open_image(pair.image, data.view, data.max_pixels) as image:
            for box in strips(image.size, STRIP_PIXELS):
                pixels, valid = image.read(box), image.valid(box)
                for band, own in zip(pixels, counts, strict=True):
                    own += torch.bincount((band if valid is None else band[valid]).flatten(), minlength=256)
    return counts


def count_values(
    data: SegmentationDataset, indices: Sequence[int], num_workers: int = 0, *, quiet: bool = False
) -> Tensor:
    """Count how often each value occurs in each band of some of `data.items`, as `data.view` reads them.

    Pixels without data are left out. Returns (bands, 256) int64; counts of parts of the images add up. Raises
    InputError if an image cannot be read, or has fewer bands.
    """
    total = torch.zeros((data.view.n_bands, 256), dtype=torch.int64)
    for counts in read_each(partial(_count, data), indices, num_workers, "statistics", quiet):
        total += counts
    return total


def statistics_of(counts: Tensor) -> Statistics:
    """Return mean and standard deviation of pixel values in [0, 1] from counts (bands, 256) of 0..255.

    Raises InputError if a band has no pixel.
    """
    if not bool(counts.sum(1).all()):
        raise InputError("--normalize data: no pixel of the training images has data; give half or none")
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / counts.sum(1, keepdim=True)
    means = (shares * values).sum(1)
    variances = (shares * (values - means[:, None]) ** 2).sum(1)
    return Statistics(tuple(means.tolist()), tuple(variances.sqrt().clamp_min(SMALLEST_STD).tolist()))
