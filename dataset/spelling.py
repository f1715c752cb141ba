"""How labels spell class ids: as numbers or as colours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.tiling import Box

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

    @property
    def _white(self) -> int | None:
        """The largest value of fewer than 8 bits, where it is no class's and stands for 255."""
        values = self.classes.values
        means_255 = self.top < 255 and self.top not in values and (self.top == 1 or 255 in values)
        return self.top if means_255 else None

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Return int16 ids of the first band of (C, h, w), -1 where a value is no class's; NaN and infinity are 255."""
        return self._ids(values[0])

    def _ids(self, values: np.ndarray) -> np.ndarray:
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            whole = np.where(finite & (np.abs(values) <= MAX_VALUE), values, -1).astype(np.int32)
            return np.where(finite, self._ids(np.where(whole == values, whole, -1)), np.int16(IGNORED))
        table = np.full(MAX_VALUE + 2, UNKNOWN, np.int16)  # the last entry is for all that lies outside
        for value in (one for one in self.classes.ignored if isinstance(one, int)):
            table[value] = IGNORED
        for k, value in enumerate(self.classes.values):
            table[value] = k
        if self._white is not None:
            table[self._white] = table[255]
        if values.dtype != np.uint8:
            values = np.where((values >= 0) & (values <= MAX_VALUE), values, MAX_VALUE + 1).astype(np.int32)
        return look_up(table, values)

    def refusal(self, path: Path, values: np.ndarray, unknown: np.ndarray, box: Box) -> InputError:
        """Return what is wrong with the first of the values (C, h, w) of `box` that are `unknown` (h, w)."""
        row, column = np.unravel_index(unknown.argmax(), unknown.shape)
        value = values[0, row, column]
        where = f"at row {row + box.top}, column {column + box.left} ({unknown.sum()} such pixels)"
        place = f"{_spelt(value)} {where} is no class"
        if values.dtype.kind == "f" and value != np.round(value):
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
            return self._table.ids(values)
        indices = np.arange(int(np.iinfo(values.dtype).max) + 1, dtype=values.dtype)
        return look_up(self._table.ids(self.rgb(indices[None, None]))[0], values[0])

    @property
    def _table(self) -> "ColorTable":
        void = (one for one in self.classes.ignored if not isinstance(one, int))
        return ColorTable.of({**dict.fromkeys(void, IGNORED), **{c: k for k, c in enumerate(self.classes.palette)}})

    def rgb(self, values: np.ndarray) -> np.ndarray:
        """Return (3, h, w) uint8 of what `ids` takes; indices beyond the palette are black."""
        if self.palette is None:
            return values
        table = np.zeros((max(len(self.palette), int(np.iinfo(values.dtype).max) + 1), 3), np.uint8)
        table[: len(self.palette)] = self.palette
        return table[values[0]].transpose(2, 0, 1)

    def refusal(self, path: Path, values: np.ndarray, unknown: np.ndarray, box: Box) -> InputError:
        """Return what is wrong with the first of the colours of `box` that are `unknown`."""
        row, column = np.unravel_index(unknown.argmax(), unknown.shape)
        color = tuple(self.rgb(values)[:, row, column].tolist())
        place = f"row {row + box.top}, column {column + box.left} is no class's ({unknown.sum()} such pixels)"
        return InputError(
            f"{path}: colour {color} at {place}; use {', '.join(map(str, self.classes.palette))}, or class ids in a "
            "grey image"
        )


@dataclass(frozen=True)
class ColorTable:
    """Ids by colour, without comparing every pixel with every class.

    Each channel has few values in all colours together. They are numbered, in each channel by itself, from 1 on; every
    other value is 0. A pixel's three numbers make a code, by which a small table holds its id.

    Attributes:
        digits: for each channel (256,), the number of each value times the weight of the channel in the code.
        by_code: (codes,) int16 ids, -1 where a code is no colour's.
    """

    digits: tuple[np.ndarray, ...]
    by_code: np.ndarray

    @classmethod
    def of(cls, ids: Mapping[tuple[int, ...], int]) -> "ColorTable":
        """Return the table of `ids` by (red, green, blue), 0..255 each."""
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
        return cls(tuple(digits), by_code)

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Return (h, w) int16 ids of colours (3, h, w) uint8."""
        codes = look_up(self.digits[0], values[0])
        for digit, channel in zip(self.digits[1:], values[1:], strict=True):
            codes += look_up(digit, channel)
        return look_up(self.by_code, codes)


def look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `table[values]` for values (h, w) of any whole type; of bytes OpenCV reads it several times faster."""
    if values.dtype != np.uint8 or not values.size:
        return table[values]
    found: np.ndarray = cv2.LUT(np.ascontiguousarray(values), table[:256])
    return found


def _spelt(value: np.generic) -> str:
    """Return a number as people write it: whole ones without a point, others in few digits."""
    return f"{value:.6g}" if value.dtype.kind == "f" else str(value)
