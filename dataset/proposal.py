"""Which bands and which stretch the file of a data set of one's own proposes, from its images."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dataset.base import Item
from dataset.image_file import View, open_image
from dataset.probe import FileInfo, probe
from utils.errors import InputError
from utils.stretch import MOST_BANDS, RGB, Bands, Stretch

MEASURED = "measured"
"""The value of `--stretch` for limits that all images have in common."""


def headers(items: Iterable[Item]) -> list[FileInfo]:
    """Return what the headers of all image files say; those that cannot be read are left out."""
    found = []
    for path in (pair.image for item in items for pair in item.pairs()):
        try:
            found.append(probe(path))
        except InputError:
            continue
    return found


def propose_view(images: Sequence[FileInfo], stretch: str | None = None) -> dict[str, Any]:
    """Return the entries `bands` and `stretch` of a data set's file, as far as its images need them.

    Grey images and RGB need no `bands`: others have all that every image has, without transparency, up to 16. Images of
    8 bits need no `stretch`.

    Args:
        images: what the headers say.
        stretch: the entry that is asked for, or `MEASURED`; None for the default percentiles.

    Raises:
        InputError: an image cannot be measured.
    """
    found: dict[str, Any] = {}
    least = min((info.bands - info.alpha for info in images), default=RGB)
    if least not in (1, RGB):
        found["bands"] = list(range(1, min(least, MOST_BANDS) + 1))
    deep = [info for info in images if info.needs_stretch]
    if deep:
        bands = tuple(found["bands"]) if "bands" in found else None
        found["stretch"] = str(measure_stretch(deep, bands)) if stretch == MEASURED else stretch or str(Stretch())
    return found


def measure_stretch(images: Sequence[FileInfo], bands: Bands | None) -> Stretch:
    """Return the stretch between the lowest 2nd and the highest 98th percentile of any band of any image.

    Args:
        images: that need a stretch, at least one.
        bands: which are read.

    Raises:
        InputError: an image cannot be read.
    """
    limits = []
    for info in images:
        with open_image(info, View(bands)) as image:
            limits += image.limits
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    if all(not info.dtype.startswith("float") for info in images):
        low, high = math.floor(low), math.ceil(high)
    return Stretch(low, high, per_cent=False)
