"""Labels of every kind as class ids: the one reader that training, evaluation and `describe` share."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from imaging.planes import MAX_PIXELS, TURNS, Planes, open_planes, palette_colors, to_tensor
from imaging.probe import RASTERIO, FileInfo, probe
from utils.classes import IGNORED, Classes
from utils.errors import InputError, required
from utils.tiling import Box, Size, strips
from utils.turns import Turn

MAX_VALUE = 65535
"""The largest grey value that can stand for a class."""

SMOOTHED = (
    "they were resized with smoothing, or saved as JPEG: save labels losslessly and resize them with nearest "
    "neighbour (two classes can be mended by a threshold)"
)

UNKNOWN = -1
"""The id of what no class has."""


@dataclass(frozen=True)
class Greys:
    """A label whose numbers are the classes' values."""

    classes: Classes
    top: int = 255
    """The largest value that fits the samples."""

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Return int16 ids of the first band of (C, h, w), -1 where a value is no class's; NaN and infinity are 255."""
        values = values[0]
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            whole = np.where(finite & (np.abs(values) <= MAX_VALUE), values, -1).astype(np.int32)
            return np.where(finite, self.ids(np.where(whole == values, whole, -1)[None]), np.int16(IGNORED))
        table = np.full(MAX_VALUE + 2, UNKNOWN, np.int16)  # the last entry is for all that lies outside
        for value in (one for one in self.classes.ignored if isinstance(one, int)):
            table[value] = IGNORED
        known = self.classes.values
        for k, value in enumerate(known):
            table[value] = k
        # the largest value of fewer than 8 bits, where it is no class's, may stand for 255
        if self.top < 255 and self.top not in known and (self.top == 1 or 255 in known):
            table[self.top] = table[255]
        if values.dtype != np.uint8:
            values = np.where((values >= 0) & (values <= MAX_VALUE), values, MAX_VALUE + 1).astype(np.int32)
        return look_up(table, values)

    def refusal(self, path: Path, values: np.ndarray, where: str, count: int) -> InputError:
        """Return what is wrong with the values (C,) of a pixel at the place `where`, and of as many as `count`."""
        value, is_float = values[0], values.dtype.kind == "f"
        place = f"{f'{value:.6g}' if is_float else value} at {where} ({count} such pixels) is no class"
        if is_float and value != np.round(value):
            return InputError(f"{path}: {place}'s, for it is no whole number; {SMOOTHED}", "smoothed")
        classes = self.classes
        if classes.values == tuple(range(len(classes))) and classes.ignored == (IGNORED,):
            rule = f"ids must be 0..{len(classes) - 1}, or {IGNORED} to leave a pixel out"
            return InputError(f"{path}: id {place}; {rule}")
        rule = ", ".join(f"{value} ({name})" for value, name in zip(classes.values, classes.names, strict=True))
        return InputError(f"{path}: grey {place}'s; use {rule}; a label that was resized smoothly must be thresholded")


@dataclass(frozen=True)
class Colors:
    """A label of class colours, `palette` (n, 3) where its one band holds indices."""

    classes: Classes
    palette: np.ndarray | None = None

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Return int16 ids of colours (3, h, w), or of palette indices (1, h, w), -1 where a colour is no class's."""
        if self.palette is None:
            return self._ids_of(values)
        indices = np.arange(int(np.iinfo(values.dtype).max) + 1, dtype=values.dtype)
        return look_up(self._ids_of(palette_colors(self.palette, indices[None]))[0], values[0])

    def refusal(self, path: Path, values: np.ndarray, where: str, count: int) -> InputError:
        """Return what is wrong with the colour, or index, of a pixel at the place `where`; see `Greys.refusal`."""
        if self.palette is not None:
            values = palette_colors(self.palette, values[None])[:, 0, 0]
        return InputError(
            f"{path}: colour {tuple(values.tolist())} at {where} is no class's ({count} such pixels); use "
            f"{', '.join(map(str, self.classes.palette))}, or class ids in a grey image"
        )

    @cached_property
    def _table(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Ids by colour, without comparing every pixel with every class.

        Each channel has few values in all colours together. They are numbered, in each channel by itself, from 1 on;
        every other value is 0. A pixel's three numbers make a code, by which a small table holds its id.

        Returns for each channel (256,), the number of each value times the weight of the channel in the code; and
        (codes,) int16 ids, -1 where a code is no colour's.
        """
        void = (one for one in self.classes.ignored if not isinstance(one, int))
        ids = {**dict.fromkeys(void, IGNORED), **{color: k for k, color in enumerate(self.classes.palette)}}
        colors = np.array(list(ids), np.uint8)  # (n, 3)
        known = [np.unique(channel) for channel in colors.T]
        weights = np.cumprod([1, *(len(values) + 1 for values in known)])
        dtype = np.uint8 if weights[-1] <= 256 else np.int32
        digits = []
        for values, weight in zip(known, weights, strict=False):
            digit = np.zeros(256, dtype)
            digit[values] = np.arange(1, len(values) + 1) * weight
            digits.append(digit)
        by_code = np.full(max(256, weights[-1]), UNKNOWN, np.int16)
        by_code[sum(digit[channel] for digit, channel in zip(digits, colors.T, strict=True))] = list(ids.values())
        return digits, by_code

    def _ids_of(self, values: np.ndarray) -> np.ndarray:
        """Return (h, w) int16 ids of colours (3, h, w) uint8."""
        digits, by_code = self._table
        codes = look_up(digits[0], values[0])
        for digit, channel in zip(digits[1:], values[1:], strict=True):
            codes += look_up(digit, channel)
        return look_up(by_code, codes)


def look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `table[values]` for values (h, w) of any whole type; of bytes OpenCV reads it several times faster."""
    if values.dtype != np.uint8 or not values.size:
        return table[values]
    found: np.ndarray = cv2.LUT(np.ascontiguousarray(values), table[:256])
    return found


STRIP_PIXELS = 16_000_000
"""How many pixels of a label are read at a time to decide how it is spelt; the ids of no larger label are kept."""


def fit_of(label: FileInfo, image: FileInfo | Size) -> str:
    """Return whether a label is taken "as displayed" or "as stored, turned with the image".

    Raises InputError, naming the label, where its size fits neither.
    """
    shown = image.size if isinstance(image, FileInfo) else image
    if label.size == shown:
        return "as displayed"
    if isinstance(image, FileInfo) and label.stored == image.stored:
        return "as stored, turned with the image"
    size = f"{label.size[0]} x {label.size[1]} pixels, but its image is {shown[0]} x {shown[1]}"
    raise InputError(f"{label.path} is {size}; a label must have its image's size", "sizes differ")


def turn_of(label: FileInfo, image: FileInfo | Size) -> Turn:
    """Return how to turn what a label stores so that it lies on its image as displayed.

    A label of the image's displayed size is taken as it is displayed itself; one that fits only the image as stored is
    turned with it. Raises InputError, naming the label, where neither fits.
    """
    if fit_of(label, image) != "as displayed" and isinstance(image, FileInfo):
        return TURNS[image.orientation]
    return TURNS[label.orientation]


class LabelValues:
    """The values of a label that count: one band, or three of colours, and which pixels have data.

    Raises InputError, naming the file, where its bands can hold neither ids nor colours.
    """

    def __init__(self, info: FileInfo, planes: Planes) -> None:
        self._refusal = InputError(
            f"{info.path} has {info.bands} bands of {info.dtype}; a label has one band of class ids, or colours of 8 "
            "bits: save it so",
            "no label",
        )
        if info.bands > 4 or (info.bands == 2 and info.decoders == (RASTERIO,)):
            raise self._refusal
        if info.bands > 2 and info.dtype not in ("uint8", "uint16"):
            raise self._refusal
        self._planes, self._bands = planes, (1, 2, 3) if info.bands > 2 else (1,)

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the values (1 or 3, h, w) of `box`, colours as uint8, and (h, w) bool where it has data, or None."""
        values, valid = self._planes.read(box, self._bands), self._planes.valid(box, self._bands)
        if len(values) == 3 and values.dtype != np.uint8:
            if (values % 257).any():  # not 8 bits, spread over 16
                raise self._refusal
            values = (values // 257).astype(np.uint8)
        return values, valid

    def strips(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Return what `read` gives of the whole label, some rows at a time."""
        return map(self.read, strips(self._planes.size, STRIP_PIXELS))

    def count(self) -> Counter[Any]:
        """Return how many pixels with data hold each value, or colour as a tuple; of NaN and infinity none."""
        found: Counter[Any] = Counter()
        for values, valid in self.strips():
            plane, colored = values[0], len(values) == 3
            if colored:
                plane = values[0].astype(np.uint32) << 16 | values[1].astype(np.uint32) << 8 | values[2]
            present = plane if valid is None else plane[valid]
            if present.dtype.kind == "f":
                present = present[np.isfinite(present)]
            unique, counts = np.unique(present, return_counts=True)
            keys = [(code >> 16, code >> 8 & 255, code & 255) if colored else code for code in unique.tolist()]
            found.update(dict(zip(keys, counts.tolist(), strict=True)))
        return found


class LabelFile:
    """An open label: class ids of any box, 255 where left out.

    A file holds either colours of `classes.palette` or `classes.values`, which are the ids unless the set has grey
    values of its own; which, is decided for each file:
    - grey of any integer or float type: values; of fewer than 8 bits: values, or 0 and 255 where the largest value is
      no class's;
    - colours (RGB, RGBA, ...): class colours, or, where some are not and the channels are all equal, values;
    - palette: class colours where all that occur are; else, and wherever an ignored index (255) occurs, its indices
      are the values.

    What the file declares to be without data, and what is not a finite number, is left out.
    """

    def __init__(self, info: FileInfo, planes: Planes, classes: Classes) -> None:
        self.info, self.classes, self.size, self._palette = info, classes, planes.size, planes.palette
        self._values = LabelValues(info, planes)
        self._whole: Tensor | None = None
        self._spelling = self._decide()

    def read(self, box: Box) -> Tensor:
        """Return (height, width) uint8 ids of `box`; InputError, naming the file, for what no class has."""
        if self.info.pixels > STRIP_PIXELS:
            return self._map(box)
        if self._whole is None:
            self._whole = self._map(Box(0, 0, *self.size))
        return box.of(self._whole)

    def _map(self, box: Box) -> Tensor:
        values, valid = self._values.read(box)
        ids = self._spelling.ids(values)
        if valid is not None:
            ids = np.where(valid, ids, np.int16(IGNORED))
        unknown = ids == UNKNOWN
        if unknown.any():
            row, column = np.unravel_index(unknown.argmax(), unknown.shape)
            where = f"row {row + box.top}, column {column + box.left}"
            raise self._spelling.refusal(self.info.path, values[:, row, column], where, int(unknown.sum()))
        return to_tensor(ids.astype(np.uint8))

    def _decide(self) -> Greys | Colors:
        """Return how the file is spelt, from all of it where it has a palette or colours."""
        if self.info.palette:
            return self._decide_palette()
        if self.info.bands < 3:
            return Greys(self.classes, self.info.top)
        colors, greys = Colors(self.classes), Greys(self.classes)
        foreign = False
        for values, valid in self._values.strips():
            present = slice(None) if valid is None else valid
            equal = all((values[0] == other)[present].all() for other in values[1:])
            if not equal or (greys.ids(values)[present] == UNKNOWN).any():
                return colors
            foreign = foreign or bool((colors.ids(values)[present] == UNKNOWN).any())
        return greys if foreign else colors

    def _decide_palette(self) -> Greys | Colors:
        """Return whether a palette image holds its indices or its colours.

        Tools that compress files turn RGB into a palette in an order of their own, so class colours win. But no class
        has a colour for index 255, so whoever wrote that wrote ids, unless the set's file names its colour as ignored.
        """
        palette = required(self._palette, "palette")
        used = np.array(sorted(self._values.count()), np.int32)
        colors = [tuple(color) for color in palette.tolist()]
        shown = {colors[k] if k < len(colors) else None for k in used}
        void = {color for color in self.classes.ignored if not isinstance(color, int)}
        colored = shown <= {*self.classes.palette, *void}
        ids = Greys(self.classes).ids(used[None])
        if not (ids == UNKNOWN).any() and not (colored and (IGNORED not in ids or shown & void)):
            return Greys(self.classes)
        if len(used) and used[-1] >= len(colors):
            # decoders would show it as black; it comes from writing id 255 with a palette too short for it
            raise InputError(
                f"{self.info.path}: index {used[-1]} is neither a class nor in the palette of {len(colors)} colours; "
                "save the ids as a grey image"
            )
        return Colors(self.classes, palette)


@contextmanager
def open_label(
    path: str | Path, classes: Classes, image: FileInfo | Size | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[LabelFile]:
    """Open a label, laid on its `image` (see `turn_of`); without, turned as it is displayed.

    A raster is read in windows, any other is decoded once, up to `max_pixels`. Raises InputError, naming the file, if
    it cannot be read, has another size than its image, or cannot hold class ids.
    """
    info = probe(path)
    turn = TURNS[info.orientation] if image is None else turn_of(info, image)
    with open_planes(info, turn, max_pixels) as planes:
        yield LabelFile(info, planes, classes)
