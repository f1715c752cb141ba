"""The conversion of stored values to 8 bits: the bands that are read, and the values that become 0 and 255."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.errors import InputError

Limits = list[tuple[float, float]]
"""For each band, the values that become 0 and 255."""

Bands = tuple[int, ...]
"""Numbers of bands in a file, counted from 1, in the order in which a network reads them."""

RGB = 3
"""The number of bands where none are named: red, green and blue, or a grey one three times."""

MOST_BANDS = 16
"""How many bands a network reads at most."""


@dataclass(frozen=True)
class Stretch:
    """A linear conversion of stored values to 0..255, from `low` to `high`: values, or percentiles of each band."""

    low: float = 2.0
    high: float = 98.0
    per_cent: bool = True

    def __post_init__(self) -> None:
        """Raise InputError unless the two are finite and rise, percentiles within 0..100."""
        rising = self.low < self.high and math.isfinite(self.low) and math.isfinite(self.high)
        if not rising or (self.per_cent and not (self.low >= 0 and self.high <= 100)):
            raise _no_stretch(str(self))

    @classmethod
    def of(cls, value: Any) -> "Stretch":
        """Return a stretch, or the one that a text spells. Raises InputError for anything else."""
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Stretch):
            raise _no_stretch(value)
        return value

    @classmethod
    def parse(cls, text: str) -> "Stretch":
        """Parse `2%,98%` or `0,10000`. Raises InputError for any other text."""
        parts = [part.strip() for part in text.split(",")]
        per_cent = all(part.endswith("%") for part in parts)
        try:
            low, high = (float(part.removesuffix("%") if per_cent else part) for part in parts)
            return cls(low, high, per_cent)
        except ValueError as error:  # also of too few or too many
            raise _no_stretch(text) from error

    def __str__(self) -> str:
        """Return the text from which `parse` makes this conversion."""
        sign = "%" if self.per_cent else ""
        return f"{self.low:.17g}{sign},{self.high:.17g}{sign}"

    def limits(self, planes: np.ndarray, valid: np.ndarray | None = None) -> Limits:
        """Return the values that become 0 and 255 in each plane of stored values (C, H, W).

        Percentiles are those of finite values where `valid` (H, W) bool says that there are data.
        """
        if not self.per_cent:
            return [(self.low, self.high)] * len(planes)
        return [self._percentiles(plane if valid is None else plane[valid]) for plane in planes]

    def _percentiles(self, values: np.ndarray) -> tuple[float, float]:
        values = values[np.isfinite(values)]
        if not values.size:
            return 0.0, 1.0
        low, high = np.percentile(values, (self.low, self.high)).tolist()
        return low, high if high > low else low + 1

    def apply(self, planes: np.ndarray, limits: Limits) -> np.ndarray:
        """Convert stored values (C, H, W) by what `limits` returned to uint8.

        The result is linear between the limits, clipped beyond them; a value that is not finite becomes 0.
        """
        found = np.empty(planes.shape, np.uint8)
        for plane, (low, high), target in zip(planes, limits, found, strict=True):
            with np.errstate(all="ignore"):  # values far outside the limits may overflow
                scaled = (plane.astype(np.float32) - low) * np.float32(255 / (high - low))
            target[...] = np.nan_to_num(scaled, nan=0.0).clip(0, 255).round()
        return found


def _no_stretch(given: object) -> InputError:
    return InputError(f"--stretch {given}: give two rising percentiles (2%,98%) or two rising values (0,10000)")


def bands_of(value: Any) -> Bands:
    """Return bands from a text, `4,3,2`, or a sequence of numbers. Raises InputError as `parse_bands`."""
    try:
        return parse_bands(value if isinstance(value, str) else spell_bands(value))
    except TypeError as error:  # it is no sequence
        raise _no_bands(value) from error


def parse_bands(text: str) -> Bands:
    """Parse `4,3,2` as (4, 3, 2). Raises InputError for a text that is not 1 to 16 numbers from 1."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or len(parts) > MOST_BANDS:
        raise _no_bands(text)
    return tuple(map(int, parts))


def _no_bands(given: object) -> InputError:
    return InputError(f"--bands {given}: give 1 to {MOST_BANDS} band numbers from 1, as in 4,3,2")


def spell_bands(bands: Bands) -> str:
    """Return the text from which `parse_bands` makes these bands."""
    return ",".join(map(str, bands))


def count_bands(bands: str | None) -> int:
    """Return how many bands an option or a checkpoint names; None stands for RGB."""
    return RGB if bands is None else len(parse_bands(bands))


def fit_bands(bands: Bands, n_bands: int, network: object) -> Bands:
    """Return the bands that a trained network of `n_bands` bands reads instead of those of its training.

    A single one is shown as grey to a network of three bands. Raises InputError, naming `network`, if the numbers
    differ.
    """
    if len(bands) == 1 and n_bands == RGB:
        return RGB * bands
    if len(bands) != n_bands:
        raise InputError(f"--bands {spell_bands(bands)}: {network} was made with {n_bands} bands; name as many")
    return bands
