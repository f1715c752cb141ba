"""How stored values become 8-bit RGB: which bands are shown, and which values become 0 and 255."""

from dataclasses import dataclass

import numpy as np

from utils.errors import InputError

Limits = list[tuple[float, float]]
"""Of each band, the values that become 0 and 255."""


@dataclass(frozen=True)
class Stretch:
    """Which values become 0 and 255: percentiles of each band, or, where not `per_cent`, fixed values."""

    low: float = 2.0
    high: float = 98.0
    per_cent: bool = True

    @classmethod
    def parse(cls, text: str) -> "Stretch":
        """`2%,98%` or `0,10000`; InputError for anything else."""
        parts = [part.strip() for part in text.split(",")]
        per_cent = all(part.endswith("%") for part in parts)
        try:
            low, high = (float(part.removesuffix("%") if per_cent else part) for part in parts)
        except ValueError:
            low = high = 0.0
        if not low < high or (per_cent and not (low >= 0 and high <= 100)):
            raise InputError(f"--stretch {text}: give two rising percentiles (2%,98%) or two rising values (0,10000)")
        return cls(low, high, per_cent)

    def __str__(self) -> str:
        """Return what `parse` takes."""
        sign = "%" if self.per_cent else ""
        return f"{self.low:.17g}{sign},{self.high:.17g}{sign}"

    def limits(self, planes: np.ndarray, valid: np.ndarray | None = None) -> Limits:
        """Of each of `planes` (C, H, W), from the pixels that are finite and, where given, `valid` (H, W)."""
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
        """`planes` (C, H, W) as uint8: linear between the limits, clipped beyond them; what is not finite becomes 0."""
        found = np.empty(planes.shape, np.uint8)
        for plane, (low, high), target in zip(planes, limits, found, strict=True):
            scaled = (plane.astype(np.float32) - low) * np.float32(255 / (high - low))
            target[...] = np.nan_to_num(scaled, nan=0.0).clip(0, 255).round()
        return found


def parse_bands(text: str) -> tuple[int, int, int]:
    """Parse `3,2,1` as (3, 2, 1), one number as three times the same; InputError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or len(parts) not in (1, 3):
        raise InputError(f"--bands {text}: give three band numbers from 1, as in 3,2,1, or a single one")
    red, *others = map(int, parts)
    return (red, *others) if others else (red, red, red)
