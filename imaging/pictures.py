"""Pictures in memory as sources, and how any source shrinks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imaging.image_file import ImageFile, View
from imaging.planes import TURNS, HeldPlanes, picture_values, turned
from imaging.probe import PILLOW, RASTERIO, FileInfo, read_orientation
from imaging.sources import MEMORY_PIXELS, Source, fits_memory
from utils.errors import InputError
from utils.stretch import RGB
from utils.tiling import Size, strips

_STRIP_PIXELS = 16_000_000
"""How many pixels of a large source are shrunk at a time, if it is RGB."""


def picture(image: Image.Image, view: View | None = None) -> ImageFile:
    """Return a Pillow image of any mode, turned as its EXIF says, as a source; InputError where it lacks the bands."""
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
    return ImageFile(info, HeldPlanes(turned(values, TURNS[orientation]), palette), view or View())


def array(values: np.ndarray, view: View) -> ImageFile:
    """Return an array as a source: a picture where no bands are named, else as if a file held it.

    A picture is (H, W, 3) or grey (H, W), uint8; others are (H, W, bands) of whole or floating-point numbers. Of a
    masked array, pixels that are masked in all bands that are read have no data. Raises InputError for another type or
    shape, an empty array and missing bands.
    """
    if view.bands is None:
        known, wanted = values.dtype == np.uint8 and values.shape[2:] in ((), (RGB,)), "(H, W, 3) or (H, W) uint8"
    else:
        known, wanted = values.dtype.kind in "uif", "(H, W, bands) or (H, W) of whole or floating-point numbers"
    if not known or values.ndim not in (2, 3) or not values.size:
        raise InputError(f"an array must be {wanted}, not empty, not {values.shape} {values.dtype}")
    planes = np.atleast_3d(np.ma.getdata(values)).transpose(2, 0, 1)
    masked = None
    if np.ma.is_masked(values):
        masked = np.atleast_3d(np.ma.getmaskarray(values)).transpose(2, 0, 1)
    info = FileInfo(
        path=Path("the array"),
        format="",
        stored=values.shape[:2],
        bands=len(planes),
        dtype=planes.dtype.name,
        decoders=(PILLOW,) if values.ndim == 2 else (RASTERIO,),  # grey counts as RGB, one band of a raster does not
    )
    return ImageFile(info, HeldPlanes(planes, masked=masked), view)


def shrink(source: Source, size: Size, most: int = MEMORY_PIXELS) -> Tensor:
    """Shrink a source to (bands, *size) uint8 with Pillow's bilinear filter, antialiased.

    A source of more bytes than `most` pixels of RGB is shrunk along its rows first, some rows at a time, then along its
    columns: the filter is separable, so values differ by the rounding between the steps alone.
    """
    height, width = source.size
    pixels = height * width if fits_memory(source, most) else _STRIP_PIXELS * RGB // source.n_bands
    parts = [
        _resize(source.read(box), size if box.height == height else (box.height, size[1]))
        for box in strips(source.size, pixels)
    ]
    return _resize(torch.cat(parts, 1), size)


def _resize(image: Tensor, size: Size) -> Tensor:
    """Resize an image (bands, H, W) uint8 to (bands, *size) by Pillow.

    Bands are resized one by one: the values are those of RGB at once, but bands need not be interleaved for Pillow, and
    it cannot take the last of two or four for transparency.
    """
    resized = torch.empty((len(image), *size), dtype=torch.uint8)
    for target, band in zip(resized, image, strict=True):
        picture = Image.fromarray(band.contiguous().cpu().numpy())
        target.numpy()[:] = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized
