"""Images of every kind as the network reads them: the one reader that training, evaluation and prediction share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from imaging.planes import MAX_PIXELS, Planes, open_planes, palette_colors, to_tensor
from imaging.probe import RASTERIO, FileInfo, probe
from utils.errors import InputError, required
from utils.stretch import RGB, Bands, Limits, Stretch, parse_bands, spell_bands
from utils.tiling import Box, strips

SAMPLE_SIDE = 1024
"""Percentiles are those of at most so many rows and columns, spread evenly."""

STRIP_PIXELS = 4_000_000
"""How many pixels of an image are read at a time to take percentiles, or to count values."""

MOST_KNOWN = 10_000
"""How many files' limits each process keeps."""

_known_limits: dict[tuple[object, ...], Limits] = {}


@dataclass(frozen=True)
class View:
    """How stored values become the 8-bit bands that a network reads.

    `bands`: which, counted from 1, in order; None for the first three, or the only one three times: RGB.
    `stretch`: which values become 0 and 255, where samples are not of 8 bits.
    """

    bands: Bands | None = None
    stretch: Stretch = field(default_factory=Stretch)

    @classmethod
    def parse(cls, bands: str | None, stretch: str) -> "View":
        """Return the view that options spell, as `3,2,1` or None and `2%,98%`; InputError for other spellings."""
        return cls(None if bands is None else parse_bands(bands), Stretch.parse(stretch))

    @property
    def n_bands(self) -> int:
        """The number of bands that are read of every file."""
        return RGB if self.bands is None else len(self.bands)

    def choose(self, info: FileInfo) -> Bands:
        """Return which bands of a file to read; InputError, naming it, where it has not so many.

        A grey picture counts as three equal bands, and colours behind a palette as three; a raster has its own only.
        """
        grey = info.bands < 3 and not info.palette
        if self.bands is None:
            return (1, 1, 1) if grey else (1, 2, 3)
        repeated = grey and not info.georeference and info.decoders != (RASTERIO,)
        count = RGB if repeated or info.palette else info.bands
        if max(self.bands) > count:
            raise InputError(
                f"{info.path}: --bands {spell_bands(self.bands)}: {info.path.name} has {count} "
                f"band{'' if count == 1 else 's'}",
                "no such band",
            )
        return (1,) * len(self.bands) if repeated else self.bands


class ImageFile:
    """An open image as a `imaging.sources.Source`. Pixels without data are read as 0.

    A pixel has no data where the file says so, and where a band that is read is not a finite number. `limits` are the
    values that become 0 and 255 in each band that is read; none where values are not stretched.
    """

    def __init__(self, info: FileInfo, planes: Planes, view: View) -> None:
        self.info, self._planes, self._stretch = info, planes, view.stretch
        self._shown = view.choose(info)
        self._bands = (1,) if info.palette else tuple(dict.fromkeys(self._shown))
        self.size, self.n_bands = planes.size, len(self._shown)
        self.limits: Limits = self._find_limits() if info.needs_stretch else []

    def read(self, box: Box) -> Tensor:
        """Return (bands, height, width) uint8 of `box`; raises InputError, naming the file, where it cannot."""
        values = self._planes.read(box, self._bands)
        valid = self._valid(box, values)
        pixels = self._to_bytes(values)
        if valid is not None and not valid.all():
            pixels = pixels * valid
        if len(pixels) == 1:
            return to_tensor(pixels).expand(self.n_bands, -1, -1)
        if len(pixels) < self.n_bands:  # some are read more than once
            pixels = pixels[[self._bands.index(band) for band in self._shown]]
        return to_tensor(pixels)

    def valid(self, box: Box) -> Tensor | None:
        """Return (height, width) bool: which pixels of `box` have data; None where no pixel of the file can lack it."""
        found = self._valid(box)
        return None if found is None else to_tensor(found)

    def _to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Return `values` (bands, h, w) as uint8, 0..255, or the colours of a palette's indices."""
        if self.info.needs_stretch:
            return self._stretch.apply(values, self.limits)
        if self.info.palette:
            colors = palette_colors(required(self._planes.palette, "palette"), values[0])
            return colors[[band - 1 for band in self._shown]]
        if self.info.top < 255:
            return np.round(values * np.float32(255 / self.info.top)).astype(np.uint8)
        return values

    def _valid(self, box: Box, values: np.ndarray | None = None) -> np.ndarray | None:
        """Return where `box` has data; floats are read for that, unless its `values` are given."""
        valid = self._planes.valid(box, self._bands)
        if not self.info.dtype.startswith("float"):
            return valid
        values = self._planes.read(box, self._bands) if values is None else values
        finite: np.ndarray = np.isfinite(values).all(0)
        return finite if valid is None else finite & valid

    def _find_limits(self) -> Limits:
        """Return the values that become 0 and 255, of each band: for one file they are computed once in a process."""
        if not self._stretch.per_cent:
            return self._stretch.limits(np.empty((len(self._bands), 0, 0)))
        if not self.info.format:  # in memory
            return self._stretch.limits(*self._sample())
        status = self.info.path.stat()
        key = str(self.info.path), status.st_mtime_ns, status.st_size, self._bands, self._stretch, self.info.decoder
        if key not in _known_limits:
            if len(_known_limits) >= MOST_KNOWN:
                _known_limits.clear()
            _known_limits[key] = self._stretch.limits(*self._sample())
        return _known_limits[key]

    def _sample(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return evenly spaced pixels, (bands, h, w) with sides of at most 1024, and which of them have data."""
        rows, columns = map(spaced, self.size)
        found, masks = [], []
        for strip in strips(self.size, STRIP_PIXELS):
            own = rows[(rows >= strip.top) & (rows < strip.top + strip.height)]
            if not len(own):
                continue
            box = strip._replace(top=int(own[0]), height=int(own[-1] - own[0] + 1))
            values = self._planes.read(box, self._bands)
            mask = self._valid(box, values)
            found.append(values[:, own - own[0]][..., columns])
            if mask is not None:
                masks.append(mask[own - own[0]][:, columns])
        return np.concatenate(found, axis=1), np.concatenate(masks) if masks else None


def spaced(side: int) -> np.ndarray:
    """Return the rows, or columns, of a side of `side` pixels that belong to the sample, in order."""
    count = min(side, SAMPLE_SIDE)
    return ((np.arange(count) + 0.5) * side / count).astype(np.int64)


@contextmanager
def open_image(
    path: str | Path | FileInfo, view: View | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[ImageFile]:
    """Open a file, or what `imaging.probe.probe` said of it, turned as it is displayed.

    A raster is read in windows, any other is decoded once, up to `max_pixels`. Raises InputError, naming the file, if
    it cannot be read, lacks the bands, or needs rasterio, which is not installed.
    """
    view = view or View()
    info = path if isinstance(path, FileInfo) else probe(path)
    view.choose(info)
    with open_planes(info, None, max_pixels) as planes:
        yield ImageFile(info, planes, view)
