"""How labels spell class ids: as numbers or as colours."""

from dataclasses import dataclass
from pathlib import Path

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
        return table[values]

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
        values = self.rgb(values)
        # one table of all 2**24 colours is read in the time of a few comparisons, however many classes there are
        table = np.full(1 << 24, UNKNOWN, np.int16)
        for color in (one for one in self.classes.ignored if not isinstance(one, int)):
            table[_code(color)] = IGNORED
        for k, color in enumerate(self.classes.palette):
            table[_code(color)] = k
        codes = values[0].astype(np.uint32)
        for channel in values[1:]:
            codes <<= 8
            codes |= channel
        return table[codes]

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


def _spelt(value: np.generic) -> str:
    """Return a number as people write it: whole ones without a point, others in few digits."""
    return f"{value:.6g}" if value.dtype.kind == "f" else str(value)


def _code(color: tuple[int, ...]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]
