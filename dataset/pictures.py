"""Pictures in memory as sources, and how any source shrinks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.image_file import ImageFile, View
from dataset.planes import TURNS, HeldPlanes, TurnedPlanes, picture_values
from dataset.probe import PILLOW, FileInfo, read_orientation
from utils.sources import MEMORY_PIXELS, Source
from utils.tiling import Box, Size

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".img", ".vrt")
"""Of the files of a folder, those with one of these are segmented; a file that is named may have any."""

_BAND_PIXELS = 16_000_000
"""How many pixels of a large source are shrunk at a time."""


def picture(image: Image.Image, view: View | None = None) -> ImageFile:
    """Return a Pillow image as a source.

    Args:
        image: of any mode, turned as its EXIF says.
        view: which bands are shown, and how values of more than 8 bits become 0..255; by default as `View()`.

    Raises:
        InputError: it lacks the bands.
    """
    image.load()
    orientation = read_orientation(image)
    values, palette = picture_values(image)
    info = FileInfo(
        path=Path("the picture"),
        format="",
        stored=(image.height, image.width),
        bands=len(values),
        dtype=values.dtype.name,
        decoders=(PILLOW,),
        top=1 if image.mode == "1" else 255,
        orientation=orientation,
        palette=palette is not None,
    )
    return ImageFile(info, TurnedPlanes(HeldPlanes(values, palette), TURNS[orientation]), view or View())


def shrink(source: Source, size: Size, most: int = MEMORY_PIXELS) -> Tensor:
    """Shrink a source with Pillow's bilinear filter, antialiased.

    A large source is shrunk along its rows first, some rows at a time, then along its columns: the filter is separable,
    so values differ by the rounding between the steps alone.

    Args:
        source: an image.
        size: (height, width) to make of it.
        most: the most pixels that are shrunk at once, with one rounding.

    Returns:
        (3, *size) uint8.
    """
    height, width = source.size
    step = height if height * width <= most else max(1, _BAND_PIXELS // width)
    bands = []
    for top in range(0, height, step):
        rows = source.read(Box(top, 0, min(step, height - top), width))
        image = Image.fromarray(rows.permute(1, 2, 0).contiguous().cpu().numpy())
        target = size if step == height else (image.height, size[1])
        bands.append(np.asarray(image.resize((target[1], target[0]), Image.Resampling.BILINEAR)))
    shrunk = Image.fromarray(np.concatenate(bands)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(shrunk).transpose(2, 0, 1)))
