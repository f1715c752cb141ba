"""Images and labels, read from files safely: whatever is wrong with one is refused by its name."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.tiling import Size

MAX_PIXELS = 1_000_000_000
"""Larger images are refused unless the caller says otherwise: decoded, a thousand million pixels take 4 GB."""

_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow's decoders raise on files that are missing, truncated or damaged."""

_GREY_LEVELS = 1 << 16
_GREY_MODES = ("L", "LA", "I", "I;16", "I;16L", "I;16B")


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Truncated files fail, whatever other code has set, and our limit replaces Pillow's of 0.18e9 pixels."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The fully decoded image, in the mode it is stored in; InputError where that cannot be done."""
    try:
        with _strict_pillow():
            with Image.open(path) as image:
                pixels = image.width * image.height
                if pixels <= max_pixels:
                    # compares checksums where the format has them (PNG), which decoding does not; spends the object
                    image.verify()
            with Image.open(path) as image:
                if pixels <= max_pixels:
                    image.load()
    except _DECODING_ERRORS as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image, or of an unknown format" if unknown else getattr(error, "strerror", None) or error
        advice = "copy it again from its source or leave it out"
        raise InputError(f"{path} cannot be read: {reason}; {advice}", "unreadable") from error
    if pixels > max_pixels:
        raise InputError(
            f"{path} has {pixels} pixels, more than the {max_pixels} allowed; cut it into smaller images", "too large"
        )
    return image


@contextmanager
def header(path: Path) -> Iterator[Image.Image]:
    """The image of which only the header is read; InputError where that cannot be done."""
    try:
        with _strict_pillow(), Image.open(path) as image:
            yield image
    except _DECODING_ERRORS as error:
        reason = "cannot be read as an image; copy it again from its source or leave it out"
        raise InputError(f"{path} {reason}", "unreadable") from error


def read_size(path: Path) -> Size:
    """(height, width) of an image, from its header; InputError where that cannot be read."""
    with header(path) as image:
        return image.height, image.width


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as 8-bit RGB; grey is repeated, transparency dropped.

    Raises InputError, naming the file: missing, truncated, damaged, too large, or more than 8 bits of grey.
    """
    image = decode(Path(path), max_pixels)
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{path} has grey values of more than 8 bits (mode {image.mode}); save it with 8 bits", "more than 8 bits"
        )
    # convert() copies even where there is nothing to convert
    return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path: str | Path, classes: Classes, size: Size, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W) uint8 class ids of a label of `size`, 255 where left out.

    A file holds either colours of `classes.palette` or `classes.values`, which are the ids unless the set has grey
    values of its own; which, is decided for each file:
    - grey of any depth: values; of one bit: values 0 and 1, or 0 and 255 where 1 is no class's;
    - colours (RGB, RGBA, ...): class colours, or, where some are not and the channels are all equal, values;
    - palette: class colours where all that occur are; else, and wherever an ignored index (255) occurs, its indices
      are the values.

    Raises InputError, naming the file: unreadable, of another size, a colour or a value that no class has.
    """
    path = Path(path)
    image = decode(path, max_pixels)
    if (image.height, image.width) != tuple(size):
        raise InputError(
            f"{path} is {image.height} x {image.width} pixels, but its image is {size[0]} x {size[1]}; "
            "a label must have its image's size",
            "sizes differ",
        )
    if image.mode == "1":
        white = 1 if 1 in classes.values else 255
        return _checked_ids(path, np.where(image, np.uint8(white), np.uint8(0)), classes)
    if image.mode in _GREY_MODES:
        return _checked_ids(path, np.asarray(image.getchannel(0) if image.mode == "LA" else image), classes)
    if image.mode == "P":
        return _ids_of_palette(path, image, classes)
    return _ids_of_colors(path, np.asarray(image.convert("RGB")), classes)


def _ids_of_greys(greys: np.ndarray, classes: Classes) -> tuple[np.ndarray, np.ndarray]:
    """The uint8 ids of `greys`, integers of any range, and where they are neither a class's nor ignored."""
    table = np.full(_GREY_LEVELS + 1, -1, np.int16)  # the last entry is for all that lies outside
    for value in (one for one in classes.ignored if isinstance(one, int)):
        table[value] = IGNORED
    for k, value in enumerate(classes.values):
        table[value] = k
    if greys.dtype.itemsize > 1:
        greys = np.where((greys >= 0) & (greys < _GREY_LEVELS), greys, _GREY_LEVELS)
    ids = table[greys]
    return ids.astype(np.uint8), ids < 0


def _checked_ids(path: Path, greys: np.ndarray, classes: Classes) -> np.ndarray:
    """The ids of `greys`; InputError where one is unknown."""
    ids, unknown = _ids_of_greys(greys, classes)
    if unknown.any():
        row, column = np.unravel_index(unknown.argmax(), unknown.shape)
        place = f"{greys[row, column]} at row {row}, column {column} ({unknown.sum()} such pixels) is no class"
        if classes.values == tuple(range(len(classes))) and classes.ignored == (IGNORED,):
            rule = f"ids must be 0..{len(classes) - 1}, or {IGNORED} to leave a pixel out"
            raise InputError(f"{path}: id {place}; {rule}")
        rule = ", ".join(f"{value} ({name})" for value, name in zip(classes.values, classes.names, strict=True))
        raise InputError(f"{path}: grey {place}'s; use {rule}; a label that was resized smoothly must be thresholded")
    return ids


def _ids_of_palette(path: Path, image: Image.Image, classes: Classes) -> np.ndarray:
    """(H, W) uint8 ids of a palette image: its indices, or what its colours tell.

    Tools that compress files turn RGB into a palette in an order of their own, so class colours win. But no
    class has a colour for index 255, so whoever wrote that wrote ids.
    """
    used = np.flatnonzero(image.histogram())
    colors = np.reshape(image.getpalette("RGB"), (-1, 3)).tolist()
    colored = all(k < len(colors) and tuple(colors[k]) in classes.palette for k in used)
    ids, unknown = _ids_of_greys(used, classes)
    if not unknown.any() and (IGNORED in ids or not colored):
        return _checked_ids(path, np.asarray(image), classes)
    if used[-1] >= len(colors):
        # Pillow would show it as black; it comes from writing id 255 with a palette too short for it
        raise InputError(
            f"{path}: index {used[-1]} is neither a class nor in the palette of {len(colors)} colours; "
            "save the ids as a grey image"
        )
    return _ids_of_colors(path, np.asarray(image.convert("RGB")), classes)


def _ids_of_colors(path: Path, pixels: np.ndarray, classes: Classes) -> np.ndarray:
    """(H, W) uint8 ids of `pixels` (H, W, 3) uint8: class colours, or grey values in three equal channels."""
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
    for red, green, blue in (one for one in classes.ignored if not isinstance(one, int)):
        unknown &= codes != (red << 16 | green << 8 | blue)
    if not unknown.any():
        return ids
    first = pixels[..., 0]
    if (pixels == first[..., None]).all():
        ids, foreign = _ids_of_greys(first, classes)
        if not foreign.any():
            return ids
    row, column = np.unravel_index(unknown.argmax(), unknown.shape)
    color = tuple(pixels[row, column].tolist())
    raise InputError(
        f"{path}: colour {color} at row {row}, column {column} is no class's ({unknown.sum()} such pixels); "
        f"use {', '.join(map(str, classes.palette))}, or class ids in a grey image"
    )
