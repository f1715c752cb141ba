"""Pictures of every kind, opened for segmentation: what Pillow reads in memory, rasters in windows.

Training reads images by `dataset/reading.py`, which is stricter; an 8-bit picture gives the same pixels by either.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataset.base import image_tensor
from dataset.raster import Raster
from dataset.reading import MAX_PIXELS, decode, header
from dataset.stretch import Stretch
from utils.errors import InputError
from utils.sources import MEMORY_PIXELS, MemorySource, Source
from utils.tiling import Box, Size

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".img", ".vrt")
"""What is taken of a folder; a file that is named may have any."""

_GEOREFERENCE_TAGS = (33550, 33922, 34264, 34735)
"""TIFF: pixel scale, tie points, transformation, GeoKeyDirectory."""

_BAND_PIXELS = 16_000_000
"""How many pixels of a large source are shrunk at a time."""


def image_planes(image: Image.Image) -> np.ndarray:
    """(C, H, W) of the image as its file orients it: uint8 RGB, or one plane of greys with more than 8 bits.

    Grey is repeated, transparency dropped, palettes and CMYK become RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)[None]
    return image_tensor(image if image.mode == "RGB" else image.convert("RGB")).numpy()


def picture(image: Image.Image, stretch: Stretch | None = None, bands: tuple[int, ...] = (1, 2, 3)) -> MemorySource:
    """A Pillow image as a source; more than 8 bits are stretched, and `bands`, from 1, chosen."""
    planes = image_planes(image)
    if planes.dtype != np.uint8:
        limits = (stretch or Stretch()).limits(planes)
        planes = (stretch or Stretch()).apply(planes, limits).repeat(3, axis=0)
    if max(bands) > 3:
        raise InputError(f"--bands {','.join(map(str, bands))}: the picture has 3", "no such band")
    chosen = planes if bands == (1, 2, 3) else planes[[band - 1 for band in bands]]
    return MemorySource(torch.from_numpy(chosen))


@contextmanager
def open_source(
    path: str | Path, bands: tuple[int, ...] | None = None, stretch: Stretch | None = None
) -> Iterator[Source]:
    """The picture or raster `path`. `bands`: which three, counted from 1, are red, green and blue.

    A raster is what Pillow does not know, and a TIFF that has a georeference, other than 8-bit greys or colours, or
    more pixels than are held. Raises InputError, naming the file, where it cannot be read, lacks the bands, or needs
    rasterio, which is not installed.
    """
    path = Path(path)
    if is_raster(path):
        with Raster(path, bands, stretch or Stretch()) as raster:
            yield raster
        return
    try:
        source = picture(decode(path, MAX_PIXELS), stretch, bands or (1, 2, 3))
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}", error.kind) from error
    yield source


def read_source_size(path: str | Path) -> Size:
    """(height, width) of `path` as `open_source` gives it, from its header; InputError as there."""
    path = Path(path)
    if is_raster(path):
        with Raster(path, None, Stretch()) as raster:
            return raster.size
    with header(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def is_raster(path: Path) -> bool:
    """Whether `open_source` opens `path` as a raster; InputError where there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file", "unreadable")
    try:
        with header(path) as image:
            if image.format != "TIFF":
                return False
            georeferenced = any(tag in image.tag_v2 for tag in _GEOREFERENCE_TAGS)
            plain = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
            return georeferenced or not plain or image.width * image.height > MEMORY_PIXELS
    except InputError:
        return Raster.can_open(path)


def shrink(source: Source, size: Size, most: int = MEMORY_PIXELS) -> Tensor:
    """(3, *size) uint8: `source` shrunk with Pillow's bilinear filter, antialiased.

    Up to `most` pixels this is what `shrink_image` gives. A larger source is shrunk along its rows first, some rows at
    a time, then along its columns: the filter is separable, so values differ by the rounding between the steps alone.
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
    return image_tensor(shrunk)
